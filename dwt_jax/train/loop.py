"""Pre-training from a config: read it from top to bottom."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax.config import Config
from dwt_jax.config_loader import config_to_dict
from dwt_jax.data.dataset import batch_iterator
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import local_row_indices, make_global_batch, replicated_sharding, to_global
from dwt_jax.distributed.shutdown import Preempted, handle_signals
from dwt_jax.distributed.watchdog import hang_watchdog
from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json
from dwt_jax.logs import logger
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metric_writer import MetricWriter
from dwt_jax.runs.run_dir import checkpoint_dir, run_lock
from dwt_jax.runs.teacher import LoadedTeacher, shard_params
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.train.accounting import get_teacher_end_step
from dwt_jax.train.hooks import Hooks, LoopState, is_due, make_hooks, preemption_error
from dwt_jax.train.initialize import copied_mask_for_warmup
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.run_state import init_or_restore_state
from dwt_jax.train.setup import setup_run
from dwt_jax.train.step import jit_train_step
from dwt_jax.train.summary import export_and_summarize, log_run_summary


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Pre-train a model in `workdir`, or resume where the run stopped.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: the config does not fit the data, the teacher, the devices or the existing run.
            Nothing is written in this case.
        Preempted: after a signal, with everything saved.
        TrainingFailed: losses stayed non-finite.
    """
    with handle_signals() as shutdown_flag, ExitStack() as stack:
        coordination.run_on_main(lambda: stack.enter_context(run_lock(workdir)) and None)
        run = setup_run(config, workdir)  # resolved config, data, teacher, mesh, step configs
        if (summary := coordination.run_on_main(lambda: _finished_summary(run))) is not None:
            return summary
        train_config = run.config.train
        checkpoints = Checkpoints(checkpoint_dir(workdir, run.config), train_config.keep_checkpoints)
        state, start_step = init_or_restore_state(run, checkpoints)
        heartbeat = stack.enter_context(hang_watchdog(train_config.watchdog))
        is_main = coordination.process_index() == 0
        metric_writer = MetricWriter(
            workdir, train_config, start_step, workdir.name, is_main, config_to_dict(run.config)
        )
        try:
            log_run_summary(run, state, start_step, metric_writer)
            start_time = time.perf_counter()
            shutdown_flag.arm()
            teacher_end = get_teacher_end_step(run, state.teacher_gap.matched_step, start_step)
            loop = LoopState(state, start_step, teacher_end)
            hooks = make_hooks(run, checkpoints, metric_writer, shutdown_flag, heartbeat)
            evaluate_if_missed(run, loop, hooks)
            train_loop(run, loop, hooks, metric_writer)
            eval_metrics = hooks.evaluator.evaluate(loop)
            checkpoints.save(loop.step, loop.state)
            checkpoints.wait()
            heartbeat()
            if eval_metrics is None:
                raise Preempted(
                    f"{workdir}: stopped in the final evaluation; checkpoint saved. "
                    "Rerun the same command to resume."
                )
            seconds = time.perf_counter() - start_time
            return export_and_summarize(run, loop.state, loop.teacher_steps, eval_metrics, seconds)
        finally:
            metric_writer.close()
            checkpoints.close()


def _finished_summary(run: RunContext) -> dict[str, Any] | None:
    """The summary of a complete run; None if the run is incomplete, or its summary or model is lost."""
    path = run.workdir / "summary.json"
    summary = read_intact_json(path)
    if summary is None:
        if path.exists():
            logger.warning(f"{run.workdir}: summary.json is damaged; it is rewritten")
        return None
    if (run.workdir / "model").exists():
        logger.info(f"{run.workdir}: already finished")
        return summary
    directory = checkpoint_dir(run.workdir, run.config)
    if not (directory.exists() and any(step.name.isdigit() for step in directory.iterdir())):
        raise UserError(
            f"{run.workdir}: a finished run without model/ and without checkpoints, expected one of them; "
            "its metrics are kept: train again in a new --workdir"
        )
    logger.warning(f"{run.workdir}: model/ is missing; it is rewritten")
    return None


def evaluate_if_missed(run: RunContext, loop: LoopState, hooks: Hooks) -> None:
    """Evaluate at the step that the run resumes from, if the stopped run did not."""
    if loop.step == 0 or not is_due(loop.step, run.config.train.eval_every, run.config.train.steps):
        return
    if hooks.evaluator.evaluate(loop) is None:
        raise preemption_error(run, loop.step)


def train_loop(run: RunContext, loop: LoopState, hooks: Hooks, metric_writer: MetricWriter) -> None:
    """Take all steps from `loop.step` on, each followed by the hooks. Updates `loop`.

    Implicit transfers between host and devices raise an error.
    """
    last_step = run.config.train.steps
    no_teacher_step = jit_train_step(run.no_teacher_config, run.mesh)
    distill_step = jit_train_step(run.step_config, run.mesh)
    use_teacher = run.teacher is not None and loop.step < loop.teacher_end_step
    cache = run.teacher if isinstance(run.teacher, CachedTeacher) else None
    teacher_params = None
    if use_teacher and isinstance(run.teacher, LoadedTeacher):
        teacher_params = shard_params(run.teacher, run.mesh)
    replicated = replicated_sharding(run.mesh)
    seed = to_global(np.uint32(run.config.seed), replicated)
    copied_mask = copied_mask_for_warmup(run.config, run.growth.plan if run.growth else None, run.mesh)
    local_rows = {size: local_row_indices(run.mesh, size) for size in set(run.batch_sizes.tolist())}
    batches = batch_iterator(
        run.rows,
        run.config.seed,
        run.batch_sizes,
        loop.step,
        last_step,
        slice(None) if coordination.is_single_process() else local_rows,
        run.config.data.prefetch,
    )
    with jax.transfer_guard("disallow"):
        for step in range(loop.step, last_step):
            if use_teacher and step >= loop.teacher_end_step:
                metric_writer.log_message(
                    f"step {step}: alpha_soft is 0 from here on; continuing without the teacher"
                )
                use_teacher, teacher_params = False, None
            wait_start = time.perf_counter()
            batch = next(batches)
            batch_size = int(run.batch_sizes[step])
            rows = local_rows[batch_size]
            teacher: Any = teacher_params
            if use_teacher and cache is not None:
                teacher = make_global_batch(cache.sample(step, rows), rows, run.mesh, batch_size)
            loop.throughput.wait += time.perf_counter() - wait_start
            device_batch = make_global_batch(batch, rows, run.mesh, batch_size)
            schedules = to_global(run.schedules[step], replicated)
            loop.with_teacher = use_teacher
            train_step = distill_step if loop.with_teacher else no_teacher_step
            loop.state, loop.metrics = train_step(
                loop.state, teacher, device_batch, schedules, seed, copied_mask
            )
            loop.step = step + 1
            loop.num_tokens = int((batch.segment_ids > 0).sum() * batch_size / len(rows))
            for hook in hooks.in_order:
                hook(loop)
        hooks.metric_logger.flush(loop)
