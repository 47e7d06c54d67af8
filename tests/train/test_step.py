"""One step of training against a plain torch loop, and what must not change its result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.config import Config, Distill, Mlm, Optimizer, Schedule, Train
from dwt_jax.data.batch import Batch
from dwt_jax.hf.checkpoint import to_hf_tensors
from dwt_jax.models import bert as models_bert
from dwt_jax.objectives.distillation import LossSums, LossWeights
from dwt_jax.objectives.mlm import make_targets
from dwt_jax.objectives.targets import Targets, row_keys
from dwt_jax.runs.state import TeacherGap
from dwt_jax.train import step as steps
from dwt_jax.train.step_schedules import StepSchedules, abstract_schedules, schedule_table
from helpers.train_step import (
    OBJECTIVE,
    SEED,
    B,
    L,
    batch,
    one_device,
    run,
    schedules,
    spec,
    start,
)


@pytest.fixture(scope="module")
def teacher_model(tiny):
    return dataclasses.replace(tiny, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def params(tiny):
    return models_bert.init_params(tiny, jax.random.key(0))


@pytest.fixture(scope="module")
def teacher(teacher_model, randomised):
    return randomised(teacher_model, 5)


def assert_close(a, b, atol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def masks(step):
    keys = row_keys(SEED, step, np.arange(B))
    return jax.tree.map(np.asarray, make_targets(batch(step), keys, OBJECTIVE))


def torch_losses(torch, bert, masked, segments):
    """log-probabilities at temperature 1 and logits at every masked position, documents apart."""
    positions = np.where(segments == 2, np.arange(L) - 6, np.arange(L))
    same = (segments[:, None, :, None] == segments[:, None, None, :]) & (segments > 0)[:, None, None, :]
    same |= np.eye(L, dtype=bool)  # padding looks at itself, so that its softmax is finite
    mask = torch.where(torch.tensor(same), 0.0, -1e30).to(torch.float64)
    hidden = bert.bert(
        input_ids=torch.tensor(masked.inputs).long(),
        attention_mask=mask,
        position_ids=torch.tensor(np.where(segments > 0, positions, 0)).long(),
    ).last_hidden_state
    logits = bert.cls(hidden)
    return torch.gather(
        logits, 1, torch.tensor(masked.positions).long()[..., None].expand(-1, -1, logits.shape[-1])
    )


@pytest.mark.slow
def test_three_steps_are_those_of_a_plain_torch_loop(tiny, teacher_model, params, teacher, torch_bert):
    """Masking is taken from here; packing, forward, both losses, clipping, AdamW and decay from torch,
    in float64."""
    torch = pytest.importorskip("torch")
    hard, soft, t, rate = 0.7, 1.5, 2.0, 1e-2
    student, guide = (
        torch_bert(params, tiny, torch.float64),
        torch_bert(teacher, teacher_model, torch.float64),
    )
    named = dict(student.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if not (n.endswith("bias") or "LayerNorm" in n)]},
            {
                "params": [p for n, p in named.items() if n.endswith("bias") or "LayerNorm" in n],
                "weight_decay": 0,
            },
        ],
        lr=rate,
        weight_decay=0.1,
        eps=1e-3,
    )
    expected = []
    for i in range(3):
        masked, segments = masks(i), batch(i).segment_ids
        logits = torch_losses(torch, student, masked, segments)
        with torch.no_grad():
            guidance = torch_losses(torch, guide, masked, segments)
        weights = torch.tensor(masked.weights).double()
        labels = torch.tensor(masked.labels).long()[..., None]
        ce = -logits.log_softmax(-1).gather(-1, labels)[..., 0]
        kl = torch.nn.functional.kl_div(
            (logits / t).log_softmax(-1), (guidance / t).log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        hard_loss, soft_loss = (ce * weights).sum() / weights.sum(), (kl * weights).sum() / weights.sum()
        loss = hard * hard_loss + soft * soft_loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        expected.append((loss.item(), hard_loss.item(), soft_loss.item(), norm.item()))

    state, found = run(spec(tiny, teacher_model), params, teacher, 3, schedules(hard, soft, t, rate))
    for metrics, numbers in zip(found, expected, strict=True):
        names = ("loss", "hard_loss", "soft_loss", "grad_norm")
        np.testing.assert_allclose([metrics[name] for name in names], numbers, rtol=2e-5)
    after = to_hf_tensors(state.params, tiny)
    for name, p in named.items():
        np.testing.assert_allclose(after[name], p.detach(), atol=2e-6, err_msg=name)


def test_accumulation_changes_nothing(tiny, teacher_model, params, teacher):
    whole, metrics = run(spec(tiny, teacher_model), params, teacher, 2)
    parts, metrics_of_parts = run(
        spec(tiny, teacher_model, gradient_accumulation_steps=4), params, teacher, 2
    )
    assert_close(parts.params, whole.params, 1e-6)
    assert_close(metrics_of_parts, metrics, 2e-5)


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(tiny, teacher_model, params, teacher, where):
    def poisoned(tree):
        return {**tree, "mlm": {**tree["mlm"], "bias": tree["mlm"]["bias"].at[7].set(jnp.inf)}}

    bad_teacher = poisoned(teacher) if where == "teacher" else teacher
    state, _ = run(spec(tiny, teacher_model), params, teacher, 1)
    if where == "student":
        state = dataclasses.replace(state, params=poisoned(state.params))
    before = jax.tree.map(np.asarray, jax.device_get(state))
    state, metrics = run(spec(tiny, teacher_model), None, bad_teacher, 2, state=state)
    assert not np.isfinite(metrics[0]["loss"])
    assert [(m["skipped"], m["consecutive_skips"]) for m in metrics] == [(1, 1), (2, 2)]
    for part in ("params", "opt_state", "teacher_gap"):
        after = getattr(jax.device_get(state), part)
        jax.tree.map(np.testing.assert_array_equal, after, getattr(before, part))
    assert int(state.step) == 3  # the next step draws another batch
    if where == "teacher":
        state, metrics = run(spec(tiny, teacher_model), None, teacher, 1, state=state)
        assert (metrics[0]["skipped"], metrics[0]["consecutive_skips"]) == (2, 0)
        assert np.abs(state.params["mlm"]["bias"] - before.params["mlm"]["bias"]).max() > 0
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_finite(tiny):
    """A tiny decoder behind a huge scale: the logits are ordinary, a gradient is not."""
    model = dataclasses.replace(tiny, num_hidden_layers=1, tie_word_embeddings=False)
    params = models_bert.init_params(model, jax.random.key(0))
    params["mlm"]["norm"]["scale"] *= 1e25
    params["mlm"]["decoder"]["embedding"] *= 1e-25
    before = jax.tree.map(np.asarray, params)
    state, [metrics] = run(spec(model, None), params, None, 1)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state).params, before)


def test_the_old_state_is_given_away_and_the_teacher_is_not(tiny, teacher_model, params, teacher):
    state = start(params)
    given = jax.tree.map(np.asarray, teacher)
    step = steps.jit_train_step(spec(tiny, teacher_model), one_device())
    after, _ = step(state, (teacher,), batch(), schedules(), np.uint32(SEED), None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, teacher)))
    jax.tree.map(np.testing.assert_array_equal, teacher, given)


def test_one_trace_for_all_steps_knobs_and_seeds(tiny, teacher_model, params, teacher):
    mine = spec(tiny, teacher_model)
    before = dict(steps.TRACE_COUNTS)
    state, _ = run(mine, params, teacher, 1)
    first = steps.TRACE_COUNTS["teacher"]
    assert first - before.get("teacher", 0) <= 1  # none if another test took a step before
    for seed, values in (
        (1, schedules(0.5, 0.0, 3.0, 0.0)),
        (2**31, schedules(1, 4, 1, 1e-3)),
        (7, schedules()),
    ):
        state, _ = run(mine, None, teacher, 2, values, seed, state=state)
    run(dataclasses.replace(mine), params, teacher, 1)  # an equal spec, as another run would have
    assert first > 0
    assert steps.TRACE_COUNTS["teacher"] == first


def test_runs_that_differ_in_scheduled_numbers_share_a_program(tiny, teacher_model):
    base = spec(tiny, teacher_model)
    assert spec(tiny, teacher_model, soft=Schedule("linear", 4.0, 1.0), temperature=3.0) == base
    assert spec(tiny, teacher_model, distill=Distill(preset="paper_strong")) == base
    for other in (
        spec(tiny, teacher_model, temperature=1.0),
        spec(tiny, teacher_model, soft=Schedule("until_matched")),
        spec(tiny, teacher_model, distill=Distill(divergence="reverse_kl")),
        spec(tiny),
    ):
        assert other != base
    assert not spec(tiny, soft=Schedule("until_matched")).until_matched  # nobody to beat


def test_without_weight_the_teacher_changes_nothing(tiny, teacher_model, params, teacher):
    taught, metrics = run(spec(tiny, teacher_model), params, teacher, 3, schedules(soft=0.0))
    alone, metrics_alone = run(spec(tiny), params, None, 3, schedules(soft=0.0))
    assert_close(taught.params, alone.params, 1e-6)
    assert_close(taught.opt_state, alone.opt_state, 1e-6)
    for with_, without in zip(metrics, metrics_alone, strict=True):
        assert with_["hard_loss"] == pytest.approx(without["hard_loss"], rel=1e-6)
        assert with_["loss"] == pytest.approx(with_["hard_loss"], rel=1e-6)
        assert with_["teacher_hard_loss"] > 0
        assert with_["soft_loss"] > 0
        assert without["teacher_hard_loss"] == without["soft_loss"] == 0


def test_a_step_is_a_function_of_seed_and_step(tiny, teacher_model, params, teacher):
    first, metrics = run(spec(tiny, teacher_model), params, teacher, 2)
    second, again = run(spec(tiny, teacher_model), params, teacher, 2)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert metrics == again
    _, other = run(spec(tiny, teacher_model), params, teacher, 2, seed=SEED + 1)
    assert other[0]["loss"] != metrics[0]["loss"]


def whole_objective(tiny, teacher_model, teacher):
    """(student, teacher) parameters → value of the objective on the first batch."""
    masked = masks(0)
    count = masked.weights.sum()
    made = spec(tiny, teacher_model)

    def value(pair):
        part = (masked, batch().segment_ids)
        weights = LossWeights(*(jnp.float32(x) for x in (0.7, 1.5, 2.0, count)))
        return steps.loss_fn(made, pair[0], (pair[1],), part, weights, None)[0]

    return value


def test_the_gradient_is_the_slope_of_the_whole_objective(tiny, teacher_model, teacher, randomised):
    """Central differences along random directions, one for each group of leaves. fp32: the loss is known
    to 1e-6 of itself, so the slope to about 1e-3 of itself at this step width."""
    value = whole_objective(tiny, teacher_model, teacher)
    point = randomised(tiny, 9), teacher
    evaluate = jax.jit(jax.value_and_grad(value))
    gradient = evaluate(point)[1]
    assert not any(np.any(x) for x in jax.tree.leaves(gradient[1]))  # none for the teacher
    width = 3e-3
    for group in ("embeddings", "layers", "mlm"):
        norm = np.sqrt(sum(float((np.float64(x) ** 2).sum()) for x in jax.tree.leaves(gradient[0][group])))
        assert norm > 0.01
        moved = []
        for width_of_leaf in (width / norm, -width / norm):
            scaled = jax.tree.map(lambda g, w=width_of_leaf: w * g, gradient[0][group])
            moved.append(({**point[0], group: jax.tree.map(jnp.add, point[0][group], scaled)}, teacher))
        slope = (float(evaluate(moved[0])[0]) - float(evaluate(moved[1])[0])) / (2 * width)
        assert slope == pytest.approx(norm, rel=5e-3), group


def test_targets_at_all_positions_are_those_at_each_position(tiny, teacher_model, params, teacher):
    """`positions` None means all of them: the same loss and gradient as with their numbers."""
    made, rows = spec(tiny, teacher_model), batch()
    weights = (rows.segment_ids > 0).astype(np.float32)
    loss_weights = LossWeights(*(jnp.float32(x) for x in (0.7, 1.5, 2.0, weights.sum())))

    def value(params, positions):
        targets = Targets(jnp.asarray(rows.tokens), positions, jnp.asarray(rows.tokens), weights)
        return steps.loss_fn(made, params, (teacher,), (targets, rows.segment_ids), loss_weights, None)[0]

    every = jnp.broadcast_to(jnp.arange(L), (B, L))
    found, expected = (jax.jit(jax.value_and_grad(value))(params, at) for at in (None, every))
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    assert_close(found[1], expected[1], 1e-6)


def teacher_gap_of(gap, weight, matched_step=-1):
    return TeacherGap(jnp.float32(gap), jnp.float32(weight), jnp.int32(matched_step))


def test_what_is_not_finite_is_no_part_of_the_running_gap(tiny, teacher_model):
    made = spec(tiny, teacher_model, soft=Schedule("until_matched"))
    sums = dataclasses.replace(LossSums.zeros(), hard=jnp.float32(jnp.nan), predictions=jnp.float32(5))
    before = teacher_gap_of(0.5, 0.9)
    assert steps._update_teacher_gap(before, sums, jnp.bool_(False), jnp.int32(7), made) == before


def test_until_beaten_lowers_the_weight_and_stays_at_zero(tiny, teacher_model, params, teacher, randomised):
    """Fed with students that are worse and better than the teacher; the running mean by hand."""
    decay, margin, soft = 0.5, 4.0, 3.0
    distill = Distill(gap_ema_decay=decay, match_margin=margin)
    made = spec(tiny, teacher_model, distill, soft=Schedule("until_matched", soft))
    assert made.until_matched
    # Students that say "token 9" with a certainty that the batch (all 9) rewards or punishes.
    base = jax.tree.map(jnp.zeros_like, params)
    table = jnp.zeros_like(params["mlm"]["bias"])
    rewarded = Batch(np.full((B, L), 9, np.int32), np.ones((B, L), np.int32))

    def says(bias, like):
        return {
            **jax.tree.map(jnp.zeros_like, like),
            "mlm": {**jax.tree.map(jnp.zeros_like, like["mlm"]), "bias": bias},
        }

    guide = says(jnp.zeros_like(teacher["mlm"]["bias"]), teacher)  # log 119 at every position
    step = steps.jit_train_step(made, one_device())
    gap = weight = 0.0
    matched_step = -1
    shares = []
    for i, boost in enumerate([-3.0, -3.0, -1.0, 0.5, 2.0, 5.0, -6.0, -6.0]):
        student = says(table.at[9].set(boost), base)
        state = start(student)
        state = dataclasses.replace(
            state, step=jnp.int32(i), teacher_gap=teacher_gap_of(gap, weight, matched_step)
        )
        share = 1.0 if weight == 0 else float(np.clip(gap / weight / margin, 0, 1))
        share = 0.0 if matched_step >= 0 else share
        values = schedules(soft=soft, rate=0.0)
        state, metrics = step(state, (guide,), rewarded, values, np.uint32(0), None)
        assert metrics["alpha_soft"].item() == pytest.approx(soft * share, abs=1e-5)
        hard = np.log(118 + np.exp(boost)) - boost
        assert metrics["hard_loss"].item() == pytest.approx(hard, rel=1e-5)
        assert metrics["teacher_hard_loss"].item() == pytest.approx(np.log(119), rel=1e-5)
        gap = decay * gap + (1 - decay) * (hard - np.log(119))
        weight = decay * weight + (1 - decay)
        if matched_step < 0 and gap <= 0:
            matched_step = i
        assert metrics["teacher_matched_step"].item() == matched_step
        teacher_gap = jax.device_get(state.teacher_gap)
        assert teacher_gap.gap == pytest.approx(gap, abs=1e-5)
        assert teacher_gap.weight == pytest.approx(weight, abs=1e-6)
        shares.append(share)
    assert shares[0] == 1
    assert 0 < shares[3] < shares[2] < 1
    assert matched_step == 4
    assert shares[5:] == [0, 0, 0]  # for good, though the student became worse again


def test_schedule_table_holds_each_schedule_by_name():
    config = Config(
        distill=Distill(
            alpha_hard=Schedule(value=0.5), alpha_soft=Schedule("linear", 4, 1), temperature=Schedule(value=3)
        ),
        train=Train(steps=4),
        optimizer=Optimizer(learning_rate=Schedule(value=0.25)),
    )
    table = schedule_table(config)
    expected = StepSchedules(
        alpha_hard=np.full(4, 0.5),
        alpha_soft=4 - 0.75 * np.arange(4),
        temperature=np.full(4, 3),
        learning_rate=np.full(4, 0.25),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), table, expected)
    assert all(values.dtype == np.float32 for values in jax.tree.leaves(table))
    assert table[2].alpha_soft == 2.5
    assert table.gate is table.new_param_scale is table.num_predictions is None


@pytest.mark.parametrize("mlm", [Mlm(), Mlm(Schedule("piecewise", 0.4, 0.15, decay_start=0.5))])
def test_abstract_schedules_are_those_of_any_step(mlm):
    config = Config(mlm=mlm, train=Train(steps=4))
    table, abstract = schedule_table(config), abstract_schedules(config)
    for step in range(4):
        found = jax.tree.map(lambda x: (x.shape, x.dtype), table[step])
        assert found == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    several = table[np.array([1, 2])]
    if mlm.probability.kind != "constant":
        assert [values.num_predictions[128] for values in (table[1], table[2])] == [51, 19]
        assert several.num_predictions.shape == (2, 129)
        assert several[-1].num_predictions[128] == 19


@pytest.mark.slow
def test_rows_have_the_predictions_of_the_step_and_the_loss_is_their_mean(tiny, params):
    """As the objective with the lower rate, whose P is smaller, but for the draws of the replacements."""
    lower = dataclasses.replace(OBJECTIVE.config, probability=Schedule(value=0.15), mask_token_share=1.0)
    lower = dataclasses.replace(lower, random_token_share=0.0)
    higher = dataclasses.replace(lower, probability=OBJECTIVE.config.probability)
    found = []
    for mlm, counts in ((lower, None), (higher, np.array([max(1, round(0.15 * n)) for n in range(L + 1)]))):
        objective = dataclasses.replace(OBJECTIVE, config=mlm)
        config = dataclasses.replace(spec(tiny), objective=objective)
        values = dataclasses.replace(schedules(), num_predictions=counts)
        found.append(run(config, params, None, 2, values))
    assert_close(found[0][0].params, found[1][0].params, 1e-6)
    assert found[0][1][1]["loss"] == pytest.approx(found[1][1][1]["loss"], rel=1e-6)
