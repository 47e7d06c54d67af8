"""One step of pre-training: (state, teacher, batch, knobs) → (state, metrics), a pure function.

What is drawn at random comes from (seed, step), so the state is {params, opt_state, step}
and two small records: how many updates were skipped, and how far the student still is
behind its teacher (for `until_beaten`).
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

from dwt_jax.config import Config, Distill, Mask, Model, Optimizer, Schedule
from dwt_jax.distributed.mesh import over, replicated, rows_sharding, shardings, split_rows
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Numerics
from dwt_jax.objectives import schedules
from dwt_jax.objectives.distillation import Sums
from dwt_jax.objectives.fused_lm_loss import Head, Knobs, Static, head_loss
from dwt_jax.objectives.masking import Masked, Tokens, mask_rows, row_keys
from dwt_jax.remap.gates import anneal, has_annealed, share_after
from dwt_jax.remap.optimizer_state import newcomers, warmed
from dwt_jax.runs import optimizer as optimizers

SCHEDULED = ("alpha_hard", "alpha_soft", "temperature", "learning_rate")
"""The scheduled numbers of every step; see `scheduled` for the others."""

TRACES: collections.Counter[str] = collections.Counter()
"""How often each step function was traced: a test holds it at one."""


@dataclass(frozen=True)
class Spec:
    """All that a compiled step depends on. Runs that agree in it share one compilation:
    seeds and scheduled values are arguments, not constants."""

    model: Model
    teacher: Model | None
    mask: Mask
    distill: Distill
    optimizer: Optimizer
    accumulate: int
    tokens: Tokens
    numerics: Numerics
    temperature_is_1: bool
    until_beaten: bool
    columns: tuple[str, ...] = SCHEDULED  # of the knobs


def spec_of(config: Config, teacher: Model | None, tokens: Tokens, numerics: Numerics) -> Spec:
    blank = Schedule()
    temperature, distill = config.distill.temperature, config.distill
    return Spec(
        model=config.model,
        teacher=teacher,
        mask=config.mask,
        distill=dataclasses.replace(
            distill, preset="", alpha_hard=blank, alpha_soft=blank, temperature=blank
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=blank),
        accumulate=config.train.accumulate,
        tokens=tokens,
        numerics=numerics,
        temperature_is_1=temperature.kind == "constant" and temperature.value == 1,
        until_beaten=teacher is not None and distill.alpha_soft.kind == "until_beaten",
        columns=scheduled(config),
    )


def knob_table(config: Config) -> np.ndarray:
    """float32 [steps, columns]: the scheduled numbers of the whole run, columns as in `scheduled`."""
    steps, init = config.train.steps, config.init
    every = (*(getattr(config.distill, name) for name in SCHEDULED[:3]), config.optimizer.learning_rate)
    columns = [schedules.table(schedule, steps) for schedule in every]
    for name in scheduled(config)[len(SCHEDULED) :]:
        columns.append(share_after(np.arange(steps), steps, getattr(init, _SHARES[name]), init.step))
    return np.stack(columns, axis=1)


_SHARES = {"annealed": "anneal", "rewarmed": "rewarm"}  # keys of `init`: over which share of the run


def scheduled(config: Config) -> tuple[str, ...]:
    """The names of the columns of `knob_table`: those of every step; annealed, of the leaves that are
    no parameters; rewarmed, of the updates of what is new in a grown model."""
    more = {"annealed": has_annealed(config.model), "rewarmed": config.init.rewarm > 0}
    return (*SCHEDULED, *(name for name, there in more.items() if there))


def initial_state(params: bert.Params, optimizer: Optimizer) -> dict[str, Any]:
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "opt_state": optimizers.make(optimizer).init(params),
        "step": zero,
        "skipped": {"total": zero, "in_row": zero, "longest": zero},
        "behind": {"gap": jnp.float32(0), "weight": jnp.float32(0), "beaten_at": jnp.full((), -1, jnp.int32)},
    }


def abstract_state(model: Model, optimizer: Optimizer) -> dict[str, Any]:
    """Shapes and types of the state, no memory."""
    return jax.eval_shape(lambda: initial_state(bert.init(model, jax.random.key(0)), optimizer))


@functools.cache
def compiled(spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """The jitted step of `spec` on `mesh`: step(state, teacher_params, batch, knobs, seed[, old]).

    State and teacher are laid out by the role table, the batch's rows over (data, fsdp); the
    state is donated. teacher_params: None when spec.teacher is None. batch: {tokens,
    segments} [B, L]. knobs: float32, columns as in spec.columns. seed: uint32. old: what
    `moments.known` says of a grown model, where its new entries are warmed up (`rewarmed`).
    """
    layout = shardings(abstract_state(spec.model, spec.optimizer), mesh)
    spec = dataclasses.replace(spec, numerics=over(mesh, spec.numerics))
    teacher = shardings(bert.abstract(spec.teacher), mesh) if spec.teacher else None
    same = replicated(mesh)
    return jax.jit(
        functools.partial(_step, spec),
        in_shardings=(layout, teacher, rows_sharding(mesh), same, same)
        + ((same,) if "rewarmed" in spec.columns else ()),
        out_shardings=(layout, same),
        donate_argnums=0,
    )


def _step(spec: Spec, state, teacher_params, batch, knobs, seed, old=None):
    TRACES["teacher" if spec.teacher else "alone"] += 1
    alpha_hard, alpha_soft, temperature, learning_rate, *_ = knobs
    share = dict(zip(spec.columns, knobs, strict=True))
    if spec.until_beaten:
        alpha_soft = alpha_soft * _beaten_share(state["behind"], spec.distill)
    step, params = state["step"], state["params"]
    keys = row_keys(seed, step, jnp.arange(batch["tokens"].shape[0]))
    whole, scalars = masked_batch(spec, batch, keys, (alpha_hard, alpha_soft, temperature))

    def loss(params, part, key):
        params = anneal(params, share["annealed"]) if "annealed" in share else params
        return forward(spec, params, teacher_params, part, scalars, key)

    key = jax.random.fold_in(jax.random.key(seed), step)  # of dropout alone, see layers.keep_mask
    (value, sums), gradient = accumulated(
        jax.value_and_grad(loss, has_aux=True), params, whole, key, spec.accumulate
    )
    norm = optax.global_norm(gradient)
    # Known before the update, so that all of it is one pass over memory. An update is finite where these
    # are: config.py bounds the learning rate, β₁, β₂, ε and the decay. That it is sensible, nobody promises.
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    update, opt_state = optimizers.make(spec.optimizer).update(gradient, state["opt_state"], params)
    if "rewarmed" in share:
        update = warmed(update, newcomers(old, params), share["rewarmed"])
    params_after = jax.tree.map(lambda p, u: p - learning_rate * u, params, update)
    kept = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params_after, opt_state), (params, state["opt_state"])
    )
    in_row = jnp.where(finite, 0, state["skipped"]["in_row"] + 1)
    skipped = {
        "total": state["skipped"]["total"] + ~finite,
        "in_row": in_row,
        "longest": jnp.maximum(state["skipped"]["longest"], in_row),
    }
    behind = _behind(state["behind"], sums, finite, step, spec)
    metrics = _metrics(sums, value, norm, alpha_soft, skipped, behind)
    state = {"params": kept[0], "opt_state": kept[1], "step": step + 1, "skipped": skipped, "behind": behind}
    return state, metrics


def masked_batch(spec: Spec, batch, keys, knobs) -> tuple[tuple[Masked, jax.Array], Knobs]:
    """A batch with its masks, (Masked, segments [B, L]), and the scalars of its objective.

    keys: of the rows' masks. knobs: columns as in SCHEDULED, of which the first three are read.
    """
    masked = mask_rows(batch["tokens"], batch["segments"], keys, spec.mask, spec.tokens)
    alpha_hard, alpha_soft, temperature = knobs[:3]
    count = jnp.maximum(masked.weights.sum(), 1)
    return (masked, batch["segments"]), Knobs(alpha_hard, alpha_soft, temperature, count)


def forward(spec: Spec, params, teacher_params, part, knobs: Knobs, key) -> tuple[jax.Array, Sums]:
    """Objective and sums of one part of a batch, (Masked, segments [B, L])."""
    masked, segments = part
    dropping = spec.model.hidden_dropout_prob > 0 or spec.model.attention_probs_dropout_prob > 0

    def read(model: Model, params, key) -> Head:
        hidden = bert.encode(
            params, model, masked.tokens, segments, at=masked.positions, key=key, numerics=spec.numerics
        )
        return Head.of(bert.mlm_features(params, model, hidden, numerics=spec.numerics), params)

    teacher = read(spec.teacher, teacher_params, None) if spec.teacher else None
    student = read(spec.model, params, key if dropping else None)
    static = Static(spec.distill, spec.temperature_is_1, spec.model.vocab_size, spec.numerics)
    return head_loss(student, teacher, masked.labels, masked.weights, knobs, static)


def accumulated(value_and_grad, params, batch: tuple[Masked, jax.Array], key, parts: int):
    """((value, sums), gradient) of the whole batch, taken in `parts`, one after the other."""
    if parts == 1:
        return value_and_grad(params, batch, key)

    def add(total, inputs):
        part, index = inputs
        return jax.tree.map(
            jnp.add, total, value_and_grad(params, part, jax.random.fold_in(key, index))
        ), None

    start = (jnp.float32(0), Sums.zeros()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, (split_rows(batch, parts), jnp.arange(parts)))[0]


def _beaten_share(behind, distill: Distill):
    """What is left of α_s. Whole before the first loss is known, 0 for good once beaten."""
    mean = behind["gap"] / jnp.maximum(behind["weight"], 1e-30)
    share = jnp.where(behind["weight"] > 0, schedules.beaten_share(mean, distill.beaten_margin), 1.0)
    return jnp.where(behind["beaten_at"] < 0, share, 0.0)


def _behind(behind, sums: Sums, finite, step, spec: Spec):
    """The running mean of (student − teacher) hard loss, and the step at which it reached 0."""
    if not spec.until_beaten:
        return behind
    decay = spec.distill.beaten_smoothing
    gap = decay * behind["gap"] + (1 - decay) * (sums.hard - sums.teacher_hard) / jnp.maximum(
        sums.predictions, 1
    )
    weight = decay * behind["weight"] + (1 - decay)
    known = finite & (sums.predictions > 0)
    after = {
        "gap": jnp.where(known, gap, behind["gap"]),
        "weight": jnp.where(known, weight, behind["weight"]),
    }
    beaten = (behind["beaten_at"] < 0) & known & (after["gap"] <= 0)
    return {**after, "beaten_at": jnp.where(beaten, step, behind["beaten_at"])}


def _metrics(sums: Sums, value, norm, alpha_soft, skipped, behind) -> dict[str, jax.Array]:
    count = jnp.maximum(sums.predictions, 1)
    return {
        "loss": value,
        "hard_loss": sums.hard / count,
        "soft_loss": sums.soft / jnp.maximum(sums.selected, 1),
        "soft_loss_at_1": sums.soft_at_1 / count,
        "teacher_hard_loss": sums.teacher_hard / count,
        "selected_share": sums.selected / count,
        "alpha_soft": alpha_soft,
        "grad_norm": norm,
        "skipped": skipped["total"],
        "skipped_in_row": skipped["in_row"],
        "skipped_longest": skipped["longest"],
        "beaten_at": behind["beaten_at"],
    }
