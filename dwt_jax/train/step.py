"""One step of pre-training: (state, teacher, batch, knobs) → (state, metrics), a pure function.

What is drawn at random comes from (seed, step), so the state is {params, opt_state, step}
and two small records: how many updates were skipped, and how far the student still is
behind its teacher (for `until_matched`).
"""

import collections
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.config import Config, Distill, Mlm, Optimizer, Schedule
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, split_microbatches
from dwt_jax.models import family
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import schedules
from dwt_jax.objectives.distillation import LossSums
from dwt_jax.objectives.fused_lm_loss import LMHead, LossConfig, LossWeights, fused_lm_loss
from dwt_jax.objectives.masking import MaskedBatch, MaskingVocab, apply_mlm_mask, row_keys
from dwt_jax.remap.gates import gate_schedule, has_gates, open_gates
from dwt_jax.remap.optimizer_state import new_entry_mask, scale_new_updates
from dwt_jax.runs import optimizer as optimizers
from dwt_jax.runs.state import abstract_state

BASE_SCHEDULES = ("alpha_hard", "alpha_soft", "temperature", "learning_rate")
"""The scheduled numbers of every step; see `schedule_names` for the others."""

TRACE_COUNTS: collections.Counter[str] = collections.Counter()
"""How often each step function was traced: a test holds it at one."""


@dataclass(frozen=True)
class StepConfig:
    """All that a compiled step depends on. Runs that agree in it share one compilation:
    seeds and scheduled values are arguments, not constants."""

    model: ModelConfig
    teacher: ModelConfig | None
    mlm: Mlm
    distill: Distill
    optimizer: Optimizer
    gradient_accumulation_steps: int
    tokens: MaskingVocab
    policy: Policy
    temperature_is_one: bool
    until_matched: bool
    schedule_names: tuple[str, ...] = BASE_SCHEDULES  # of the knobs


def make_step_config(
    config: Config, teacher: ModelConfig | None, masking_vocab: MaskingVocab, policy: Policy
) -> StepConfig:
    empty_schedule = Schedule()
    temperature, distill = config.distill.temperature, config.distill
    return StepConfig(
        model=config.model,
        teacher=teacher,
        mlm=config.mlm,
        distill=dataclasses.replace(
            distill,
            preset="",
            alpha_hard=empty_schedule,
            alpha_soft=empty_schedule,
            temperature=empty_schedule,
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=empty_schedule),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        tokens=masking_vocab,
        policy=policy,
        temperature_is_one=temperature.kind == "constant" and temperature.value == 1,
        until_matched=teacher is not None and distill.alpha_soft.kind == "until_matched",
        schedule_names=schedule_names(config),
    )


def schedule_table(config: Config) -> np.ndarray:
    """float32 [steps, columns]: the scheduled numbers of the whole run, columns as in `schedule_names`."""
    steps, init = config.train.steps, config.init
    base_schedules = (
        *(getattr(config.distill, name) for name in BASE_SCHEDULES[:3]),
        config.optimizer.learning_rate,
    )
    columns = [schedules.schedule_values(schedule, steps) for schedule in base_schedules]
    for name in schedule_names(config)[len(BASE_SCHEDULES) :]:
        columns.append(
            gate_schedule(np.arange(steps), steps, getattr(init, _INIT_SHARE_KEYS[name]), init.step)
        )
    return np.stack(columns, axis=1)


_INIT_SHARE_KEYS = {
    "annealed": "gate_warmup",
    "rewarmed": "new_param_warmup",
}  # keys of `init`: over which share of the run


def schedule_names(config: Config) -> tuple[str, ...]:
    """The names of the columns of `schedule_table`: those of every step; annealed, of the leaves that are
    no parameters; rewarmed, of the updates of what is new in a grown model."""
    optional = {"annealed": has_gates(config.model), "rewarmed": config.init.new_param_warmup > 0}
    return (*BASE_SCHEDULES, *(name for name, enabled in optional.items() if enabled))


@functools.cache
def jit_train_step(config: StepConfig, mesh: jax.sharding.Mesh) -> Any:
    """The jitted step of `spec` on `mesh`: step(state, teacher_params, batch, knobs, seed[, old]).

    State and teacher are laid out by the role table, the batch's rows over (data, fsdp); the
    state is donated. teacher_params: None when spec.teacher is None. batch: {tokens,
    segments} [B, L]. knobs: float32, columns as in spec.columns. seed: uint32. old: what
    `optimizer_state.copied_entry_mask` says of a grown model, where its new entries are warmed up (`rewarmed`).
    """
    layout = infer_shardings(abstract_state(config.model, config.optimizer), config.model, mesh)
    config = dataclasses.replace(config, policy=policy_for_mesh(mesh, config.policy))
    teacher_layout = (
        infer_shardings(family(config.teacher).abstract_params(config.teacher), config.teacher, mesh)
        if config.teacher
        else None
    )
    replicated_layout = replicated_sharding(mesh)
    return jax.jit(
        functools.partial(_train_step, config),
        in_shardings=(layout, teacher_layout, batch_sharding(mesh), replicated_layout, replicated_layout)
        + ((replicated_layout,) if "rewarmed" in config.schedule_names else ()),
        out_shardings=(layout, replicated_layout),
        donate_argnums=0,
    )


def _train_step(config: StepConfig, state, teacher_params, batch, schedule_values, seed, old=None):
    TRACE_COUNTS["teacher" if config.teacher else "alone"] += 1
    alpha_hard, alpha_soft, temperature, learning_rate, *_ = schedule_values
    value_by_name = dict(zip(config.schedule_names, schedule_values, strict=True))
    if config.until_matched:
        alpha_soft = alpha_soft * _gap_scale(state["behind"], config.distill)
    step, params = state["step"], state["params"]
    keys = row_keys(seed, step, jnp.arange(batch["tokens"].shape[0]))
    mlm_batch, loss_weights = make_mlm_batch(config, batch, keys, (alpha_hard, alpha_soft, temperature))

    def loss(params, microbatch, key):
        params = open_gates(params, value_by_name["annealed"]) if "annealed" in value_by_name else params
        return loss_fn(config, params, teacher_params, microbatch, loss_weights, key)

    key = jax.random.fold_in(jax.random.key(seed), step)  # of dropout alone, see layers.keep_mask
    (value, sums), gradient = accumulate_gradients(
        jax.value_and_grad(loss, has_aux=True), params, mlm_batch, key, config.gradient_accumulation_steps
    )
    grad_norm = optax.global_norm(gradient)
    # Known before the update, so that all of it is one pass over memory. An update is finite where these
    # are: config.py bounds the learning rate, β₁, β₂, ε and the decay. That it is sensible, nobody promises.
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizers.make_optimizer(config.optimizer, config.model).update(
        gradient, state["opt_state"], params
    )
    if "rewarmed" in value_by_name:
        updates = scale_new_updates(
            updates,
            new_entry_mask(old, params, family(config.model).param_axes(config.model)),
            value_by_name["rewarmed"],
        )
    new_params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    next_params_and_opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (new_params, opt_state), (params, state["opt_state"])
    )
    consecutive_skips = jnp.where(finite, 0, state["skipped"]["in_row"] + 1)
    skip_counts = {
        "total": state["skipped"]["total"] + ~finite,
        "in_row": consecutive_skips,
        "longest": jnp.maximum(state["skipped"]["longest"], consecutive_skips),
    }
    teacher_gap = _update_teacher_gap(state["behind"], sums, finite, step, config)
    metrics = _step_metrics(sums, value, grad_norm, alpha_soft, skip_counts, teacher_gap)
    state = {
        "params": next_params_and_opt_state[0],
        "opt_state": next_params_and_opt_state[1],
        "step": step + 1,
        "skipped": skip_counts,
        "behind": teacher_gap,
    }
    return state, metrics


def make_mlm_batch(
    config: StepConfig, batch, keys, schedule_values
) -> tuple[tuple[MaskedBatch, jax.Array], LossWeights]:
    """A batch with its masks, (Masked, segments [B, L]), and the scalars of its objective.

    keys: of the rows' masks. knobs: columns as in SCHEDULED, of which the first three are read.
    """
    masked_rows = apply_mlm_mask(batch["tokens"], batch["segments"], keys, config.mlm, config.tokens)
    alpha_hard, alpha_soft, temperature = schedule_values[:3]
    num_predictions = jnp.maximum(masked_rows.weights.sum(), 1)
    return (masked_rows, batch["segments"]), LossWeights(alpha_hard, alpha_soft, temperature, num_predictions)


def loss_fn(
    config: StepConfig, params, teacher_params, microbatch, loss_weights: LossWeights, key
) -> tuple[jax.Array, LossSums]:
    """Objective and sums of one part of a batch, (Masked, segments [B, L])."""
    masked_rows, segments = microbatch
    use_dropout = config.model.uses_dropout

    def apply_head(model: ModelConfig, params, key) -> LMHead:
        hidden = family(model).encode(
            params,
            model,
            masked_rows.tokens,
            segments,
            positions=masked_rows.positions,
            key=key,
            policy=config.policy,
        )
        return LMHead.from_params(
            family(model).lm_features(params, model, hidden, policy=config.policy), params, model
        )

    teacher = apply_head(config.teacher, teacher_params, None) if config.teacher else None
    student = apply_head(config.model, params, key if use_dropout else None)
    loss_config = LossConfig(
        config.distill, config.temperature_is_one, config.model.vocab_size, config.policy
    )
    return fused_lm_loss(student, teacher, masked_rows.labels, masked_rows.weights, loss_weights, loss_config)


def accumulate_gradients(
    value_and_grad, params, batch: tuple[MaskedBatch, jax.Array], key, num_microbatches: int
):
    """((value, sums), gradient) of the whole batch, taken in `parts`, one after the other."""
    if num_microbatches == 1:
        return value_and_grad(params, batch, key)

    def add(total, inputs):
        microbatch, index = inputs
        return jax.tree.map(
            jnp.add, total, value_and_grad(params, microbatch, jax.random.fold_in(key, index))
        ), None

    start = (jnp.float32(0), LossSums.zeros()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(
        add, start, (split_microbatches(batch, num_microbatches), jnp.arange(num_microbatches))
    )[0]


def _gap_scale(teacher_gap, distill: Distill):
    """What is left of α_s. Whole before the first loss is known, 0 for good once beaten."""
    mean = teacher_gap["gap"] / jnp.maximum(teacher_gap["weight"], 1e-30)
    scale = jnp.where(teacher_gap["weight"] > 0, schedules.alpha_soft_scale(mean, distill.match_margin), 1.0)
    return jnp.where(teacher_gap["beaten_at"] < 0, scale, 0.0)


def _update_teacher_gap(teacher_gap, sums: LossSums, finite, step, config: StepConfig):
    """The running mean of (student − teacher) hard loss, and the step at which it reached 0."""
    if not config.until_matched:
        return teacher_gap
    decay = config.distill.gap_ema_decay
    loss_gap = decay * teacher_gap["gap"] + (1 - decay) * (sums.hard - sums.teacher_hard) / jnp.maximum(
        sums.predictions, 1
    )
    weight = decay * teacher_gap["weight"] + (1 - decay)
    is_valid = finite & (sums.predictions > 0)
    new_gap = {
        "gap": jnp.where(is_valid, loss_gap, teacher_gap["gap"]),
        "weight": jnp.where(is_valid, weight, teacher_gap["weight"]),
    }
    matched = (teacher_gap["beaten_at"] < 0) & is_valid & (new_gap["gap"] <= 0)
    return {**new_gap, "beaten_at": jnp.where(matched, step, teacher_gap["beaten_at"])}


def _step_metrics(
    sums: LossSums, loss, grad_norm, alpha_soft, skip_counts, teacher_gap
) -> dict[str, jax.Array]:
    count = jnp.maximum(sums.predictions, 1)
    return {
        "loss": loss,
        "hard_loss": sums.hard / count,
        "soft_loss": sums.soft / jnp.maximum(sums.num_selected, 1),
        "soft_loss_at_1": sums.soft_at_1 / count,
        "teacher_hard_loss": sums.teacher_hard / count,
        "selected_share": sums.num_selected / count,
        "alpha_soft": alpha_soft,
        "grad_norm": grad_norm,
        "skipped": skip_counts["total"],
        "skipped_in_row": skip_counts["in_row"],
        "skipped_longest": skip_counts["longest"],
        "beaten_at": teacher_gap["beaten_at"],
    }
