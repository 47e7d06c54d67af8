"""One step of pre-training: (state, teacher, batch, schedules) → (state, metrics), a pure function.

Everything random is derived from (seed, step), so that the state holds no key.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Config, Distill, Optimizer, Schedule
from dwt_jax.data.batch import Batch
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, split_microbatches
from dwt_jax.models import family
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives import Objective, objective_module
from dwt_jax.objectives.distillation import LossSums, LossWeights
from dwt_jax.objectives.fused_lm_loss import LMHead, LossConfig, Teachers, fused_lm_loss
from dwt_jax.objectives.schedules import alpha_soft_scale
from dwt_jax.objectives.targets import Targets, row_keys
from dwt_jax.objectives.teacher_sample import TeacherSample
from dwt_jax.remap.gates import open_gates
from dwt_jax.remap.optimizer_state import new_entry_mask, scale_new_updates
from dwt_jax.runs.optimizer import make_optimizer
from dwt_jax.runs.state import SkipCounts, TeacherGap, TrainState, abstract_state
from dwt_jax.runs.teacher import TeacherConfig, TeacherParams
from dwt_jax.runs.teacher_cache import CacheConfig
from dwt_jax.train.step_schedules import StepSchedules

Microbatch = tuple[Targets, jax.Array]
"""Targets and segment ids [B, L] of some rows."""
LossAndSums = tuple[jax.Array, LossSums]
Metrics = dict[str, jax.Array]
"""Scalars of one step by name."""
CopiedMask = Mapping[str, jax.Array]
"""What `optimizer_state.copied_entry_mask` returns: bool [D] by logical axis."""

TRACE_COUNTS: collections.Counter[str] = collections.Counter()
"""How often the step was traced with a `teacher` and with `no_teacher`.

Once for each `StepConfig` and number of rows: once a stage of a batch ramp.
"""


@dataclass(frozen=True)
class StepConfig:
    """The static settings of the compiled step.

    Runs with equal step configs share a compilation: seeds and schedule values are arguments.
    """

    model: ModelConfig
    teacher: TeacherConfig | CacheConfig | None
    objective: Objective
    distill: Distill  # without its schedules
    optimizer: Optimizer  # without its schedule
    gradient_accumulation_steps: int
    policy: Policy
    temperature_is_one: bool
    until_matched: bool


def make_step_config(
    config: Config, teacher: TeacherConfig | CacheConfig | None, objective: Objective, policy: Policy
) -> StepConfig:
    """Return the static settings of a run's step.

    Args:
        config: resolved.
        teacher: config of the teacher; None: the step takes none.
        objective: what is predicted.
        policy: dtypes for compute and activations.
    """
    empty = Schedule()
    temperature, distill = config.distill.temperature, config.distill
    return StepConfig(
        model=config.model,
        teacher=teacher,
        objective=objective,
        distill=dataclasses.replace(
            distill, preset="", alpha_hard=empty, alpha_soft=empty, temperature=empty
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=empty),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        policy=policy,
        temperature_is_one=temperature.kind == "constant" and temperature.value == 1,
        until_matched=teacher is not None and distill.alpha_soft.kind == "until_matched",
    )


@functools.cache
def jit_train_step(config: StepConfig, mesh: jax.sharding.Mesh) -> Any:
    """Return the jitted `train_step` of a config on a mesh, as a function of its other arguments.

    State and teacher are sharded by the logical axes of their leaves and the rows of the batch over (data,
    fsdp); everything else is replicated. The state is donated. All arguments are positional. A batch with
    a new number of rows is traced and compiled.
    """
    state_shardings = infer_shardings(abstract_state(config.model, config.optimizer), config.model, mesh)
    teacher_shardings = config.teacher.shardings(mesh) if config.teacher else None
    replicated = replicated_sharding(mesh)
    config = dataclasses.replace(config, policy=policy_for_mesh(mesh, config.policy))
    return jax.jit(
        functools.partial(train_step, config),
        in_shardings=(
            state_shardings,
            teacher_shardings,
            batch_sharding(mesh),
            replicated,
            replicated,
            replicated,
        ),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


def train_step(
    config: StepConfig,
    state: TrainState,
    teacher_params: TeacherParams | TeacherSample | None,
    batch: Batch,
    schedules: StepSchedules,
    seed: jax.Array,
    copied_mask: CopiedMask | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one step.

    Args:
        config: static.
        state: of the student.
        teacher_params: of the frozen teacher; or of a cache, the samples of the rows; None where
            config.teacher is None.
        batch: tokens and segment ids, int [B, L].
        schedules: values of this step, fp32 scalars.
        seed: uint32 scalar, of the run.
        copied_mask: which entries of a grown model are copies; needed where `schedules.new_param_scale` is
            not None.

    Returns:
        (the state after the step, metrics of the step). If the loss or the gradient is not finite, params
        and opt_state stay as they were.
    """
    TRACE_COUNTS["teacher" if config.teacher else "no_teacher"] += 1
    if config.until_matched:
        scale = _gap_scale(state.teacher_gap, config.distill)
        schedules = dataclasses.replace(schedules, alpha_soft=schedules.alpha_soft * scale)
    keys = row_keys(seed, state.step, jnp.arange(batch.tokens.shape[0]))
    rows, loss_weights = make_microbatch(config, batch, keys, schedules)
    if isinstance(teacher_params, TeacherSample):
        rows, teacher_params = (dataclasses.replace(rows[0], teacher=teacher_params), rows[1]), None

    def loss(params: Params, microbatch: Microbatch, key: jax.Array) -> LossAndSums:
        if schedules.gate is not None:
            params = open_gates(params, schedules.gate)
        return loss_fn(config, params, teacher_params, microbatch, loss_weights, key)

    key = jax.random.fold_in(jax.random.key(seed), state.step)  # of dropout, see dropout.dropout_mask
    (value, sums), gradient = accumulate_gradients(
        jax.value_and_grad(loss, has_aux=True),
        state.params,
        rows,
        key,
        config.gradient_accumulation_steps,
    )
    grad_norm = optax.global_norm(gradient)
    # Known before the update, so that the update is one pass over memory. It is finite where these are:
    # config.py bounds the learning rate, β₁, β₂, the momentum, ε and the decay.
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    params, opt_state = _update_params(config, state, gradient, finite, schedules, copied_mask)
    new_state = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        skipped=_update_skip_counts(state.skipped, finite),
        teacher_gap=_update_teacher_gap(state.teacher_gap, sums, finite, state.step, config),
    )
    return new_state, _step_metrics(new_state, sums, value, grad_norm, schedules)


def make_microbatch(
    config: StepConfig, batch: Batch, keys: jax.Array, schedules: StepSchedules
) -> tuple[Microbatch, LossWeights]:
    """Turn a batch into the inputs of the loss.

    Args:
        config: static; its objective makes the targets.
        batch: the global batch, int [B, L].
        keys: one random key per row [B], see `row_keys`.
        schedules: values of this step, fp32 scalars.

    Returns:
        (targets and segment ids of all rows, weights of the loss).
    """
    targets = objective_module(config.objective).make_targets(
        batch, keys, config.objective, schedules.num_predictions
    )
    loss_weights = LossWeights(
        alpha_hard=jnp.asarray(schedules.alpha_hard),
        alpha_soft=jnp.asarray(schedules.alpha_soft),
        temperature=jnp.asarray(schedules.temperature),
        predictions=targets.num_predictions(),
    )
    return (targets, jnp.asarray(batch.segment_ids)), loss_weights


def loss_fn(
    config: StepConfig,
    params: Params,
    teacher_params: TeacherParams | None,
    microbatch: Microbatch,
    loss_weights: LossWeights,
    key: jax.Array | None,
) -> LossAndSums:
    """Return the loss of some rows and the sums to be logged.

    Args:
        config: static.
        params: of the student, with open gates.
        teacher_params: of the teacher; None where config.teacher is None.
        microbatch: targets and segment ids of the rows.
        loss_weights: of the global batch.
        key: of dropout; None: no dropout.
    """
    targets, segment_ids = microbatch
    teachers: Teachers = ()
    loss_config = LossConfig(
        config.distill, config.temperature_is_one, config.model.vocab_size, config.policy
    )
    if targets.teacher is not None:
        teachers = targets.teacher
    elif isinstance(config.teacher, TeacherConfig) and teacher_params is not None:
        models = zip(config.teacher.models, teacher_params, strict=True)
        teachers = tuple(
            make_lm_head(model, params, targets, segment_ids, config.policy) for model, params in models
        )
        loss_config = loss_config._replace(teacher_weights=config.teacher.weights)
    dropout_key = key if config.model.uses_dropout else None
    student = make_lm_head(config.model, params, targets, segment_ids, config.policy, dropout_key)
    return fused_lm_loss(student, teachers, targets.labels, targets.weights, loss_weights, loss_config)


def make_lm_head(
    model: ModelConfig,
    params: Params,
    targets: Targets,
    segment_ids: jax.Array,
    policy: Policy,
    key: jax.Array | None = None,
) -> LMHead:
    """Return what the logits of the predictions are computed from.

    Args:
        model: config of the model.
        params: its parameters.
        targets: inputs, and positions of the predictions.
        segment_ids: int [B, L].
        policy: dtypes for compute and activations.
        key: of dropout; None: no dropout.
    """
    hidden = family(model).encode(
        params, model, targets.inputs, segment_ids, positions=targets.positions, key=key, policy=policy
    )
    return LMHead.from_params(family(model).lm_features(params, model, hidden, policy=policy), params, model)


def accumulate_gradients(
    value_and_grad: Callable[..., tuple[LossAndSums, Any]],
    params: Any,
    batch: Microbatch,
    key: jax.Array,
    num_microbatches: int,
) -> tuple[LossAndSums, Any]:
    """Sum losses and gradients of the microbatches of a batch, one after the other.

    Args:
        value_and_grad: (params, microbatch, key) → ((loss, sums), gradient).
        params: parameters to differentiate with respect to.
        batch: all rows.
        key: PRNG key of dropout, from which one per microbatch is derived.
        num_microbatches: number of microbatches; must divide the number of rows.

    Returns:
        ((loss, sums), gradient) of the batch.
    """
    if num_microbatches == 1:
        return value_and_grad(params, batch, key)

    def add(total: Any, inputs: tuple[Microbatch, jax.Array]) -> tuple[Any, None]:
        microbatch, index = inputs
        value = value_and_grad(params, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, value), None

    zeros = (jnp.float32(0), LossSums.zeros()), jax.tree.map(jnp.zeros_like, params)
    microbatches = split_microbatches(batch, num_microbatches), jnp.arange(num_microbatches)
    return jax.lax.scan(add, zeros, microbatches)[0]


def _update_params(
    config: StepConfig,
    state: TrainState,
    gradient: Params,
    finite: jax.Array,
    schedules: StepSchedules,
    copied_mask: CopiedMask | None,
) -> tuple[Params, optax.OptState]:
    """Return (params, opt_state) after the update, or the old ones where it is not `finite`."""
    optimizer = make_optimizer(config.optimizer, config.model)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    if schedules.new_param_scale is not None:
        assert copied_mask is not None
        param_axes = family(config.model).param_axes(config.model)
        is_new = new_entry_mask(dict(copied_mask), state.params, param_axes)
        updates = scale_new_updates(updates, is_new, schedules.new_param_scale)
    params = jax.tree.map(lambda p, u: p - schedules.learning_rate * u, state.params, updates)
    return jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )


def _update_skip_counts(skipped: SkipCounts, finite: jax.Array) -> SkipCounts:
    consecutive = jnp.where(finite, 0, skipped.consecutive + 1)
    return SkipCounts(
        total=skipped.total + ~finite,
        consecutive=consecutive,
        longest=jnp.maximum(skipped.longest, consecutive),
    )


def _gap_scale(teacher_gap: TeacherGap, distill: Distill) -> jax.Array:
    """Return the factor of α_s: 1 before the first loss is known, 0 for good once the gap is closed."""
    mean = teacher_gap.gap / jnp.maximum(teacher_gap.weight, 1e-30)
    scale = jnp.where(teacher_gap.weight > 0, alpha_soft_scale(mean, distill.match_margin), 1.0)
    return jnp.where(teacher_gap.matched_step < 0, scale, 0.0)


def _update_teacher_gap(
    teacher_gap: TeacherGap, sums: LossSums, finite: jax.Array, step: jax.Array, config: StepConfig
) -> TeacherGap:
    """Return the running mean of (student − teacher) hard loss, and the step at which it reached 0."""
    if not config.until_matched:
        return teacher_gap
    decay = config.distill.gap_ema_decay
    loss_gap = (1 - decay) * (sums.hard - sums.teacher_hard) / jnp.maximum(sums.predictions, 1)
    is_valid = finite & (sums.predictions > 0)
    gap = jnp.where(is_valid, decay * teacher_gap.gap + loss_gap, teacher_gap.gap)
    weight = jnp.where(is_valid, decay * teacher_gap.weight + (1 - decay), teacher_gap.weight)
    is_matched = (teacher_gap.matched_step < 0) & is_valid & (gap <= 0)
    return TeacherGap(gap, weight, jnp.where(is_matched, step, teacher_gap.matched_step))


def _step_metrics(
    state: TrainState, sums: LossSums, loss: jax.Array, grad_norm: jax.Array, schedules: StepSchedules
) -> Metrics:
    """Return the metrics of a step, given the state after it."""
    count = jnp.maximum(sums.predictions, 1)
    return {
        "loss": loss,
        "hard_loss": sums.hard / count,
        "soft_loss": sums.soft / jnp.maximum(sums.num_selected, 1),
        "soft_loss_at_1": sums.soft_at_1 / count,
        "teacher_hard_loss": sums.teacher_hard / count,
        "selected_share": sums.num_selected / count,
        "alpha_soft": jnp.asarray(schedules.alpha_soft),
        "grad_norm": grad_norm,
        "skipped": state.skipped.total,
        "consecutive_skips": state.skipped.consecutive,
        "max_consecutive_skips": state.skipped.longest,
        "teacher_matched_step": state.teacher_gap.matched_step,
    }
