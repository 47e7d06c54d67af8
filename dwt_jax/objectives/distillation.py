"""The loss L = α_h · H + α_s · S at the predicted positions, and the sums that are logged.

H is the cross-entropy with the labels, S a divergence between teacher and student (Lee et al. 2023,
equations 1–3). This module starts from logits; fused_lm_loss.py adds the vocabulary head. Letters of shapes:
B rows, P predicted positions a row, V padded vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dwt_jax.config import Distill
from dwt_jax.objectives.teacher_sample import TeacherSample, sample_divergence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over predicted positions, fp32 scalars; divided by `predictions` over all devices, means.

    Attributes:
        predictions: number of positions.
        hard: −log p_student(label).
        soft: the divergence at the temperature, over the selected positions, without t².
        soft_at_1: the divergence at temperature 1 over all positions: comparable across settings.
        teacher_hard: −log p_teacher(label).
        num_selected: number of positions whose soft loss counts, see `token_weights`.
    """

    predictions: jax.Array
    hard: jax.Array
    soft: jax.Array
    soft_at_1: jax.Array
    teacher_hard: jax.Array
    num_selected: jax.Array

    @classmethod
    def zeros(cls) -> "LossSums":
        """Return sums over no position."""
        return cls(*(jnp.float32(0) for _ in dataclasses.fields(cls)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossWeights:
    """Inputs of a step's loss besides logits and labels: fp32 scalars.

    Attributes:
        alpha_hard: α_h.
        alpha_soft: α_s.
        temperature: t of the soft loss.
        predictions: number of predictions of the global batch; the loss is divided by it.
    """

    alpha_hard: jax.Array | float
    alpha_soft: jax.Array | float
    temperature: jax.Array | float
    predictions: jax.Array | float


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy −log softmax(z)[y] in nats, fp32 [...].

    Args:
        logits: z, fp32 [..., V].
        labels: y, int [...].
    """
    return jax.nn.logsumexp(logits, axis=-1) - _pick(logits, labels)


def _pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def kd_divergence(
    student: jax.Array, teacher: jax.Array, temperature: jax.Array | float, divergence: str
) -> jax.Array:
    """Return the divergence of softmax(z/t) between teacher and student in nats.

    With Z = logsumexp: KL(p ‖ q) = Σ p · (z_p − z_q) − Z_p + Z_q, one pass over the logits.

    Args:
        student: logits [..., V].
        teacher: logits [..., V].
        temperature: t, scalar.
        divergence: forward_kl, KL(teacher ‖ student), equation 2 of Lee et al. 2023; reverse_kl, KL(student
            ‖ teacher); jensen_shannon, the mean of both towards their mixture, at most log 2.

    Returns:
        fp32 [...].
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


def mix_logits(logits: Sequence[jax.Array], weights: Sequence[float]) -> jax.Array:
    """Return logits of an ensemble, whose probabilities are the weighted mean of its models'.

    They are log Σ w · softmax(z), so that temperature, divergence and token selection apply as for a single
    model. The mean of the logits would be a different ensemble, the geometric mean.

    Args:
        logits: z of each model, fp32 [..., V]. Those of a single model are returned as they are.
        weights: w, with sum 1.
    """
    if len(logits) == 1:
        return logits[0]
    terms = [math.log(w) + jax.nn.log_softmax(z) for z, w in zip(logits, weights, strict=True)]
    return functools.reduce(jnp.logaddexp, terms)


def entropy(log_p: jax.Array) -> jax.Array:
    """Return the entropy −Σ p · log p in nats, fp32 [...], of log p [..., V]."""
    return -(jnp.exp(log_p) * log_p).sum(-1)


def token_weights(
    student: jax.Array,
    teacher: jax.Array | TeacherSample,
    labels: jax.Array,
    weights: jax.Array,
    distill: Distill,
) -> jax.Array:
    """Return the weight of the soft loss at each position, `weights` or 0.

    teacher_better: a position counts if the teacher gives the label a higher probability than the student.
    entropy: in each row, the fraction `drop_fraction` of the predictions with the lowest teacher entropy is
    dropped. Selection by row makes the choice independent of batch, devices and chunks. For a row with few
    predictions the number may round to 0.

    Args:
        student: logits [B, P, V].
        teacher: logits [B, P, V], or a sample.
        labels: int [B, P].
        weights: float32 [B, P], 1 for a prediction, 0 for a filler.
        distill: token_selection and drop_fraction.
    """
    if distill.token_selection == "all":
        return weights
    if distill.token_selection == "teacher_better":
        if isinstance(teacher, TeacherSample):
            teacher_hard = -teacher.label_log_prob
        else:
            teacher_hard = cross_entropy(teacher, labels)
        teacher_better = teacher_hard < cross_entropy(student, labels)
        return weights * jax.lax.stop_gradient(teacher_better.astype(jnp.float32))
    if isinstance(teacher, TeacherSample):
        teacher_entropy = teacher.entropy
    else:
        teacher_entropy = entropy(jax.nn.log_softmax(teacher))
    teacher_entropy = jnp.where(weights > 0, teacher_entropy, jnp.inf)
    rank = jnp.argsort(jnp.argsort(teacher_entropy, axis=-1), axis=-1)
    num_dropped = jnp.round(distill.drop_fraction * weights.sum(-1, keepdims=True))
    return weights * (rank >= num_dropped)


def loss_sums(
    student: jax.Array,
    teacher: jax.Array | TeacherSample | None,
    labels: jax.Array,
    weights: jax.Array,
    temperature: jax.Array | float,
    distill: Distill,
    temperature_is_one: bool,
) -> LossSums:
    """Sum the losses over all positions.

    Args:
        student: logits [B, P, V].
        teacher: logits [B, P, V]; None: the teacher's sums are 0.
        labels: int [B, P].
        weights: float32 [B, P], 1 for a prediction, 0 for a filler.
        temperature: t of the soft loss, scalar.
        distill: divergence and selection of tokens.
        temperature_is_one: whether t is 1 in the whole run; saves a second divergence at temperature 1.
    """
    hard = (cross_entropy(student, labels) * weights).sum()
    count = weights.sum()
    if teacher is None:
        return dataclasses.replace(LossSums.zeros(), predictions=count, hard=hard)
    selected_weights = token_weights(student, teacher, labels, weights, distill)
    if isinstance(teacher, TeacherSample):
        soft = sample_divergence(student, teacher)
        return LossSums(
            predictions=count,
            hard=hard,
            soft=(soft * selected_weights).sum(),
            soft_at_1=(jax.lax.stop_gradient(soft) * weights).sum(),
            teacher_hard=-(teacher.label_log_prob * weights).sum(),
            num_selected=selected_weights.sum(),
        )
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


def total_loss(sums: LossSums, weights: LossWeights, distill: Distill) -> jax.Array:
    """Return α_h · H + α_s · S (· t² with `scale_by_temperature_squared`), means over all predictions.

    The soft loss is also divided by all predictions, not only by the selected ones: dropping positions
    lowers its share.
    """
    soft_scale = weights.temperature**2 if distill.scale_by_temperature_squared else 1.0
    return (
        weights.alpha_hard * sums.hard + weights.alpha_soft * soft_scale * sums.soft
    ) / weights.predictions
