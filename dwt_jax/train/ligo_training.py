"""Train the maps of remap/ligo.py for some steps on the run's own objective.

Wang et al. 2023 (arXiv 2303.00980, section 3.2): minimise the loss of the grown model with respect to the
maps for about 100 steps, with the small model's parameters fixed; then train the grown model as usual.
Targets, weights and teacher are those of the run's first steps (train/step.py). Every batch is a full batch
of `train.batch_size` rows, without the run's batch ramp.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.data.batch import Batch
from dwt_jax.data.dataset import batch_iterator, get_batch, open_dataset
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.models import family, flops
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives import objective_module
from dwt_jax.objectives.distillation import LossWeights
from dwt_jax.objectives.targets import EVALUATION_SEED, row_keys
from dwt_jax.remap import ligo
from dwt_jax.remap.optimizer_state import copied_entry_mask
from dwt_jax.remap.plan import Plan
from dwt_jax.runs.state import abstract_state
from dwt_jax.runs.teacher import TeacherParams
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.step import (
    LossAndSums,
    Microbatch,
    StepConfig,
    accumulate_gradients,
    jit_train_step,
    loss_fn,
    make_microbatch,
)
from dwt_jax.train.step_schedules import StepSchedules

LigoInputs = tuple[Params, TeacherParams | None]
"""Parameters of the small model, and of the teacher if there is one: neither is trained."""
LigoState = tuple[ligo.Maps, optax.OptState]


@dataclass(frozen=True)
class LigoConfig:
    """Settings of the training of maps. docs/remapping.md explains the learning rate."""

    steps: int = 100  # the paper's number
    learning_rate: float = 1e-4  # of Adam; falls to 0 along a cosine
    noise: float = 0.001  # of the initial maps, see ligo.init_maps
    validation_batches: int = 32  # held-out batches on which trained and initial maps are compared


@dataclass(frozen=True)
class LigoResult:
    """A record of the training of maps."""

    steps: int
    loss_before: float  # the loss on the validation batches with the initial maps
    loss_after: float  # with the trained ones
    seconds: float  # of the steps
    compile_seconds: float
    flops: float  # of the steps
    peak_bytes: int  # of a step of the maps, see `planned_bytes`
    training_bytes: int  # the same of an ordinary training step of the target


@dataclass(frozen=True)
class _LigoProgram:
    """Static settings of the compiled functions."""

    step_config: StepConfig
    plan: Plan
    mesh: jax.sharding.Mesh


def train_ligo_maps(
    run: RunContext,
    params: Params,
    source: ModelConfig,
    *,
    seed: int | None = None,
    teacher_params: TeacherParams | None = None,
    settings: LigoConfig = LigoConfig(),
) -> tuple[Params, LigoResult]:
    """Grow a model to the student of a run with trained maps.

    Args:
        run: the maps are trained with its first batches, targets and scheduled values (after its last step,
            with the last values); `config.init` has the growth options of the leaves without maps.
        params: of the small model, host arrays.
        source: config of the small model.
        seed: of initial maps, batches, targets and dropout; None: the run's.
        teacher_params: on the mesh; needed where the run has a teacher.
        settings: steps, learning rate and noise.

    Returns:
        (parameters of the student on the mesh, a record of the training).

    Raises:
        UserError: LiGO cannot grow `source` to the student.
    """
    if settings.steps < 1:
        raise UserError(f"ligo: steps is {settings.steps}, expected at least 1")
    seed, mesh = run.config.seed if seed is None else seed, run.mesh
    step_config = dataclasses.replace(run.step_config, policy=policy_for_mesh(mesh, run.step_config.policy))
    maps, plan = ligo.init_maps(
        params, source, step_config.model, jax.random.key(seed), settings.noise, run.config.init
    )
    program = _LigoProgram(step_config, plan, mesh)
    inputs = to_global(params, infer_shardings(params, source, mesh)), teacher_params
    maps = to_global(maps, replicated_sharding(mesh))
    schedules = run.schedules[np.minimum(np.arange(settings.steps), run.config.train.steps - 1)]
    validation_loss = _make_validation_loss(program, run, inputs, schedules[-1], settings.validation_batches)
    loss_before = validation_loss(maps)
    optimizer = ligo_optimizer(settings)
    state = maps, to_global(optimizer.init(maps), replicated_sharding(mesh))
    batch_size = run.config.train.batch_size
    first_batch = to_global(get_batch(run.rows, seed, 0, batch_size), batch_sharding(mesh))
    start_time = time.perf_counter()
    step_args = (inputs, first_batch, schedules[0], np.uint32(seed), np.int32(0))
    step = _compile_ligo_step(program, optimizer, state, step_args)
    compile_seconds, start_time = time.perf_counter() - start_time, time.perf_counter()
    for i, batch in enumerate(batch_iterator(run.rows, seed, batch_size, 0, settings.steps)):
        device_batch = to_global(batch, batch_sharding(mesh))
        state = step(state, inputs, device_batch, schedules[i], np.uint32(seed), np.int32(i))
    jax.block_until_ready(state)
    record = LigoResult(
        steps=settings.steps,
        seconds=time.perf_counter() - start_time,
        loss_before=loss_before,
        loss_after=validation_loss(state[0]),
        compile_seconds=compile_seconds,
        flops=settings.steps * ligo_step_flops(step_config, plan, params, *first_batch.tokens.shape),
        peak_bytes=planned_bytes(step),
        training_bytes=_training_step_bytes(program, teacher_params, first_batch, schedules[0]),
    )
    return _grow_params(program, state[0], inputs[0]), record


def _grow_params(program: _LigoProgram, maps: ligo.Maps, params: Params) -> Params:
    """Return the grown parameters, laid out on the mesh."""
    model = program.step_config.model
    layout = infer_shardings(family(model).abstract_params(model), model, program.mesh)
    grow = jax.jit(lambda maps, params: ligo.apply_maps(maps, params, program.plan), out_shardings=layout)
    return grow(maps, params)


def _make_validation_loss(
    program: _LigoProgram, run: RunContext, inputs: LigoInputs, schedules: StepSchedules, num_batches: int
) -> Callable[[ligo.Maps], float]:
    """Return maps → the loss of the model that they grow, over held-out batches."""
    held_out, batch_size = open_dataset(run.data, "held_out"), run.config.train.batch_size
    batches = [get_batch(held_out, EVALUATION_SEED, i, batch_size) for i in range(num_batches)]
    device_batches = to_global(batches, batch_sharding(program.mesh))
    score = jax.jit(functools.partial(_score_batch, program))

    def validation_loss(maps: ligo.Maps) -> float:
        sums = [score(maps, inputs, batch, schedules, np.int32(i)) for i, batch in enumerate(device_batches)]
        losses, counts = np.array(jax.device_get(sums), np.float64).T
        return float((losses * counts).sum() / max(counts.sum(), 1))

    return validation_loss


def ligo_optimizer(settings: LigoConfig) -> optax.GradientTransformation:
    """Return Adam with the gradient clipped to norm 1 and a cosine decay; non-finite updates are skipped."""
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return optax.apply_if_finite(chain, max_consecutive_errors=settings.steps)


def ligo_loss_fn(
    step_config: StepConfig,
    plan: Plan,
    mesh: jax.sharding.Mesh,
    maps: ligo.Maps,
    inputs: LigoInputs,
    microbatch: Microbatch,
    loss_weights: LossWeights,
    key: jax.Array | None,
) -> LossAndSums:
    """Return (loss, sums) of the model that `maps` grow, see `step.loss_fn`."""
    params, teacher_params = inputs
    grown_params = ligo.apply_maps(maps, params, plan)
    grown_params = jax.lax.with_sharding_constraint(
        grown_params, infer_shardings(grown_params, step_config.model, mesh)
    )
    return loss_fn(step_config, grown_params, teacher_params, microbatch, loss_weights, key)


def _ligo_step(
    program: _LigoProgram,
    optimizer: optax.GradientTransformation,
    state: LigoState,
    inputs: LigoInputs,
    batch: Batch,
    schedules: StepSchedules,
    seed: jax.Array,
    step: jax.Array,
) -> LigoState:
    """Update the maps. Targets and dropout are those of the run's own step of that number."""
    step_config = program.step_config
    maps, opt_state = state
    keys = row_keys(seed, step, jnp.arange(batch.tokens.shape[0]))
    rows, loss_weights = make_microbatch(step_config, batch, keys, schedules)

    def loss(maps: ligo.Maps, microbatch: Microbatch, key: jax.Array) -> LossAndSums:
        return ligo_loss_fn(
            step_config, program.plan, program.mesh, maps, inputs, microbatch, loss_weights, key
        )

    key = jax.random.fold_in(jax.random.key(seed), step)
    _, gradient = accumulate_gradients(
        jax.value_and_grad(loss, has_aux=True), maps, rows, key, step_config.gradient_accumulation_steps
    )
    updates, opt_state = optimizer.update(gradient, opt_state, maps)
    return optax.apply_updates(maps, updates), opt_state


def _score_batch(
    program: _LigoProgram,
    maps: ligo.Maps,
    inputs: LigoInputs,
    batch: Batch,
    schedules: StepSchedules,
    batch_index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return (loss without dropout, number of predictions) of a validation batch."""
    step_config = program.step_config
    keys = row_keys(EVALUATION_SEED, batch_index, jnp.arange(batch.tokens.shape[0]))
    rows, loss_weights = make_microbatch(step_config, batch, keys, schedules)
    loss, sums = ligo_loss_fn(step_config, program.plan, program.mesh, maps, inputs, rows, loss_weights, None)
    return loss, sums.predictions


def _compile_ligo_step(
    program: _LigoProgram, optimizer: optax.GradientTransformation, state: LigoState, step_args: Any
) -> Any:
    """Compile the step before its first call, to know its memory."""
    step = functools.partial(_ligo_step, program, optimizer)
    jitted = jax.jit(step, out_shardings=replicated_sharding(program.mesh), donate_argnums=0)
    return jitted.lower(state, *step_args).compile()


def planned_bytes(program: Any) -> int:
    """Return the bytes that XLA plans for one device to hold while a compiled program runs.

    Arguments (parameters, state, batch), results that do not take the place of one, and temporaries. Not
    measured.
    """
    memory = program.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _training_step_bytes(
    program: _LigoProgram, teacher_params: TeacherParams | None, batch: Batch, schedules: StepSchedules
) -> int:
    """Return `planned_bytes` of the step of the training that follows."""
    step_config = program.step_config
    state = abstract_state(step_config.model, step_config.optimizer)
    copied_mask = None if schedules.new_param_scale is None else copied_entry_mask(program.plan)
    step = jit_train_step(step_config, program.mesh).lower(
        state, teacher_params, batch, schedules, np.uint32(0), copied_mask
    )
    return planned_bytes(step.compile())


def ligo_step_flops(
    step_config: StepConfig, plan: Plan, params: Params, batch_size: int, length: int
) -> float:
    """Return the FLOPs of one step of the maps.

    A training step of the target, the teacher's forward pass, and growing the target, forward and backward
    (by the customary rule that a backward pass is twice its forward pass).
    """
    objective = step_config.objective
    shape = batch_size, length, objective_module(objective).predictions_per_row(objective, length)
    teacher_flops = step_config.teacher.forward_flops(*shape) if step_config.teacher else 0.0
    growth_flops = 3 * step_config.gradient_accumulation_steps * ligo.apply_maps_flops(params, plan)
    return flops.training_step_flops(step_config.model, *shape) + teacher_flops + growth_flops
