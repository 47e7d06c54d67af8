import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.config import Schedule
from dwt_jax.config_loader import build_config as build_config
from dwt_jax.objectives import schedules
from dwt_jax.presets import PRESETS
from dwt_jax.train.step_schedules import schedule_table

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("strict_ranks")

STEPS = 200


def closed_form(schedule, step, steps):
    """Straight from the docstring of Schedule, one step at a time, in Python floats."""
    warmup = round(schedule.warmup_fraction * steps)
    begin, until = max(round(schedule.decay_start * steps), warmup), round(schedule.decay_end * steps)
    value, end = schedule.value, schedule.end
    if step < warmup:
        return value * step / warmup
    if schedule.boundaries:
        stage = sum(step >= round(boundary * steps) for boundary in schedule.boundaries)
        return (value, *schedule.boundary_values)[stage]
    if schedule.kind in ("constant", "until_matched") or step < begin:
        return value
    if schedule.kind == "piecewise":
        return end
    done = min((step - begin) / max(until - begin, 1), 1.0)
    shape = schedule.decay_type if schedule.kind == "warmup_stable_decay" else schedule.kind
    if shape == "1-sqrt":
        return end + (value - end) * (1 - math.sqrt(done))
    if shape == "cosine":
        return end + (value - end) * (1 + math.cos(math.pi * done)) / 2
    return value + (end - value) * done


SCHEDULES = [
    Schedule(),
    Schedule(value=3.0, warmup_fraction=0.1),
    Schedule(kind="until_matched", value=2.0, warmup_fraction=0.05),
    *(
        Schedule(kind, value=value, end=end, **when)
        for kind in ("linear", "cosine", "warmup_stable_decay")
        for value, end in ((4.0, 1.0), (0.0, 1.0))
        for when in (
            {},
            {"warmup_fraction": 0.1},
            {"decay_start": 0.5, "decay_end": 0.75},
            {"warmup_fraction": 0.3, "decay_start": 0.2, "decay_end": 0.9},
        )
    ),
    Schedule("piecewise", value=4.0, end=1.0, decay_start=0.4),
    Schedule("piecewise", value=4.0, end=1.0, decay_start=0.1, warmup_fraction=0.2),
    Schedule("piecewise", value=4.0, end=1.0),
    Schedule("piecewise", value=4.0, boundaries=(0.3,), boundary_values=(1.0,)),
    Schedule(
        "piecewise",
        value=4.0,
        warmup_fraction=0.4,
        boundaries=(0.3, 0.6, 0.601),
        boundary_values=(1.0, 0.0, 2.0),
    ),
    *(
        Schedule("warmup_stable_decay", value=4.0, end=end, decay_type=decay_type, **when)
        for decay_type in ("cosine", "1-sqrt")
        for end in (0.0, 1.0)
        for when in (
            {},
            {"warmup_fraction": 0.1, "decay_start": 0.8},
            {"warmup_fraction": 0.3, "decay_start": 0.2, "decay_end": 0.9},
        )
    ),
]


@pytest.mark.parametrize(
    "schedule",
    SCHEDULES,
    ids=lambda s: f"{s.kind}-{s.decay_type}-{s.value}-{s.warmup_fraction}-{s.decay_start}-{s.decay_end}",
)
def test_the_closed_form(schedule):
    found = schedules.schedule_values(schedule, STEPS)
    assert found.dtype == np.float32
    assert found.shape == (STEPS,)
    expected = [closed_form(schedule, step, STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    exact = schedules.schedule_values(schedule, STEPS, np.float64)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, expected, rtol=1e-14, atol=1e-14)
    if schedule.kind in ("constant", "piecewise") and not schedule.warmup_fraction:
        assert exact.tolist() == expected
    # Beyond the end it stays; and a single step, traced or not, gives what the table has.
    one = schedules.build_schedule(schedule, STEPS)
    assert float(one(10 * STEPS)) == pytest.approx(closed_form(schedule, 10 * STEPS, STEPS), abs=2e-6)
    for step in (0, 7, 90, STEPS - 1):
        assert float(one(step)) == pytest.approx(expected[step], abs=2e-6)


shares = st.floats(0, 1)
values = st.floats(0, 10)


@given(
    st.sampled_from(["constant", "linear", "cosine", "piecewise", "until_matched"]),
    values,
    values,
    shares,
    shares,
    shares,
    st.sampled_from([1, 10, 333]),
)
@settings(max_examples=25)
def test_any_schedule_stays_between_its_values(kind, value, end, warmup, begin, until, steps):
    until = max(until, begin, warmup)
    schedule = Schedule(kind, value, end, warmup, begin, until)
    found = schedules.schedule_values(schedule, steps)
    low = 0 if warmup * steps >= 0.5 else min(value, end)
    assert (found >= low - 1e-5).all()
    assert (found <= max(value, end) + 1e-5).all()
    np.testing.assert_allclose(
        found, [closed_form(schedule, step, steps) for step in range(steps)], rtol=1e-5, atol=1e-5
    )


def rates(make, value):
    """The learning rate of each step as torch has it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=value)
    scheduler = make(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (
            Schedule("linear", 5e-4, warmup_fraction=0.05),
            lambda o: transformers.get_linear_schedule_with_warmup(o, STEPS // 20, STEPS),
        ),
        (
            Schedule("cosine", 5e-4, warmup_fraction=0.05),
            lambda o: transformers.get_cosine_schedule_with_warmup(o, STEPS // 20, STEPS),
        ),
        (
            Schedule("constant", 5e-4, warmup_fraction=0.1),
            lambda o: transformers.get_constant_schedule_with_warmup(o, STEPS // 10),
        ),
        (
            Schedule("linear", 0.4, end=0.1),
            lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.25, total_iters=STEPS),
        ),
        (
            Schedule("cosine", 0.4, end=0.1),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1),
        ),
        (
            Schedule("piecewise", 0.4, end=0.1, decay_start=0.25),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [STEPS // 4], gamma=0.25),
        ),
        (
            Schedule("piecewise", 0.4, boundaries=(0.25, 0.4), boundary_values=(0.1, 0.025)),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [STEPS // 4, 2 * STEPS // 5], gamma=0.25),
        ),
        *(
            (
                Schedule(
                    "warmup_stable_decay",
                    5e-4,
                    end,
                    warmup_fraction=warmup / STEPS,
                    decay_start=0.8,
                    decay_type=decay_type,
                ),
                lambda o, warmup=warmup, end=end, decay_type=decay_type: transformers.get_wsd_schedule(
                    o, warmup, STEPS // 5, STEPS, decay_type=decay_type, min_lr_ratio=end / 5e-4
                ),
            )
            for decay_type in ("linear", "cosine", "1-sqrt")
            for warmup, end in ((STEPS // 20, 0.0), (0, 1e-4))  # with a floor, theirs begins there too
        ),
    ],
    ids=lambda x: x.decay_type + "-" + x.kind if isinstance(x, Schedule) else "",
)
def test_as_torch_and_transformers_have_them(schedule, make):
    np.testing.assert_allclose(
        schedules.schedule_values(schedule, STEPS),
        rates(make, schedule.value),
        rtol=2e-5,
        atol=1e-7 * schedule.value,
    )


def test_one_minus_sqrt_falls_faster_than_linear_and_ends_at_the_same_value():
    """Hägele et al. 2024: 1 − √((n − (N − N_decay)) / N_decay)."""
    decay = {"warmup_fraction": 0.1, "decay_start": 0.8}
    linear, root = (
        schedules.schedule_values(Schedule("warmup_stable_decay", decay_type=shape, **decay), STEPS)
        for shape in ("linear", "1-sqrt")
    )
    begin, length = STEPS * 8 // 10, STEPS // 5
    np.testing.assert_array_equal(root[: begin + 1], linear[: begin + 1])
    assert (root[begin + 1 :] < linear[begin + 1 :]).all()
    assert root[begin + length // 4] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "decay_type"),
    [
        ("linear", "linear"),
        ("cosine", "linear"),
        *(("warmup_stable_decay", decay_type) for decay_type in ("linear", "cosine", "1-sqrt")),
    ],
)
def test_a_decay_ends_exactly(kind, decay_type):
    """For all numbers of steps: a weight of 2e-7 would keep a teacher of 4 → 0 to the end of the run."""
    schedule = Schedule(kind=kind, value=4.0, end=0.0, decay_end=0.5, decay_type=decay_type)
    for steps in range(1694, 1706):
        values = schedules.schedule_values(schedule, steps)
        assert schedules.zero_from(values) == round(0.5 * steps), steps
    other = Schedule(kind=kind, value=0.4, end=0.15, decay_end=0.5, decay_type=decay_type)
    assert set(schedules.schedule_values(other, 1700)[850:].tolist()) == {float(np.float32(0.15))}


def test_a_step_may_be_an_array_or_traced():
    one = schedules.build_schedule(Schedule("cosine", 2.0, warmup_fraction=0.1), STEPS)
    steps = np.array([0, 5, 20, 199])
    table = schedules.schedule_values(Schedule("cosine", 2.0, warmup_fraction=0.1), STEPS)
    np.testing.assert_allclose(one(steps), table[steps], atol=1e-6)
    np.testing.assert_allclose(jax.jit(one)(20), table[20], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([], 0),
        ([0, 0], 0),
        ([1, 1, 1], 3),
        ([1, 0, 0], 1),
        ([0, 1, 0, 0], 2),
        ([0, 0, 1], 3),
        ([1, 0, 1, 0], 3),
    ],
)
def test_zero_from(values, step):
    assert schedules.zero_from(np.array(values, np.float32)) == step


def test_the_teacher_of_knowledge_inheritance_goes_after_a_quarter():
    distill = build_config(
        {"train": {"steps": STEPS}, "distill": {"preset": "knowledge_inheritance"}, "teacher": {"path": "t"}}
    ).distill
    soft = schedules.schedule_values(distill.alpha_soft, STEPS)
    assert schedules.zero_from(soft) == STEPS // 4
    # (1 − α)·CE + α·KL at every step
    np.testing.assert_allclose(schedules.schedule_values(distill.alpha_hard, STEPS) + soft, 1.0, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_knobs_of_a_preset(name):
    config = build_config({"train": {"steps": STEPS}, "distill": {"preset": name}, "teacher": {"path": "t"}})
    table = schedule_table(config)
    assert {values.shape for values in jax.tree.leaves(table)} == {(STEPS,)}
    step = 80
    expected = {
        "paper_normal": (1, 1, 1),
        "paper_strong": (1, 4, 1),
        "paper_decay": (1, 4 - 3 * step / STEPS, 1),
        "early_decay": (1, max(0, 4 - 4 * step / (STEPS / 2)), 1),
        "knowledge_inheritance": (1, 0, 2),
    }[name]
    values = table[step]
    np.testing.assert_allclose(
        [values.alpha_hard, values.alpha_soft, values.temperature], expected, rtol=1e-6
    )
    rate = 5e-4 * (STEPS - step) / (STEPS - STEPS // 20)  # linear, after 5 % of warm-up
    np.testing.assert_allclose(values.learning_rate, rate, rtol=1e-5)


def test_beaten_share():
    gaps = np.array([-1.0, 0.0, 0.1, 0.25, 0.5, 3.0])
    np.testing.assert_allclose(schedules.alpha_soft_scale(gaps, 0.5), [0, 0, 0.2, 0.5, 1, 1], atol=1e-7)
