"""Hooks between steps: logging, evaluation, checkpoints, preemption, the watchdog.

A hook is a function of the loop's state, called after every step. The order is fixed in `make_hooks`:
records are written before the checkpoint of their step, so that a resumed run never lacks them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from dwt_jax.distributed import coordination
from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag, TrainingFailed
from dwt_jax.eval import likelihood
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metric_writer import MetricWriter, ThroughputMeter
from dwt_jax.runs.metrics_file import read_jsonl
from dwt_jax.runs.peak_flops import peak_flops_per_device
from dwt_jax.runs.state import TrainState
from dwt_jax.train.accounting import computed_flops, flops_so_far, get_teacher_end_step
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.run_state import effective_params
from dwt_jax.train.step import Metrics


@dataclass
class LoopState:
    """The state that the loop and its hooks share.

    Attributes:
        state: the training state after `step` steps.
        step: number of completed steps.
        teacher_end_step: the first step without the teacher, as far as known.
        metrics: of the last step, on the devices.
        with_teacher: whether the last step used the teacher.
        num_tokens: tokens of the last batch that are not padding, of all processes.
        throughput: time, tokens and FLOPs since metrics were last logged.
        stop_requested: whether the checkpoint hook has seen a signal.
    """

    state: TrainState
    step: int
    teacher_end_step: int
    metrics: Metrics = field(default_factory=dict)
    with_teacher: bool = False
    num_tokens: int = 0
    throughput: ThroughputMeter = field(default_factory=ThroughputMeter)
    stop_requested: bool = False

    @property
    def teacher_steps(self) -> int:
        """Number of completed steps that used the teacher."""
        return min(self.step, self.teacher_end_step)


Hook = Callable[[LoopState], None]


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether an action with period `every` is due after `step`, which is not the last step."""
    return bool(every) and step % every == 0 and step != last


def preemption_error(run: RunContext, step: int) -> Preempted:
    """Return the exception of a run that was stopped after `step` steps."""
    return Preempted(
        f"{run.workdir}: stopped at step {step}; checkpoint saved. Rerun the same command to resume."
    )


class MetricLogger:
    """Log metrics every train.log_every steps, one step late: they are read while the next step runs."""

    def __init__(self, run: RunContext, metric_writer: MetricWriter):
        self.run, self.metric_writer = run, metric_writer
        self.peak_flops = peak_flops_per_device(str(run.policy.compute_dtype))
        self._pending: tuple[int, Metrics] | None = None
        self.losses: dict[int, float] = {}  # by step: those logged last, at most two

    def __call__(self, loop: LoopState) -> None:
        self.flush(loop)
        teacher_end_step = loop.step if loop.with_teacher else 0
        step_flops = computed_flops(self.run, loop.step - 1, loop.step, teacher_end_step)
        loop.throughput.add(loop.num_tokens, step_flops)
        train_config = self.run.config.train
        if is_due(loop.step, train_config.log_every, 0) or loop.step == train_config.steps:
            self._pending = loop.step, loop.metrics
            if self.run.step_config.until_matched and loop.with_teacher:
                matched_step = loop.metrics["teacher_matched_step"]
                loop.teacher_end_step = get_teacher_end_step(self.run, matched_step, loop.step)

    def flush(self, loop: LoopState) -> None:
        """Write the metrics of the last logged step, unless they are written.

        Raises:
            TrainingFailed: too many consecutive steps were not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        train_config = self.run.config.train
        flops_per_second, tokens_per_second, data_wait = loop.throughput.read_and_reset()
        teacher_steps = min(step, loop.teacher_end_step)
        peak_flops = self.peak_flops * jax.device_count() if self.peak_flops else None
        record = {
            **step_record(self.run, step, values, with_teacher=teacher_steps == step),
            "tokens_per_second": tokens_per_second,
            "mfu": flops_per_second / peak_flops if peak_flops else None,
            "data_wait": data_wait,
            **flops_so_far(self.run, step, teacher_steps),
        }
        # By FLOPs and not by steps: those of a batch ramp, or without the teacher, take less time.
        remaining = computed_flops(self.run, step, train_config.steps, loop.teacher_end_step)
        eta = remaining / flops_per_second if flops_per_second else 0.0
        self.metric_writer.log_step(record, eta)
        self.losses = dict([*self.losses.items(), (step, values["loss"])][-2:])
        if values["max_consecutive_skips"] >= train_config.max_consecutive_nonfinite:
            raise TrainingFailed(
                f"{self.run.workdir}: loss or gradient not finite for {values['max_consecutive_skips']} "
                f"consecutive steps (up to step {step}); those updates were skipped and the checkpoints "
                "are intact"
            )


_TEACHER_METRICS = ("soft_loss", "soft_loss_at_1", "teacher_hard_loss", "selected_share")


def step_record(
    run: RunContext, step: int, values: dict[str, float], with_teacher: bool
) -> dict[str, float | None]:
    """Return losses and schedule values of a step as they are logged."""
    schedules = run.schedules[step - 1]
    optional = {name: getattr(schedules, name) for name in ("gate", "new_param_scale")}
    if schedules.num_predictions is not None:
        optional["predictions_per_row"] = schedules.num_predictions[-1]  # of a full row
    if run.config.train.batch_ramp:
        optional["batch_size"] = run.batch_sizes[step - 1]
    return {
        "step": step,
        "loss": values["loss"],
        "hard_loss": values["hard_loss"],
        **{key: values[key] if with_teacher else None for key in _TEACHER_METRICS},
        "alpha_hard": float(schedules.alpha_hard),
        "alpha_soft": values["alpha_soft"] if with_teacher else 0.0,
        "temperature": float(schedules.temperature),
        "learning_rate": float(schedules.learning_rate),
        **{name: float(value) for name, value in optional.items() if value is not None},
        "grad_norm": values["grad_norm"],
        "skipped": values["skipped"],
    }


@dataclass
class Evaluator:
    """Evaluate every train.eval_every steps. A signal interrupts it."""

    run: RunContext
    metric_writer: MetricWriter
    metric_logger: MetricLogger
    shutdown_flag: ShutdownFlag
    heartbeat: Callable[[], None]

    def __call__(self, loop: LoopState) -> None:
        train_config = self.run.config.train
        if is_due(loop.step, train_config.eval_every, train_config.steps) and not self.shutdown_flag.is_set():
            self.metric_logger.flush(loop)
            self.evaluate(loop)
            loop.throughput.restart()

    def evaluate(self, loop: LoopState) -> dict[str, float] | None:
        """Record the held-out loss after `loop.step` steps, unless it is recorded already.

        Returns:
            The record; None if a signal interrupted the evaluation.

        Raises:
            TrainingFailed: the held-out loss or the training loss is implausible.
        """
        path = self.run.workdir / "evaluations.jsonl"
        if record := coordination.run_on_main(
            lambda: next((entry for entry in read_jsonl(path) if entry["step"] == loop.step), None)
        ):
            self._check_losses(loop, record)
            return record
        document_losses = likelihood.losses_per_document(
            effective_params(self.run, loop.state.params, loop.step),
            self.run.config.model,
            self.run.data,
            mesh=self.run.mesh,
            policy=self.run.policy,
            should_stop=self._should_stop,
        )
        if document_losses is None:
            return None
        if loop.step == self.run.config.train.steps and coordination.process_index() == 0:
            likelihood.write_document_losses(self.run.workdir / "documents.npz", document_losses)
        metrics = likelihood.summarize_losses(document_losses)
        record = {
            "step": loop.step,
            **metrics,
            **likelihood.losses_per_byte(metrics, self.run.config.model.objective, self.run.data),
            **flops_so_far(self.run, loop.step, loop.teacher_steps),
        }
        self.metric_writer.log_evaluation(record)
        self._check_losses(loop, record)
        return record

    def _check_losses(self, loop: LoopState, record: Mapping[str, Any]) -> None:
        """Raise TrainingFailed if a loss is not finite or exactly 0: such a run must not look complete.

        A single step with such a training loss is skipped (or has nothing to predict) and does not end the
        run. So the loss that was logged before, if any, must be as bad.
        """
        problem = likelihood.loss_problem(record)
        losses = self.metric_logger.losses
        if loop.metrics and loop.step not in losses:  # the evaluation has waited for this step anyway
            losses = {**losses, loop.step: jax.device_get(loop.metrics["loss"]).item()}
        recent_losses = [losses[step] for step in sorted(losses)[-2:]]
        if not problem and recent_losses and not any(loss and math.isfinite(loss) for loss in recent_losses):
            problem = f"the training loss is {recent_losses[-1]:g}"
        if problem:
            raise TrainingFailed(
                f"{self.run.workdir}: at step {loop.step} {problem}, expected {likelihood.EXPECTED_LOSS}; "
                "the checkpoints are intact"
            )

    def _should_stop(self) -> bool:
        self.heartbeat()
        return self.shutdown_flag.is_set()


@dataclass
class CheckpointSaver:
    """Save every train.save_every steps, and after a signal. A save that failed ends the run."""

    run: RunContext
    checkpoints: Checkpoints
    metric_logger: MetricLogger
    shutdown_flag: ShutdownFlag
    heartbeat: Callable[[], None]

    def __call__(self, loop: LoopState) -> None:
        self.checkpoints.check()
        train_config = self.run.config.train
        # One answer for saving and stopping: a signal after the save stops the run at the next step, with
        # a checkpoint of that step.
        loop.stop_requested = self.shutdown_flag.is_set() and loop.step < train_config.steps
        if loop.stop_requested or is_due(loop.step, train_config.save_every, train_config.steps):
            self.metric_logger.flush(loop)
            self.checkpoints.save(loop.step, loop.state)
            self.heartbeat()


@dataclass
class PreemptionHook:
    """End the run after a signal, once its checkpoint is written."""

    run: RunContext
    checkpoints: Checkpoints

    def __call__(self, loop: LoopState) -> None:
        if loop.stop_requested:
            self.checkpoints.wait()
            raise preemption_error(self.run, loop.step)


@dataclass(frozen=True)
class Hooks:
    """The hooks of a run in order, and those that are also used outside of the loop."""

    metric_logger: MetricLogger
    evaluator: Evaluator
    in_order: tuple[Hook, ...]


def make_hooks(
    run: RunContext,
    checkpoints: Checkpoints,
    metric_writer: MetricWriter,
    shutdown_flag: ShutdownFlag,
    heartbeat: Callable[[], None],
) -> Hooks:
    """Return the hooks of a run: log, watchdog, evaluate, save, stop."""

    def watchdog(_: Any) -> None:
        heartbeat()

    metric_logger = MetricLogger(run, metric_writer)
    evaluator = Evaluator(run, metric_writer, metric_logger, shutdown_flag, heartbeat)
    saver = CheckpointSaver(run, checkpoints, metric_logger, shutdown_flag, heartbeat)
    preemption = PreemptionHook(run, checkpoints)
    return Hooks(metric_logger, evaluator, (metric_logger, watchdog, evaluator, saver, preemption))
