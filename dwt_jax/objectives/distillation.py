"""The objective L = α_h · H + α_s · S at the masked positions, and what is logged of it.

H is the MLM cross-entropy, S a divergence between teacher and student (Lee et al. 2023,
equations 1–3). From logits on; head.py puts the
vocabulary head before it. Letters: B rows, P masked positions a row, V padded vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dwt_jax.config import Distill


class LossSums(NamedTuple):
    """Sums over the masked positions, all fp32 scalars; divide by `predictions`, the global one."""

    predictions: jax.Array
    hard: jax.Array  # −log p_student(label)
    soft: jax.Array  # the divergence at the temperature, over the selected positions, without t²
    soft_at_1: jax.Array  # the same at temperature 1 over all positions: comparable across settings
    teacher_hard: jax.Array  # −log p_teacher(label)
    num_selected: jax.Array  # positions that the soft loss was kept at

    @classmethod
    def zeros(cls) -> "LossSums":
        return cls(*(jnp.float32(0) for _ in cls._fields))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy −log softmax(z)[y] in nats: fp32 [..., V], int [...] → [...]."""
    return jax.nn.logsumexp(logits, axis=-1) - _pick(logits, labels)


def _pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def kd_divergence(
    student: jax.Array, teacher: jax.Array, temperature: jax.Array | float, divergence: str
) -> jax.Array:
    """The divergence of softmax(z/t) between teacher and student in nats: [..., V] twice → [...].

    forward_kl: KL(teacher ‖ student), the paper's equation 2; reverse_kl: the other way
    round; jensen_shannon: the mean of both towards their mixture, at most log 2.
    With Z = logsumexp: KL(p ‖ q) = Σ p · (z_p − z_q) − Z_p + Z_q, one pass over the logits.
    """
    student, teacher = student / temperature, teacher / temperature
    if divergence == "forward_kl":
        return _kl(teacher, student)
    if divergence == "reverse_kl":
        return _kl(student, teacher)
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    log_mean = jnp.logaddexp(log_s, log_t) - jnp.log(2.0)
    terms = jnp.exp(log_t) * (log_t - log_mean) + jnp.exp(log_s) * (log_s - log_mean)
    return 0.5 * terms.sum(-1)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    z_p, z_q = jax.nn.logsumexp(p, axis=-1), jax.nn.logsumexp(q, axis=-1)
    return (jnp.exp(p - z_p[..., None]) * (p - q)).sum(-1) - z_p + z_q


def token_weights(student, teacher, labels, weights, distill: Distill) -> jax.Array:
    """Which positions keep the soft loss, as 0 or 1: [B, P, V] twice, [B, P] twice → [B, P].

    teacher_better: the teacher gives the label more probability than the student does.
    entropy: of each row's predictions, the share `drop_fraction` where the teacher's
    entropy is least is dropped; by row, so that the choice does not depend on batch,
    devices or tiles; a row of a few predictions may round to dropping none.
    """
    if distill.token_selection == "all":
        return weights
    if distill.token_selection == "teacher_better":
        teacher_better = cross_entropy(teacher, labels) < cross_entropy(student, labels)
        return weights * jax.lax.stop_gradient(teacher_better.astype(jnp.float32))
    log_p = jax.nn.log_softmax(teacher)
    entropy = jnp.where(weights > 0, -(jnp.exp(log_p) * log_p).sum(-1), jnp.inf)
    rank = jnp.argsort(jnp.argsort(entropy, axis=-1), axis=-1)
    num_dropped = jnp.round(distill.drop_fraction * weights.sum(-1, keepdims=True))
    return weights * (rank >= num_dropped)


def loss_sums(
    student, teacher, labels, weights, temperature, distill: Distill, temperature_is_one: bool
) -> LossSums:
    """Sums over logits [B, P, V]; teacher may be None. `at_1`: the temperature is always 1."""
    hard = (cross_entropy(student, labels) * weights).sum()
    count = weights.sum()
    if teacher is None:
        return LossSums.zeros()._replace(predictions=count, hard=hard)
    selected_weights = token_weights(student, teacher, labels, weights, distill)
    soft = kd_divergence(student, teacher, 1.0 if temperature_is_one else temperature, distill.divergence)
    soft_at_1 = (
        soft
        if temperature_is_one
        else kd_divergence(jax.lax.stop_gradient(student), teacher, 1.0, distill.divergence)
    )
    return LossSums(
        predictions=count,
        hard=hard,
        soft=(soft * selected_weights).sum(),
        soft_at_1=(jax.lax.stop_gradient(soft_at_1) * weights).sum(),
        teacher_hard=(cross_entropy(teacher, labels) * weights).sum(),
        num_selected=selected_weights.sum(),
    )


def total_loss(sums: LossSums, alpha_hard, alpha_soft, temperature, count, distill: Distill) -> jax.Array:
    """α_h · H + α_s · S (· t² if asked), both means over the global `count` of predictions.

    The soft loss too is divided by all predictions, not only by the selected ones: dropping
    positions lowers its share.
    """
    soft_scale = temperature**2 if distill.scale_by_temperature_squared else 1.0
    return (alpha_hard * sums.hard + alpha_soft * soft_scale * sums.soft) / count
