"""LiGO's learning loop: the maps of remap/ligo.py by some steps of the real objective.

Wang et al. 2023 (arXiv 2303.00980, section 3.2): minimise the loss of the grown model by the
maps alone, the small model's parameters fixed, for about 100 steps; then train the grown
model as ever. The objective here is the run's own: masks, weights and teacher as in its
first steps (train/step.py).
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

from dwt_jax.data import dataset as data_rows
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.models import family, flops
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.fused_lm_loss import LossWeights
from dwt_jax.objectives.masking import EVALUATION_SEED, max_predictions_per_seq, row_keys
from dwt_jax.remap import ligo
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.optimizer_state import copied_entry_mask
from dwt_jax.remap.plan import Plan
from dwt_jax.runs.state import abstract_state
from dwt_jax.train.step import StepConfig, accumulate_gradients, jit_train_step, loss_fn, make_mlm_batch


@dataclass(frozen=True)
class LigoConfig:
    """Of the learning. How the rate was chosen: docs/remapping.md, "Learned maps"."""

    steps: int = 100  # the paper's number
    learning_rate: float = 1e-4  # Adam's; falls to 0 along a cosine
    noise: float = 0.001  # of the maps that it begins with, see ligo.begin
    validation_batches: int = (
        32  # batches of held-out rows on which the result is compared with the beginning
    )


@dataclass(frozen=True)
class LigoResult:
    """What the learning came to."""

    steps: int
    loss_before: float  # the objective on the held-back batches: of the maps it begins with
    loss_after: float  # of the learned ones
    seconds: float  # of the steps
    compile_seconds: float
    flops: float  # of the steps
    peak_bytes: int  # of a learning step, see `planned_bytes`
    training_bytes: int  # the same of an ordinary training step of the target


def train_ligo_maps(
    params: Params,
    source: ModelConfig,
    step_config: StepConfig,
    key: jax.Array,
    rows: data_rows.PackedDataset,
    held_out: data_rows.PackedDataset,
    *,
    batch_size: int,
    schedule_values: np.ndarray,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    teacher_params: Any = None,
    settings: LigoConfig = LigoConfig(),
    options: GrowthOptions = GrowthOptions(),
) -> tuple[Params, LigoResult]:
    """Parameters of spec.model from `params` of `source` by learned maps, laid out on `mesh` by the
    role table, and a record of the learning.

    spec: of the training that follows; masks and objective are taken from it. rows: those to learn
    from, the first batches of `seed`'s stream. held_out: rows that are not among them. knobs:
    float32 [n, …], the run's scheduled numbers from its first step on (step.schedule_table); of the
    last one where the learning takes more steps. teacher_params: on the mesh, where spec.teacher is
    set. options: of what is not learned, and of the maps to begin with. Raises UserError for models
    that LiGO cannot do.
    """
    if settings.steps < 1:
        raise UserError(f"ligo: steps is {settings.steps}, expected at least 1")
    step_config = dataclasses.replace(step_config, policy=policy_for_mesh(mesh, step_config.policy))
    maps, plan = ligo.init_maps(params, source, step_config.model, key, settings.noise, options)
    params = to_global(params, infer_shardings(params, source, mesh))
    maps = to_global(maps, replicated_sharding(mesh))
    schedule_values = schedule_values[np.minimum(np.arange(settings.steps), len(schedule_values) - 1)]
    inputs = params, teacher_params
    loss = _make_validation_loss(
        step_config,
        plan,
        mesh,
        inputs,
        held_out,
        batch_size,
        schedule_values[-1],
        settings.validation_batches,
    )
    initial_loss = loss(maps)
    chain = ligo_optimizer(settings)
    state = maps, to_global(chain.init(maps), replicated_sharding(mesh))
    first_batch = to_global(data_rows.get_batch(rows, seed, 0, batch_size), batch_sharding(mesh))
    start_time = time.perf_counter()
    step = _compile_ligo_step(
        step_config,
        plan,
        chain,
        mesh,
        state,
        (inputs, first_batch, schedule_values[0], np.uint32(seed), np.int32(0)),
    )
    compile_seconds, start_time = time.perf_counter() - start_time, time.perf_counter()
    for i, batch in enumerate(data_rows.batch_iterator(rows, seed, batch_size, 0, settings.steps)):
        device_batch = to_global(batch, batch_sharding(mesh))
        state = step(state, inputs, device_batch, schedule_values[i], np.uint32(seed), np.int32(i))
    jax.block_until_ready(state)
    record = LigoResult(
        steps=settings.steps,
        seconds=time.perf_counter() - start_time,
        loss_before=initial_loss,
        loss_after=loss(state[0]),
        compile_seconds=compile_seconds,
        flops=settings.steps * ligo_step_flops(step_config, plan, params, *first_batch["tokens"].shape),
        peak_bytes=planned_bytes(step),
        training_bytes=_training_step_bytes(step_config, plan, mesh, inputs, first_batch, schedule_values[0]),
    )
    layout = infer_shardings(
        family(step_config.model).abstract_params(step_config.model), step_config.model, mesh
    )
    grow_params = jax.jit(lambda maps, params: ligo.apply_maps(maps, params, plan), out_shardings=layout)
    return grow_params(state[0], params), record


def _make_validation_loss(
    step_config: StepConfig,
    plan: Plan,
    mesh,
    inputs,
    held_out: data_rows.PackedDataset,
    batch_size: int,
    schedule_values,
    count: int,
) -> Callable[[ligo.Maps], float]:
    """maps → the objective of what they grow, over `count` batches of `held_out`: always the same."""
    batches = [data_rows.get_batch(held_out, EVALUATION_SEED, i, batch_size) for i in range(count)]
    device_batches = to_global(batches, batch_sharding(mesh))
    score = jax.jit(functools.partial(_score_batch, step_config, plan, mesh))

    def loss(maps: ligo.Maps) -> float:
        sums = [
            score(maps, inputs, batch, schedule_values, np.int32(i)) for i, batch in enumerate(device_batches)
        ]
        losses, counts = np.array(jax.device_get(sums), np.float64).T
        return float((losses * counts).sum() / max(counts.sum(), 1))

    return loss


def ligo_optimizer(settings: LigoConfig) -> optax.GradientTransformation:
    """Adam with the gradient clipped to norm 1, the rate along a cosine. An update that is not
    finite is not made."""
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return optax.apply_if_finite(chain, max_consecutive_errors=settings.steps)


def ligo_loss_fn(
    step_config: StepConfig, plan: Plan, mesh, maps, inputs, microbatch, loss_weights: LossWeights, key
):
    """(loss, sums) of the model that `maps` grow, on one part of a batch, (Masked, segments)."""
    params, teacher_params = inputs
    grown_params = ligo.apply_maps(maps, params, plan)
    grown_params = jax.lax.with_sharding_constraint(
        grown_params, infer_shardings(grown_params, step_config.model, mesh)
    )
    return loss_fn(step_config, grown_params, teacher_params, microbatch, loss_weights, key)


def _ligo_step(
    step_config: StepConfig, plan: Plan, chain, mesh, state, inputs, batch, schedule_values, seed, step
):
    """One update of the maps. Masks and dropout are those of the run's own step of that number."""
    maps, opt_state = state
    keys = row_keys(seed, step, jnp.arange(batch["tokens"].shape[0]))
    batch, loss_weights = make_mlm_batch(step_config, batch, keys, schedule_values)

    def loss(maps, microbatch, key):
        return ligo_loss_fn(step_config, plan, mesh, maps, inputs, microbatch, loss_weights, key)

    key = jax.random.fold_in(jax.random.key(seed), step)
    loss_and_gradient = accumulate_gradients(
        jax.value_and_grad(loss, has_aux=True), maps, batch, key, step_config.gradient_accumulation_steps
    )
    updates, opt_state = chain.update(loss_and_gradient[1], opt_state, maps)
    return optax.apply_updates(maps, updates), opt_state


def _score_batch(
    step_config: StepConfig, plan: Plan, mesh, maps, inputs, batch, schedule_values, batch_index
):
    """(the objective without dropout, its predictions) of a held-back batch, masked as it always is."""
    keys = row_keys(EVALUATION_SEED, batch_index, jnp.arange(batch["tokens"].shape[0]))
    mlm_batch, loss_weights = make_mlm_batch(step_config, batch, keys, schedule_values)
    loss, sums = ligo_loss_fn(step_config, plan, mesh, maps, inputs, mlm_batch, loss_weights, None)
    return loss, sums.predictions


def _compile_ligo_step(step_config: StepConfig, plan: Plan, chain, mesh, state, step_args) -> Any:
    """The learning step for arguments like these, ahead of time, so that its memory is known."""
    step = functools.partial(_ligo_step, step_config, plan, chain, mesh)
    return (
        jax.jit(step, out_shardings=replicated_sharding(mesh), donate_argnums=0)
        .lower(state, *step_args)
        .compile()
    )


def planned_bytes(program: Any) -> int:
    """What XLA plans for one device to hold while the program runs: arguments (parameters, state,
    batch), results that do not take the place of one, and temporaries. Not measured."""
    memory = program.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _training_step_bytes(step_config: StepConfig, plan: Plan, mesh, inputs, batch, schedule_values) -> int:
    """`planned_bytes` of the step of spec's training."""
    state = abstract_state(step_config.model, step_config.optimizer)
    warmup_args = (copied_entry_mask(plan),) if "rewarmed" in step_config.schedule_names else ()
    step = jit_train_step(step_config, mesh).lower(
        state, inputs[1], batch, schedule_values, np.uint32(0), *warmup_args
    )
    return planned_bytes(step.compile())


def ligo_step_flops(
    step_config: StepConfig, plan: Plan, params: Params, batch_size: int, length: int
) -> float:
    """Of one learning step: a training step of the target, the teacher, and growing it, forward
    and backward (by the customary rule that a backward pass is twice its forward pass)."""
    shape = batch_size, length, max_predictions_per_seq(step_config.mlm, length)
    teacher_flops = flops.forward_flops(step_config.teacher, *shape) if step_config.teacher else 0.0
    growth_flops = 3 * step_config.gradient_accumulation_steps * ligo.apply_maps_flops(params, plan)
    return flops.training_step_flops(step_config.model, *shape) + teacher_flops + growth_flops
