"""The hooks of the training loop, called as the loop does, with a recorder in place of files and devices."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.config import Config, Train
from dwt_jax.distributed.shutdown import Preempted, TrainingFailed
from dwt_jax.errors import SaveFailed
from dwt_jax.models.common.matmul import Policy
from dwt_jax.runs import metric_writer
from dwt_jax.train.hooks import LoopState, make_hooks
from dwt_jax.train.step_schedules import StepSchedules

TRAIN = Train(steps=12, batch_size=2, log_every=3, eval_every=4, save_every=6, max_consecutive_nonfinite=3)
TEACHER_METRICS = ("soft_loss", "soft_loss_at_1", "teacher_hard_loss", "selected_share")


class Recorder:
    """Metric writer, checkpoints and shutdown flag in one; `events` is what happened, in order."""

    def __init__(self, stop_at_poll=None):
        self.events, self.polls, self.stop_at_poll = [], 0, stop_at_poll
        self.check = lambda: None
        self.rates = {}  # by step: (MFU, tokens/s, ETA)

    def log_step(self, record, eta):
        self.rates[record["step"]] = record["mfu"], record["tokens_per_second"], eta
        self.events.append(f"metrics {record['step']}")

    def save(self, step, state):
        self.events.append(f"save {step}")

    def wait(self):
        self.events.append("wait")

    def is_set(self):
        self.polls += 1
        return self.stop_at_poll is not None and self.polls >= self.stop_at_poll


def metrics(step, skips=0, matched_step=-1):
    names = ("loss", "hard_loss", *TEACHER_METRICS, "alpha_soft", "grad_norm")
    counts = {"skipped": skips, "max_consecutive_skips": skips, "teacher_matched_step": matched_step}
    return {name: jnp.float32(step) for name in names} | {k: jnp.int32(v) for k, v in counts.items()}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("DWT_PEAK_FLOPS", "1e9")  # not measured
    return SimpleNamespace(
        config=Config(train=TRAIN),
        policy=Policy(),
        workdir=Path("run"),
        schedules=StepSchedules(*np.ones((4, TRAIN.steps), np.float32)),
        step_config=SimpleNamespace(until_matched=False),
        teacher=None,
        teacher_end_step=0,
        growth=None,
        batch_sizes=np.full(TRAIN.steps, TRAIN.batch_size),
        student_flops=np.full(TRAIN.steps, 1.0),
        teacher_flops=np.full(TRAIN.steps, 0.5),
    )


class Loop:
    """What the loop does around its hooks, without a model."""

    def __init__(self, run, recorder):
        self.recorder, self.state = recorder, LoopState(state=None, step=0, teacher_end_step=0)
        self.hooks = make_hooks(run, recorder, recorder, recorder, lambda: None)
        self.hooks.evaluator.evaluate = self.evaluate

    def evaluate(self, loop):
        """Poll the shutdown flag once, as an evaluation does before each of its batches."""
        stopped = self.recorder.is_set()
        self.recorder.events.append(f"evaluate {loop.step}{' stopped' * stopped}")

    def take_steps(self, until=TRAIN.steps, **values):
        while self.state.step < until:
            self.state.step += 1
            self.recorder.events.append(f"step {self.state.step}")
            self.state.metrics = metrics(self.state.step, **values)
            for hook in self.hooks.in_order:
                hook(self.state)


def test_metrics_are_written_during_the_next_step_or_before_a_checkpoint(run):
    loop = Loop(run, Recorder())
    loop.take_steps()
    loop.hooks.metric_logger.flush(loop.state)
    events = [event for event in loop.recorder.events if event not in ("step 2", "step 3", "step 11")]
    assert events == [
        "step 1",
        *("step 4", "metrics 3", "evaluate 4"),  # step 3 is logged, while step 4 runs
        *("step 5", "step 6", "metrics 6", "save 6"),
        *("step 7", "step 8", "evaluate 8"),
        *("step 9", "step 10", "metrics 9"),
        *("step 12", "metrics 12"),  # evaluation and checkpoint of the last step are no hooks
    ]


@pytest.mark.parametrize("stop_at_poll", range(1, 14))
def test_preempted_run_has_saved_the_step_it_names(run, stop_at_poll):
    """Whenever a signal comes, between two hooks or in an evaluation."""
    loop = Loop(run, Recorder(stop_at_poll))
    with pytest.raises(Preempted, match=r"stopped at step \d+; checkpoint saved") as preempted:
        loop.take_steps()
    step = loop.state.step
    assert f"stopped at step {step};" in str(preempted.value)
    assert loop.recorder.events[-2:] == [f"save {step}", "wait"]


def test_signal_during_the_last_step_does_not_end_the_loop(run):
    loop = Loop(run, Recorder())
    loop.take_steps(until=TRAIN.steps - 1)
    loop.recorder.stop_at_poll = 0
    loop.take_steps()
    assert "wait" not in loop.recorder.events


def test_too_many_non_finite_steps_fail(run):
    loop = Loop(run, Recorder())
    with pytest.raises(TrainingFailed, match="not finite for 3 consecutive steps"):
        loop.take_steps(skips=3)
    assert loop.state.step == 4  # the metrics of step 3 are read one step later


def test_a_failed_save_ends_the_run_at_the_next_step(run):
    """Not at the next save, which may be hours later."""
    loop = Loop(run, Recorder())

    def check():
        if loop.state.step == 8:  # the save of step 6 has failed by now
            raise SaveFailed("no room")

    loop.recorder.check = check
    with pytest.raises(SaveFailed):
        loop.take_steps()
    assert loop.state.step == 8


@pytest.mark.parametrize(
    ("losses", "fails"),
    [
        ((2.0, math.nan), False),  # one step that is skipped
        ((2.0, 0.0), False),  # one step without a prediction
        ((math.nan, 2.0), False),
        ((math.nan, math.nan), True),
        ((0.0, 0.0), True),
        ((math.inf, 0.0), True),
        ((math.nan,), True),
        ((), False),  # an evaluation at the step that a run resumes from
    ],
)
def test_a_training_loss_that_cannot_be_right_ends_the_run_at_an_evaluation(run, losses, fails):
    evaluator = Loop(run, Recorder()).hooks.evaluator
    evaluator.metric_logger.losses = dict(zip((3, 6), losses[:-1], strict=False))
    state = LoopState(None, 8, 0, {"loss": jnp.float32(losses[-1])} if losses else {})
    with pytest.raises(TrainingFailed, match="at step 8 the training loss is") if fails else nullcontext():
        evaluator._check_losses(state, {"held_out_loss": 2.0, "predictions": 10})


def test_until_matched_ends_the_teacher_at_a_logged_step(run):
    run.step_config.until_matched = True
    run.teacher, run.teacher_end_step = object(), TRAIN.steps
    loop = Loop(run, Recorder())
    loop.state.teacher_end_step, loop.state.with_teacher = TRAIN.steps, True
    loop.take_steps(until=5, matched_step=4)  # matched in step 5, which is not logged
    assert loop.state.teacher_end_step == TRAIN.steps
    loop.take_steps(until=6, matched_step=4)
    assert loop.state.teacher_end_step == 6


def test_mfu_and_eta_count_the_flops_of_each_step(run, monkeypatch):
    """A device of 10 FLOP/s, 6 small steps and 6 large ones, the first 8 with a teacher."""
    run.config = Config(train=dataclasses.replace(TRAIN, eval_every=0, save_every=100))
    run.student_flops = np.repeat([10.0, 40.0], 6)
    run.teacher_flops = run.student_flops / 2
    loop = Loop(run, Recorder())
    loop.state.teacher_end_step = 8
    seconds = [0.1 * (10 + 30 * (step >= 6)) * (1.5 if step < 8 else 1) for step in range(12)]
    now = 100.0  # the hooks of a step are called when the step before it has ended
    monkeypatch.setattr(metric_writer, "time", SimpleNamespace(perf_counter=lambda: now))
    for step in range(12):
        loop.state.with_teacher, loop.state.num_tokens = step < 8, 7 if step < 6 else 28
        loop.take_steps(until=step + 1)
        now += seconds[step]
    loop.hooks.metric_logger.flush(loop.state)
    for step, tokens in ((6, 21), (9, 84), (12, 84)):
        mfu, tokens_per_second, eta = loop.recorder.rates[step]
        assert mfu == pytest.approx(10 / 1e9)
        assert tokens_per_second == pytest.approx(tokens / sum(seconds[step - 3 : step]))
        assert eta == pytest.approx(sum(seconds[step:]))
