"""Pre-training from a config: read it from top to bottom."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax import __version__
from dwt_jax.config import Config
from dwt_jax.data import dataset as data_rows
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import (
    local_row_indices,
    make_global_batch,
    replicated_sharding,
    to_global,
    to_host,
)
from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag, TrainingFailed, handle_signals
from dwt_jax.distributed.watchdog import hang_watchdog
from dwt_jax.eval import likelihood
from dwt_jax.files import read_json, write_json
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.runs import run_dir as workdirs
from dwt_jax.runs import teacher as teachers
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metric_writer import MetricWriter, ThroughputMeter
from dwt_jax.runs.metrics_file import read_jsonl, total_flops
from dwt_jax.runs.peak_flops import peak_flops_per_device
from dwt_jax.runs.state import TrainState
from dwt_jax.text_format import format_count
from dwt_jax.train import initialize as starts
from dwt_jax.train.setup import RunContext, effective_params, init_or_restore_state, setup_run
from dwt_jax.train.step import jit_train_step


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Pre-train what `config` says in `workdir`, or go on where it stopped. → summary.json

    Raises UserError before anything is written if the config does not fit the data, the
    teacher, the devices or the run that is already there; Preempted after a signal;
    TrainingFailed when losses stay non-finite.
    """
    with handle_signals() as shutdown_flag, ExitStack() as stack:
        coordination.run_on_main(lambda: stack.enter_context(workdirs.run_lock(workdir)) and None)
        run = setup_run(config, workdir)
        if (summary := coordination.run_on_main(lambda: _finished_summary(workdir))) is not None:
            return summary
        checkpoints = Checkpoints(
            workdirs.checkpoint_dir(workdir, run.config), run.config.train.keep_checkpoints
        )
        state, start_step = init_or_restore_state(run, checkpoints)
        heartbeat = stack.enter_context(hang_watchdog(run.config.train.watchdog))
        metric_writer = MetricWriter(
            workdir, run.config.train, start_step, workdir.name, coordination.process_index() == 0
        )
        try:
            log_run_summary(run, state, start_step, metric_writer)
            start_time = time.perf_counter()
            shutdown_flag.arm()
            state, teacher_steps = train_loop(
                run, state, start_step, checkpoints, metric_writer, shutdown_flag, heartbeat
            )
            eval_metrics = evaluate(
                run,
                state.params,
                run.config.train.steps,
                teacher_steps,
                metric_writer,
                shutdown_flag,
                heartbeat,
            )
            checkpoints.save(run.config.train.steps, state)
            checkpoints.wait()
            heartbeat()
            return export_and_summarize(
                run, state, teacher_steps, eval_metrics, time.perf_counter() - start_time
            )
        finally:
            metric_writer.close()
            checkpoints.close()


def _finished_summary(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is whole."""
    if not (workdir / "summary.json").exists():
        return None
    print(f"{workdir}: already finished", flush=True)
    return read_json(workdir / "summary.json")


def log_run_summary(run: RunContext, state: TrainState, start_step: int, metric_writer: MetricWriter) -> None:
    model, train_config, device = run.config.model, run.config.train, jax.devices()[0]
    num_params = sum(x.size for x in jax.tree.leaves(family(model).abstract_params(model)))
    metric_writer.log_message(
        f"{jax.device_count()} {device.platform} device(s) ({device.device_kind}), "
        f"{run.policy.compute_dtype}; "
        f"student {model.num_hidden_layers} x {model.hidden_size}, {format_count(num_params)} parameters; "
        f"{train_config.steps} steps of {train_config.batch_size} x {run.config.data.sequence_length} tokens"
    )
    if run.growth is not None:
        log_growth_source(run, run.growth, state.params, start_step, metric_writer)
    if run.teacher is None:
        metric_writer.log_message("no teacher: training on the masked-LM loss only")
    else:
        metric_writer.log_message(
            f"teacher {run.teacher.model.num_hidden_layers} x {run.teacher.model.hidden_size} from "
            f"{run.config.teacher.path}: +{run.teacher_flops / run.student_flops:.0%} FLOPs per step"
        )
        if run.teacher_end_step == 0:
            metric_writer.log_message("the teacher is not used: distill.alpha_soft is 0 at every step")
        elif start_step >= get_teacher_end_step(run, state.teacher_gap.matched_step, start_step):
            metric_writer.log_message("the teacher is no longer used: alpha_soft is 0 from here on")
    if start_step:
        metric_writer.log_message(f"resumed at step {start_step}")


def log_growth_source(
    run: RunContext, growth: starts.GrowthSource, params: Any, step: int, metric_writer: MetricWriter
) -> None:
    """Say what the student is grown from; before its first step `init.json` tells all of it."""
    if step:
        metric_writer.log_message(
            starts.format_growth_line(growth, starts.growth_report(growth, params, None))
        )
        return
    params = params if coordination.is_single_process() else to_host(params)

    def write_report() -> None:
        report = starts.growth_report(growth, params, starts.probe_rows(run.rows, run.config.seed))
        metric_writer.log_message(starts.format_growth_line(growth, report))
        path = run.workdir / "init.json"
        ligo_record = {"learned": read_json(path)["learned"]} if growth.uses_ligo else {}
        write_json(path, {"from": growth.path, **ligo_record, **report.to_dict()})

    coordination.run_on_main(write_report)


def train_loop(
    run: RunContext,
    state: TrainState,
    start_step: int,
    checkpoints: Checkpoints,
    metric_writer: MetricWriter,
    shutdown_flag: ShutdownFlag,
    heartbeat: Callable[[], None],
) -> tuple[TrainState, int]:
    """All steps from `start` on. → the last state, the number of steps the teacher took part in.

    The metrics of a step are read while the next one runs. A checkpoint is written after the
    metrics and the evaluation of its step, so that a resumed run never lacks them.
    """
    train_config, throughput = run.config.train, ThroughputMeter()
    no_teacher_step, distill_step = (
        jit_train_step(run.no_teacher_config, run.mesh),
        jit_train_step(run.step_config, run.mesh),
    )
    peak_flops = peak_flops_per_device(str(run.policy.compute_dtype))
    teacher_end = get_teacher_end_step(run, state.teacher_gap.matched_step, start_step)
    teacher_params = (
        teachers.shard_params(run.teacher, run.mesh) if run.teacher and start_step < teacher_end else None
    )
    seed = to_global(np.uint32(run.config.seed), replicated_sharding(run.mesh))
    copied_mask = starts.copied_mask_for_warmup(run.config, run.growth.plan if run.growth else None, run.mesh)
    local_rows = local_row_indices(run.mesh, train_config.batch_size)
    batches = data_rows.batch_iterator(
        run.rows,
        run.config.seed,
        train_config.batch_size,
        start_step,
        train_config.steps,
        slice(None) if coordination.is_single_process() else local_rows,
        run.config.data.prefetch,
    )
    pending: tuple[int, dict[str, Any]] | None = None

    def flush() -> None:
        nonlocal pending
        if pending:
            log_metrics(run, *pending, min(pending[0], teacher_end), throughput, peak_flops, metric_writer)
        pending = None

    eval_pending = start_step > 0 and is_due(
        start_step, train_config.eval_every, train_config.steps
    )  # stopped before its evaluation
    if eval_pending:
        eval_metrics = evaluate(
            run,
            state.params,
            start_step,
            min(start_step, teacher_end),
            metric_writer,
            shutdown_flag,
            heartbeat,
        )
        if eval_metrics is None:
            raise preemption_error(run, start_step)
    with jax.transfer_guard("disallow"):
        for step in range(start_step, train_config.steps):
            if teacher_params is not None and step >= teacher_end:
                metric_writer.log_message(
                    f"step {step}: alpha_soft is 0 from here on; continuing without the teacher"
                )
                teacher_params = None
            wait_start = time.perf_counter()
            batch = next(batches)
            throughput.wait += time.perf_counter() - wait_start
            device_batch = make_global_batch(batch, local_rows, run.mesh, train_config.batch_size)
            schedules = to_global(run.schedules[step], replicated_sharding(run.mesh))
            train_step = no_teacher_step if teacher_params is None else distill_step
            state, metrics = train_step(state, teacher_params, device_batch, schedules, seed, copied_mask)
            flush()
            heartbeat()
            throughput.add(int((batch.segment_ids > 0).sum() * train_config.batch_size / len(local_rows)))
            completed_steps = step + 1
            if is_due(completed_steps, train_config.log_every, 0) or completed_steps == train_config.steps:
                pending = completed_steps, metrics
                if run.step_config.until_matched and teacher_params is not None:
                    teacher_end = get_teacher_end_step(run, metrics["teacher_matched_step"], completed_steps)
            if (
                is_due(completed_steps, train_config.eval_every, train_config.steps)
                and not shutdown_flag.is_set()
            ):
                flush()
                evaluate(
                    run,
                    state.params,
                    completed_steps,
                    min(completed_steps, teacher_end),
                    metric_writer,
                    shutdown_flag,
                    heartbeat,
                )
                throughput.restart()
            if is_due(completed_steps, train_config.save_every, train_config.steps) or (
                shutdown_flag.is_set() and completed_steps < train_config.steps
            ):
                flush()
                checkpoints.save(completed_steps, state)
                heartbeat()
            if shutdown_flag.is_set() and completed_steps < train_config.steps:
                checkpoints.wait()
                raise preemption_error(run, completed_steps)
        flush()
    return state, min(teacher_end, train_config.steps)


def preemption_error(run: RunContext, step: int) -> Preempted:
    return Preempted(
        f"{run.workdir}: stopped at step {step}; checkpoint saved. Rerun the same command to resume."
    )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps happens after this one; the last
    step has its own ending."""
    return bool(every) and step % every == 0 and step != last


def get_teacher_end_step(run: RunContext, teacher_matched_step: jax.Array, step: int) -> int:
    """The step from which the teacher is not needed, as known after `step` steps.

    `until_matched` is acted upon only where metrics are logged, so that a resumed run
    switches at the same step as one that was never stopped.
    """
    if not run.teacher:
        return 0
    matched_step = int(jax.device_get(teacher_matched_step))
    if run.step_config.until_matched and matched_step >= 0:
        every = run.config.train.log_every
        switch_step = (matched_step // every + 1) * every
        return switch_step if switch_step <= step else run.teacher_end_step
    return run.teacher_end_step


def log_metrics(
    run: RunContext,
    step: int,
    metrics: dict[str, Any],
    teacher_steps: int,
    throughput: ThroughputMeter,
    peak_flops: float | None,
    metric_writer: MetricWriter,
) -> None:
    """Write the metrics of a step. Raises TrainingFailed after too many non-finite ones in a row."""
    train_config = run.config.train
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    schedules = run.schedules[step - 1]
    steps_per_second, tokens_per_second, data_wait = throughput.read_and_reset()
    with_teacher = teacher_steps == step
    step_flops = run.student_flops + (run.teacher_flops if with_teacher else 0)
    record = {
        "step": step,
        "loss": values["loss"],
        "hard_loss": values["hard_loss"],
        **{key: values[key] if with_teacher else None for key in _TEACHER_METRICS},
        "alpha_hard": float(schedules.alpha_hard),
        "alpha_soft": values["alpha_soft"] if with_teacher else 0.0,
        "temperature": float(schedules.temperature),
        "learning_rate": float(schedules.learning_rate),
        **{
            name: float(value)
            for name in ("gate", "new_param_scale")
            if (value := getattr(schedules, name)) is not None
        },
        "grad_norm": values["grad_norm"],
        "skipped": values["skipped"],
        "tokens_per_second": tokens_per_second,
        "mfu": steps_per_second * step_flops / (peak_flops * jax.device_count()) if peak_flops else None,
        "data_wait": data_wait,
        **flops_so_far(run, step, teacher_steps),
    }
    metric_writer.log_step(
        record, (train_config.steps - step) / steps_per_second if steps_per_second else 0.0
    )
    if values["max_consecutive_skips"] >= train_config.max_consecutive_nonfinite:
        raise TrainingFailed(
            f"{run.workdir}: loss or gradient not finite for {values['max_consecutive_skips']} consecutive "
            f"steps (up to step {step}); those updates were skipped and the checkpoints are intact"
        )


_TEACHER_METRICS = ("soft_loss", "soft_loss_at_1", "teacher_hard_loss", "selected_share")


def flops_so_far(run: RunContext, step: int, teacher_steps: int) -> dict[str, float]:
    """FLOPs up to `step`, of which the teacher took part in the first `taught`; those of a run that was
    grown into this one are among them."""
    source_steps = run.growth.step if run.growth else 0
    source_flops = (run.growth.student_flops, run.growth.teacher_flops) if run.growth else (0.0, 0.0)
    return {
        "student_flops": source_flops[0] + (step - source_steps) * run.student_flops,
        "teacher_flops": source_flops[1] + max(0, teacher_steps - source_steps) * run.teacher_flops,
    }


def evaluate(
    run: RunContext,
    params: Any,
    step: int,
    teacher_steps: int,
    metric_writer: MetricWriter,
    shutdown_flag: ShutdownFlag,
    heartbeat: Callable[[], None],
) -> dict[str, float] | None:
    """Held-out loss after `step` steps, recorded; what was recorded before is not done again.
    None if a signal stopped it."""
    path = run.workdir / "evaluations.jsonl"
    if record := coordination.run_on_main(
        lambda: next((entry for entry in read_jsonl(path) if entry["step"] == step), None)
    ):
        return record

    def should_stop() -> bool:
        heartbeat()
        return shutdown_flag.is_set()

    document_losses = likelihood.losses_per_document(
        effective_params(run, params, step),
        run.config.model,
        run.data,
        mesh=run.mesh,
        policy=run.policy,
        should_stop=should_stop,
    )
    if document_losses is None:
        return None
    if step == run.config.train.steps and coordination.process_index() == 0:
        likelihood.write_document_losses(run.workdir / "documents.npz", document_losses)
    record = {
        "step": step,
        **likelihood.summarize_losses(document_losses),
        **flops_so_far(run, step, teacher_steps),
    }
    metric_writer.log_evaluation(record)
    return record


def export_and_summarize(
    run: RunContext,
    state: TrainState,
    teacher_steps: int,
    eval_metrics: dict[str, float] | None,
    seconds: float,
) -> dict[str, Any]:
    """Write `model/`, then `summary.json`: the sign that the run is whole."""
    if eval_metrics is None:
        raise Preempted(
            f"{run.workdir}: stopped in the final evaluation; checkpoint saved. "
            "Rerun the same command to resume."
        )
    steps = run.config.train.steps
    total_work = flops_so_far(run, steps, teacher_steps)
    summary = {
        "steps": steps,
        "held_out": eval_metrics,
        "skipped_updates": int(jax.device_get(state.skipped.total)),
        "seconds_of_this_process": seconds,
        "flops": {
            "student": total_work["student_flops"],
            "teacher_forward": total_work["teacher_flops"],
            "total": total_flops(total_work),
            "teacher_training": run.teacher.training_flops if run.teacher else 0.0,
            **(
                {"source_training": starts.source_training_flops(run.growth, run.workdir, run.teacher)}
                if run.growth
                else {}
            ),
        },
        "teacher_steps": max(0, teacher_steps - run.config.init.step),
        "teacher": _model_sizes(run.teacher.model) if run.teacher else None,
        **({"init": _init_summary(run.growth)} if run.growth else {}),
        "data": _data_sizes(run),
        "versions": {"dwt_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "compute": str(run.policy.compute_dtype),  # what precision.compute_dtype=auto came to
    }
    params = to_host(effective_params(run, state.params, steps))

    def save_model() -> None:
        checkpoint.save_checkpoint(
            params,
            run.config.model,
            run.workdir / "tokenizer",
            run.workdir / "model",
            card=model_card.run_card(run.config, ["mlm"], summary, steps),
        )
        write_json(run.workdir / "summary.json", summary)

    coordination.run_on_main(save_model, "process 0 to write the model")
    return summary


def _model_sizes(model: ModelConfig) -> dict[str, int]:
    return {"num_hidden_layers": model.num_hidden_layers, "hidden_size": model.hidden_size}


def _init_summary(growth: starts.GrowthSource) -> dict[str, Any]:
    step_entry = {"step": growth.step} if growth.step else {}
    return {
        "method": growth.plan.method.name,
        "function_preserving": growth.plan.function_preserving and not growth.uses_ligo,
        **step_entry,
        **_model_sizes(growth.source.model),
    }


def _data_sizes(run: RunContext) -> dict[str, int]:
    index = read_json(run.data / "index.json")
    return {
        f"{split}_{unit}": index["splits"][split][unit]
        for split in ("train", "held_out")
        for unit in ("documents", "tokens")
    }
