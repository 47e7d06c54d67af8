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

from dwt_jax.config import Model
from dwt_jax.data import dataset as data_rows
from dwt_jax.distributed.mesh import over, put, replicated, rows_sharding, shardings
from dwt_jax.errors import UserError
from dwt_jax.models import bert, flops
from dwt_jax.objectives.fused_lm_loss import Knobs
from dwt_jax.objectives.masking import EVALUATION_SEED, predictions_per_row, row_keys
from dwt_jax.remap import ligo
from dwt_jax.remap.methods import Options
from dwt_jax.remap.optimizer_state import known
from dwt_jax.remap.plan import Plan
from dwt_jax.train.step import Spec, abstract_state, accumulated, compiled, forward, masked_batch


@dataclass(frozen=True)
class Settings:
    """Of the learning. How the rate was chosen: docs/remapping.md, "Learned maps"."""

    steps: int = 100  # the paper's number
    learning_rate: float = 1e-4  # Adam's; falls to 0 along a cosine
    noise: float = 0.001  # of the maps that it begins with, see ligo.begin
    held_back: int = 32  # batches of held-out rows on which the result is compared with the beginning


@dataclass(frozen=True)
class Learned:
    """What the learning came to."""

    steps: int
    loss_before: float  # the objective on the held-back batches: of the maps it begins with
    loss_after: float  # of the learned ones
    seconds: float  # of the steps
    compile_seconds: float
    flops: float  # of the steps
    peak_bytes: int  # of a learning step, see `planned_bytes`
    training_bytes: int  # the same of an ordinary training step of the target


def learn(
    params: bert.Params,
    source: Model,
    spec: Spec,
    key: jax.Array,
    rows: data_rows.Rows,
    held_out: data_rows.Rows,
    *,
    batch_size: int,
    knobs: np.ndarray,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    teacher_params: Any = None,
    settings: Settings = Settings(),
    options: Options = Options(),
) -> tuple[bert.Params, Learned]:
    """Parameters of spec.model from `params` of `source` by learned maps, laid out on `mesh` by the
    role table, and a record of the learning.

    spec: of the training that follows; masks and objective are taken from it. rows: those to learn
    from, the first batches of `seed`'s stream. held_out: rows that are not among them. knobs:
    float32 [n, …], the run's scheduled numbers from its first step on (step.knob_table); of the
    last one where the learning takes more steps. teacher_params: on the mesh, where spec.teacher is
    set. options: of what is not learned, and of the maps to begin with. Raises UserError for models
    that LiGO cannot do.
    """
    if settings.steps < 1:
        raise UserError(f"ligo: steps is {settings.steps}, expected at least 1")
    spec = dataclasses.replace(spec, numerics=over(mesh, spec.numerics))
    maps, todo = ligo.begin(params, source, spec.model, key, settings.noise, options)
    params = put(params, shardings(params, mesh))
    maps = put(maps, replicated(mesh))
    knobs = knobs[np.minimum(np.arange(settings.steps), len(knobs) - 1)]
    inputs = params, teacher_params
    loss = _comparison(spec, todo, mesh, inputs, held_out, batch_size, knobs[-1], settings.held_back)
    before = loss(maps)
    chain = optimizer(settings)
    state = maps, put(chain.init(maps), replicated(mesh))
    first = put(data_rows.batch(rows, seed, 0, batch_size), rows_sharding(mesh))
    began = time.perf_counter()
    step = _compiled(spec, todo, chain, mesh, state, (inputs, first, knobs[0], np.uint32(seed), np.int32(0)))
    compile_seconds, began = time.perf_counter() - began, time.perf_counter()
    for i, batch in enumerate(data_rows.batches(rows, seed, batch_size, 0, settings.steps)):
        placed = put(batch, rows_sharding(mesh))
        state = step(state, inputs, placed, knobs[i], np.uint32(seed), np.int32(i))
    jax.block_until_ready(state)
    record = Learned(
        steps=settings.steps,
        seconds=time.perf_counter() - began,
        loss_before=before,
        loss_after=loss(state[0]),
        compile_seconds=compile_seconds,
        flops=settings.steps * step_flops(spec, todo, params, *first["tokens"].shape),
        peak_bytes=planned_bytes(step),
        training_bytes=_training_bytes(spec, todo, mesh, inputs, first, knobs[0]),
    )
    layout = shardings(bert.abstract(spec.model), mesh)
    grown = jax.jit(lambda maps, params: ligo.grow(maps, params, todo), out_shardings=layout)
    return grown(state[0], params), record


def _comparison(
    spec: Spec, todo: Plan, mesh, inputs, held_out: data_rows.Rows, batch_size: int, knobs, count: int
) -> Callable[[ligo.Maps], float]:
    """maps → the objective of what they grow, over `count` batches of `held_out`: always the same."""
    batches = [data_rows.batch(held_out, EVALUATION_SEED, i, batch_size) for i in range(count)]
    placed = put(batches, rows_sharding(mesh))
    score = jax.jit(functools.partial(_score, spec, todo, mesh))

    def loss(maps: ligo.Maps) -> float:
        sums = [score(maps, inputs, batch, knobs, np.int32(i)) for i, batch in enumerate(placed)]
        losses, counts = np.array(jax.device_get(sums), np.float64).T
        return float((losses * counts).sum() / max(counts.sum(), 1))

    return loss


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam with the gradient clipped to norm 1, the rate along a cosine. An update that is not
    finite is not made."""
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return optax.apply_if_finite(chain, max_consecutive_errors=settings.steps)


def objective(spec: Spec, todo: Plan, mesh, maps, inputs, part, scalars: Knobs, key):
    """(loss, sums) of the model that `maps` grow, on one part of a batch, (Masked, segments)."""
    params, teacher_params = inputs
    grown = ligo.grow(maps, params, todo)
    grown = jax.lax.with_sharding_constraint(grown, shardings(grown, mesh))
    return forward(spec, grown, teacher_params, part, scalars, key)


def _step(spec: Spec, todo: Plan, chain, mesh, state, inputs, batch, knobs, seed, step):
    """One update of the maps. Masks and dropout are those of the run's own step of that number."""
    maps, moments = state
    keys = row_keys(seed, step, jnp.arange(batch["tokens"].shape[0]))
    batch, scalars = masked_batch(spec, batch, keys, knobs)

    def loss(maps, part, key):
        return objective(spec, todo, mesh, maps, inputs, part, scalars, key)

    key = jax.random.fold_in(jax.random.key(seed), step)
    found = accumulated(jax.value_and_grad(loss, has_aux=True), maps, batch, key, spec.accumulate)
    updates, moments = chain.update(found[1], moments, maps)
    return optax.apply_updates(maps, updates), moments


def _score(spec: Spec, todo: Plan, mesh, maps, inputs, batch, knobs, number):
    """(the objective without dropout, its predictions) of a held-back batch, masked as it always is."""
    keys = row_keys(EVALUATION_SEED, number, jnp.arange(batch["tokens"].shape[0]))
    part, scalars = masked_batch(spec, batch, keys, knobs)
    loss, sums = objective(spec, todo, mesh, maps, inputs, part, scalars, None)
    return loss, sums.predictions


def _compiled(spec: Spec, todo: Plan, chain, mesh, state, rest) -> Any:
    """The learning step for arguments like these, ahead of time, so that its memory is known."""
    step = functools.partial(_step, spec, todo, chain, mesh)
    return jax.jit(step, out_shardings=replicated(mesh), donate_argnums=0).lower(state, *rest).compile()


def planned_bytes(program: Any) -> int:
    """What XLA plans for one device to hold while the program runs: arguments (parameters, state,
    batch), results that do not take the place of one, and temporaries. Not measured."""
    plan = program.memory_analysis()
    return int(
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )


def _training_bytes(spec: Spec, todo: Plan, mesh, inputs, batch, knobs) -> int:
    """`planned_bytes` of the step of spec's training."""
    state = abstract_state(spec.model, spec.optimizer)
    warming = (known(todo),) if "rewarmed" in spec.columns else ()
    step = compiled(spec, mesh).lower(state, inputs[1], batch, knobs, np.uint32(0), *warming)
    return planned_bytes(step.compile())


def step_flops(spec: Spec, todo: Plan, params: bert.Params, batch_size: int, length: int) -> float:
    """Of one learning step: a training step of the target, the teacher, and growing it, forward
    and backward (by the customary rule that a backward pass is twice its forward pass)."""
    shape = batch_size, length, predictions_per_row(spec.mask, length)
    teacher = flops.forward(spec.teacher, *shape) if spec.teacher else 0.0
    growing = 3 * spec.accumulate * ligo.flops(params, todo)
    return flops.training_step(spec.model, *shape) + teacher + growing
