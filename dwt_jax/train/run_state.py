"""The training state of a run on its mesh, initial or restored, and its effective parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Optimizer
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.files import write_json
from dwt_jax.models import family
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.gates import gate_schedule, has_gates, open_gates
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.state import TrainState, abstract_state, init_train_state
from dwt_jax.runs.teacher import LoadedTeacher, shard_params
from dwt_jax.train.initialize import init_from_source
from dwt_jax.train.ligo_training import LigoConfig, train_ligo_maps
from dwt_jax.train.run_context import RunContext


def init_or_restore_state(run: RunContext, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Restore the newest intact checkpoint, or initialise the state if there is none.

    Returns:
        (the state on the mesh, the number of steps it has completed).

    Raises:
        UserError: no checkpoint can be read, or a grown run has lost its first one.
    """
    target = sharded_abstract_state(run)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    state_and_step = checkpoints.restore(target)
    if state_and_step is None:
        return _init_state(run, shardings), 0
    state, step = state_and_step
    # Once through jit: buffers that XLA allocated can be donated, those that Orbax allocated perhaps not.
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)(state), step


def sharded_abstract_state(run: RunContext) -> TrainState:
    """Return shapes, dtypes and shardings of the state of a run."""
    abstract = abstract_state(run.config.model, run.config.optimizer)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        infer_shardings(abstract, run.config.model, run.mesh),
    )


def effective_params(run: RunContext, params: Params, step: int) -> Params:
    """Return the parameters that the model uses after `step` steps, with its gates applied."""
    if not has_gates(run.config.model):
        return params
    init = run.config.init
    gate = gate_schedule(step, run.config.train.steps, init.gate_warmup, init.step)
    shardings = infer_shardings(params, run.config.model, run.mesh)
    device_gate = to_global(gate, replicated_sharding(run.mesh))
    return jax.jit(open_gates, out_shardings=shardings)(params, device_gate)


def _init_state(run: RunContext, shardings: TrainState) -> TrainState:
    """Return the state before the first step, of a new model or a grown one."""
    model, optimizer = run.config.model, run.step_config.optimizer  # without its schedule
    if run.growth is None:
        seed = to_global(np.uint32(run.config.seed), replicated_sharding(run.mesh))
        return _jit_init_new(model, optimizer, run.mesh)(seed)
    if run.growth.step:
        raise UserError(
            f"{run.workdir}: no checkpoint, expected that of step {run.growth.step} that dwt remap-run "
            "wrote: run dwt remap-run again, with a new --out"
        )
    params = _init_with_ligo(run) if run.growth.uses_ligo else init_from_source(run.growth, run.mesh)
    init = jax.jit(lambda params: init_train_state(params, model, optimizer), out_shardings=shardings)
    return init(params)


@functools.cache
def _jit_init_new(model: ModelConfig, optimizer: Optimizer, mesh: jax.sharding.Mesh) -> Any:
    """Return the jitted (seed) → state of a new model. Runs of all seeds share its compilation."""

    def init_new(seed: jax.Array) -> TrainState:
        return init_train_state(family(model).init_params(model, jax.random.key(seed)), model, optimizer)

    shardings = infer_shardings(abstract_state(model, optimizer), model, mesh)
    return jax.jit(init_new, out_shardings=shardings)


def _init_with_ligo(run: RunContext) -> Params:
    """Grow the source by trained maps, and record their training in init.json."""
    assert run.growth is not None
    teacher = run.teacher if isinstance(run.teacher, LoadedTeacher) else None  # config_checks: no cache
    params, record = train_ligo_maps(
        run,
        run.growth.source.params,
        run.growth.source.model,
        teacher_params=shard_params(teacher, run.mesh) if teacher else None,
        settings=LigoConfig(steps=run.config.init.learning_steps),
    )
    path = run.workdir / "init.json"
    coordination.run_on_main(lambda: write_json(path, {"ligo": dataclasses.asdict(record)}))
    return params
