"""Grow a run in the middle of its training: its state after some step becomes that of a larger student.

The new run continues with the next step of the same data stream. Batches, masks and schedules are
functions of the step, so this module only makes the state (parameters, moments, step) and
a record of its source, `init.json`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dwt_jax.config import Config
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.data.batch_ramp import count_rows
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir, commit_dir, read_json, resolve_output_dir, user_path, write_json
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap.apply import grow_params
from dwt_jax.remap.gates import drop_gates, fold_gates, gate_schedule, has_gates
from dwt_jax.remap.optimizer_state import grow_opt_state, moment_states, replace_moment_states
from dwt_jax.remap.report import RemapReport
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.runs.pretrained import PretrainedModel, params_digest
from dwt_jax.runs.run_dir import RESUME_MUTABLE_KEYS, checkpoint_dir, read_run_config
from dwt_jax.runs.state import TrainState, init_train_state
from dwt_jax.train.accounting import flops_so_far, get_teacher_end_step
from dwt_jax.train.initialize import (
    GrowthSource,
    growth_report,
    plan_student_growth,
    probe_rows,
    source_training_flops,
)
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.run_state import effective_params, sharded_abstract_state
from dwt_jax.train.setup import setup_run

Moments = Literal["reset", "carry", "asymmetric"]

DATA_STREAM_KEYS = ("seed", "data", "mlm.", "train.batch_size")
"""Config keys (prefixes) that determine the next batches and their masks."""


def grow_run(run_path: str, config: Config, out: Path, step: int | None, moments: Moments) -> RemapReport:
    """Write a run that continues another one with a larger model (`dwt remap-run`).

    Args:
        run_path: directory of the run to grow.
        config: config of the larger run; its `init` has the method and its options.
        out: directory of the new run.
        step: checkpoint of the run to grow; the next step of the new run follows it. None: the latest.
        moments: how the optimizer's moments are grown, see remap.optimizer_state.grow_opt_state.

    Returns:
        The report of the growth.

    Raises:
        UserError: a different seed, data, masking or batch size, a different `optimizer.kind` whose moments
            are not reset, `train.steps` not above `step`, or with which a batch ramp has had other rows by
            `step`, or sizes that the method does not support. Nothing is written then (except run.json in a
            train.checkpoint_path).
    """
    out = resolve_output_dir(out)
    source_run, source_state, step = _restore_source_run(user_path(run_path), config, step)
    params, model, optimizer_states = _source_model(source_run, source_state, step)
    init = dataclasses.replace(config.init, from_=run_path, step=step)
    source_flops = flops_so_far(
        source_run,
        step,
        min(step, get_teacher_end_step(source_run, source_state.teacher_gap.matched_step, step)),
    )

    def load_source(resolved_config: Config, *_: Any) -> GrowthSource:
        pretrained_model = PretrainedModel(params, model, params_digest(jax.device_get(params)), None)
        return GrowthSource(
            run_path,
            pretrained_model,
            plan_student_growth(resolved_config, model),
            step,
            **source_flops,
        )

    with atomic_dir(out) as partial:
        run = setup_run(dataclasses.replace(config, init=init), partial, load_source)
        _check_same_data_stream(run, source_run, run_path)
        if moments != "reset":
            _check_same_optimizer(run, source_run, run_path)
        assert run.growth is not None
        grown_state = _grow_state(run, run.growth, optimizer_states, moments)
        if run.teacher and source_run.teacher and run.teacher.digest == source_run.teacher.digest:
            grown_state = dataclasses.replace(grown_state, teacher_gap=source_state.teacher_gap)
        report = growth_report(run.growth, grown_state.params, probe_rows(run.rows, run.config.seed))
        _save_first_checkpoint(run, partial, step, grown_state)
        record = {
            "from": run_path,
            "moments": moments,
            "source": config_to_dict(model),
            "digest": run.growth.source.digest,
            "training_flops": _inherited_flops(run, source_run),
            **source_flops,
        }
        write_json(partial / "init.json", {**record, **report.to_dict()})
        if not commit_dir(partial, out):
            raise UserError(f"--out: {out} is not empty; expected a new or empty directory")
    return report


def _save_first_checkpoint(run: RunContext, workdir: Path, step: int, state: TrainState) -> None:
    checkpoints = Checkpoints(checkpoint_dir(workdir, run.config), run.config.train.keep_checkpoints)
    try:
        if saved_steps := checkpoints.steps():
            directory = checkpoints.directory
            raise UserError(
                f"config: train.checkpoint_path: {directory} holds {saved_steps}, expected no checkpoints"
            )
        checkpoints.save(step, state)
        checkpoints.wait()
    finally:
        checkpoints.close()


def _restore_source_run(path: Path, config: Config, step: int | None) -> tuple[RunContext, TrainState, int]:
    """The source run on config's mesh, its state and the step of the state."""
    if not (path / "config.json").exists() or not (path / "run.json").exists():
        raise UserError(f"--run: {path} is not a run with checkpoints, expected the directory of such a run")
    source_run = setup_run(
        dataclasses.replace(read_run_config(path), mesh=config.mesh, platform=config.platform), path
    )
    checkpoints = Checkpoints(
        checkpoint_dir(path, source_run.config), source_run.config.train.keep_checkpoints, read_only=True
    )
    try:
        saved_steps = checkpoints.steps()
        if not saved_steps or (step is not None and step not in saved_steps):
            raise UserError(
                f"--step is {'the newest' if step is None else step}, expected a checkpoint that {path} "
                f"keeps: {', '.join(map(str, saved_steps)) or 'none'}"
            )
        state_and_step = checkpoints.restore(sharded_abstract_state(source_run), step)
    finally:
        checkpoints.close()
    assert state_and_step is not None  # saved_steps is not empty
    return source_run, *state_and_step


def _source_model(source_run: RunContext, state: TrainState, step: int) -> tuple[Any, ModelConfig, list[Any]]:
    """Parameters, model and moments after `step` steps, without gates if they are open by then."""
    config = source_run.config
    params, model, optimizer_states = (
        effective_params(source_run, state.params, step),
        config.model,
        moment_states(state.opt_state),
    )
    gate_value = gate_schedule(step, config.train.steps, config.init.gate_warmup, config.init.step)
    if has_gates(model) and gate_value == 1:
        params, model = fold_gates(params, model)
        optimizer_states = [
            node._replace(**{field: drop_gates(value) for field, value in node._asdict().items()})
            for node in optimizer_states
        ]
    return params, model, optimizer_states


def _grow_state(
    run: RunContext, growth: GrowthSource, optimizer_states: list[Any], moments: Moments
) -> TrainState:
    """The state of the larger student, sharded on the mesh."""

    def build(params: Any, optimizer_states: list[Any]) -> TrainState:
        state = init_train_state(grow_params(growth.plan, params), run.config.model, run.config.optimizer)
        opt_state = state.opt_state
        if moments != "reset":
            opt_state = replace_moment_states(
                opt_state, grow_opt_state(growth.plan, optimizer_states, moments)
            )
        return dataclasses.replace(state, opt_state=opt_state, step=jnp.int32(growth.step))

    layout = jax.tree.map(lambda x: x.sharding, sharded_abstract_state(run))
    return jax.jit(build, out_shardings=layout)(growth.source.params, optimizer_states)


def _check_same_data_stream(run: RunContext, source_run: RunContext, path: str) -> None:
    """Reject a config that changes the next batches or masks of the source run."""
    new_values, source_values = (
        {"data": _data_digest(x), **flatten_dict(config_to_dict(x.config))} for x in (run, source_run)
    )
    for key in {**new_values, **source_values}:
        new_value, source_value = new_values.get(key), source_values.get(key)
        if (
            key.startswith(DATA_STREAM_KEYS)
            and not key.startswith(RESUME_MUTABLE_KEYS)
            and new_value != source_value
        ):
            raise UserError(f"config: {key} is {new_value!r}, expected {source_value!r} as in {path}")
    step, train, source_train = run.config.init.step, run.config.train, source_run.config.train
    num_rows, source_rows = count_rows(train, step), count_rows(source_train, step)
    if num_rows != source_rows:  # the stages of a ramp are shares of train.steps: other keys, the same rows
        raise UserError(
            f"config: train.batch_ramp is {list(train.batch_ramp)} over {train.batch_ramp_fraction} of "
            f"{train.steps} steps, expected the {source_rows} rows of the first {step} steps of {path}, "
            f"found {num_rows}"
        )


def _check_same_optimizer(run: RunContext, source_run: RunContext, path: str) -> None:
    kind, source_kind = run.config.optimizer.kind, source_run.config.optimizer.kind
    if kind != source_kind:
        raise UserError(
            f"config: optimizer.kind is {kind!r}, expected {source_kind!r} as in {path} (or --moments=reset)"
        )


def _data_digest(run: RunContext) -> str:
    return str(read_json(run.data / "index.json")["digest"])


def _inherited_flops(run: RunContext, source_run: RunContext) -> float | None:
    """Pre-training FLOPs that the source run inherited, without those that the new teacher includes."""
    same_teacher = run.teacher and source_run.teacher and run.teacher.digest == source_run.teacher.digest
    teacher_flops = 0.0 if same_teacher or not source_run.teacher else source_run.teacher.training_flops
    source_flops = (
        source_training_flops(source_run.growth, source_run.workdir, source_run.teacher, run.teacher)
        if source_run.growth
        else 0.0
    )
    return sum_or_none(teacher_flops, source_flops)
