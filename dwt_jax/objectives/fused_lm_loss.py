"""The vocabulary head and the loss fused: the gradient is computed in the forward pass.

Logits are by far the largest arrays of a step: [B·P, V] in fp32, several times over in autodiff. Here the
gradient with respect to the logits is formed while they exist, and multiplied at once into the gradients
of features and output embedding; no residual of size V·B·P is kept. With `distill.loss_chunk_rows` = n the
logits of n rows exist at a time. By default a chunk has equally many positions of all rows, at most
MAX_LOGITS per device (with `token_selection` entropy: whole rows, at least one). Neither costs FLOPs.
`fused_lm_loss_reference` is the plain form.
Letters of shapes: see distillation.py; D is the hidden size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dwt_jax.config import Distill
from dwt_jax.distributed.mesh import split_microbatches
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import (
    lm_logits,
    max_rows,
    merge_positions,
    num_position_chunks,
    split_positions,
)
from dwt_jax.models.common.matmul import Policy, batched_dot, swap_last_axes
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.distillation import LossSums, LossWeights, loss_sums, mix_logits, total_loss
from dwt_jax.objectives.teacher_sample import TeacherSample


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LMHead:
    """The inputs of the logits, or the gradient with respect to them.

    Attributes:
        features: [B, P, D], of the predicted positions.
        embedding: [V, D], the output embedding.
        bias: [V]; None: the head has none.
    """

    features: jax.Array
    embedding: jax.Array
    bias: jax.Array | None

    @classmethod
    def from_params(cls, features: jax.Array, params: Params, model: ModelConfig) -> "LMHead":
        """Return the head of a model over features [B, P, D]."""
        return cls(features, *family(model).output_embedding(params))


class LossConfig(NamedTuple):
    """Static settings of the loss."""

    distill: Distill
    temperature_is_one: bool
    vocab_size: int
    policy: Policy
    teacher_weights: tuple[float, ...] = (1.0,)


Teachers = tuple[LMHead, ...] | TeacherSample
"""Features and head of each teacher; empty: no soft loss. Or a sample of the teacher's distribution."""
_Chunk = tuple[jax.Array, tuple[jax.Array, ...] | TeacherSample, jax.Array, jax.Array]
"""Some rows: features of the student and of each teacher [B, P, D] or a sample; labels and weights [B, P]."""
_LossAndSums = tuple[jax.Array, LossSums]


def fused_lm_loss(
    student: LMHead,
    teachers: Teachers,
    labels: jax.Array,
    weights: jax.Array,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> tuple[jax.Array, LossSums]:
    """Compute the loss of some rows and the sums to be logged.

    The loss is differentiable with respect to the student only: its gradient is the scalar cotangent times
    the gradient from the forward pass.

    Args:
        student: features and head of the student.
        teachers: the same of each teacher (see `mix_logits`), or a sample; empty: no soft loss.
        labels: int [B, P].
        weights: float32 [B, P], 1 for a prediction, 0 for a filler.
        loss_weights: scheduled values and the global number of predictions.
        loss_config: static settings.

    Returns:
        (fp32 scalar loss of equation 3, Lee et al. 2023; sums over the rows).
    """
    teachers, loss_weights = jax.lax.stop_gradient((teachers, loss_weights))
    return _fused_lm_loss(student, teachers, labels, weights, loss_weights, loss_config)


def fused_lm_loss_reference(
    student: LMHead,
    teachers: Teachers,
    labels: jax.Array,
    weights: jax.Array,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> tuple[jax.Array, LossSums]:
    """Compute what `fused_lm_loss` computes, all logits at once, with JAX's own backward pass."""

    def logits(head: LMHead) -> jax.Array:
        return _logits(head, head.features, loss_config).reshape(*labels.shape, -1)

    teacher: jax.Array | TeacherSample | None = None
    if isinstance(teachers, TeacherSample):
        teacher = teachers
    elif teachers:
        all_logits = [jax.lax.stop_gradient(logits(head)) for head in teachers]
        teacher = mix_logits(all_logits, loss_config.teacher_weights)
    sums = loss_sums(
        logits(student),
        teacher,
        labels,
        weights,
        loss_weights.temperature,
        loss_config.distill,
        loss_config.temperature_is_one,
    )
    return total_loss(sums, loss_weights, loss_config.distill), sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused_lm_loss(
    student: LMHead,
    teachers: Teachers,
    labels: jax.Array,
    weights: jax.Array,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> _LossAndSums:
    return _forward(student, teachers, labels, weights, loss_weights, loss_config)[0]


def _forward(
    student: LMHead,
    teachers: Teachers,
    labels: jax.Array,
    weights: jax.Array,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> tuple[_LossAndSums, LMHead]:
    heads: tuple[LMHead, ...] = () if isinstance(teachers, TeacherSample) else teachers
    rows = teachers if isinstance(teachers, TeacherSample) else tuple(head.features for head in heads)
    inputs = (student.features, rows, labels, weights)
    split, merge = _chunking(labels.shape, loss_config)
    if split is None:
        return _chunk_loss_and_grad(student, heads, inputs, loss_weights, loss_config)

    def add_chunk(total: Any, chunk: _Chunk) -> tuple[Any, jax.Array]:
        value, gradient = _chunk_loss_and_grad(student, heads, chunk, loss_weights, loss_config)
        new = value, gradient.embedding, gradient.bias
        return jax.tree.map(jnp.add, total, new), gradient.features

    zeros = (
        (jnp.float32(0), LossSums.zeros()),
        jnp.zeros_like(student.embedding),
        jax.tree.map(jnp.zeros_like, student.bias),
    )
    (value, grad_embedding, grad_bias), features = jax.lax.scan(add_chunk, zeros, split(inputs))
    return value, LMHead(merge(features), grad_embedding, grad_bias)


_Split = Callable[[Any], Any]


def _chunking(shape: tuple[int, ...], loss_config: LossConfig) -> tuple[_Split | None, _Split]:
    """How a tree of arrays [B, P, …] is split into chunks, and how arrays of chunks are merged again.

    Returns:
        (a tree → one with a leading axis of chunks; its inverse for one array). The first is None if there
        is one chunk.
    """
    (rows, positions), distill = shape, loss_config.distill
    if distill.loss_chunk_rows:
        return _chunks_of_rows(rows, min(distill.loss_chunk_rows, rows))
    count = num_position_chunks(rows, positions, loss_config.vocab_size, loss_config.policy)
    if count == 1:
        return None, lambda x: x
    if distill.token_selection == "entropy":  # it compares the positions of a row
        return _chunks_of_rows(rows, max_rows(rows, positions, loss_config.vocab_size, loss_config.policy))
    return (
        functools.partial(jax.tree.map, functools.partial(split_positions, count=count)),
        merge_positions,
    )


def _chunks_of_rows(rows: int, chunk_rows: int) -> tuple[_Split | None, _Split]:
    """As `_chunking`, by rows. The last chunk is filled up with rows of weight 0."""
    num_chunks = -(-rows // chunk_rows)
    if num_chunks == 1:
        return None, lambda x: x

    def pad_rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, num_chunks * chunk_rows - rows),) + ((0, 0),) * (x.ndim - 1))

    def merge(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(chunk_rows * num_chunks, *x.shape[2:])[:rows]

    return lambda tree: split_microbatches(jax.tree.map(pad_rows, tree), num_chunks), merge


def _chunk_loss_and_grad(
    student: LMHead,
    teachers: tuple[LMHead, ...],
    chunk: _Chunk,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> tuple[_LossAndSums, LMHead]:
    """Return ((loss, sums), gradient by the student's head) of some rows."""
    features, teacher_rows, labels, weights = chunk
    shape = (*labels.shape, -1)
    policy = loss_config.policy
    teacher: jax.Array | TeacherSample | None = None
    if isinstance(teacher_rows, TeacherSample):
        teacher = teacher_rows
    elif teachers:
        heads = zip(teachers, teacher_rows, strict=True)
        logits = [_logits(head, x, loss_config).reshape(shape) for head, x in heads]
        teacher = mix_logits(logits, loss_config.teacher_weights)

    def loss_from_logits(student_logits: jax.Array) -> _LossAndSums:
        sums = loss_sums(
            student_logits.reshape(shape),
            teacher,
            labels,
            weights,
            loss_weights.temperature,
            loss_config.distill,
            loss_config.temperature_is_one,
        )
        return total_loss(sums, loss_weights, loss_config.distill), sums

    student_logits = _logits(student, features, loss_config)
    value, grad_logits = jax.value_and_grad(loss_from_logits, has_aux=True)(student_logits)
    operand = grad_logits.astype(policy.compute_dtype)
    flat = features.reshape(-1, features.shape[-1]).astype(policy.compute_dtype)
    grad_features = batched_dot(operand, student.embedding.astype(policy.compute_dtype), (1, 0))
    grad_features = grad_features.reshape(features.shape).astype(features.dtype)
    grad_embedding = batched_dot(swap_last_axes(operand, policy), flat, (1, 0))
    grad_bias = None if student.bias is None else _sum_rows(grad_logits, policy)
    return value, LMHead(grad_features, grad_embedding, grad_bias)


def _sum_rows(x: jax.Array, policy: Policy) -> jax.Array:
    """Sum [M, V] over M. On CPU by a product: XLA's sum over rows takes 30 times as long for large V."""
    if not policy.single_cpu_layout:
        return x.sum(0)
    return batched_dot(jnp.ones((1, x.shape[0]), x.dtype), x, (1, 0))[0]


def head_logits(head: LMHead, features: jax.Array, vocab_size: int, policy: Policy) -> jax.Array:
    """Return fp32 logits [B·P, V] of a head over features [B, P, D], which may be a part of its own."""
    flat = features.reshape(-1, features.shape[-1])
    return lm_logits(flat, head.embedding, head.bias, vocab_size, policy)


def _logits(head: LMHead, features: jax.Array, loss_config: LossConfig) -> jax.Array:
    return head_logits(head, features, loss_config.vocab_size, loss_config.policy)


def _backward(
    loss_config: LossConfig, gradient: LMHead, cotangent: _LossAndSums
) -> tuple[LMHead, None, None, None, None]:
    scale, _ = cotangent  # the sums are for the log
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradient), None, None, None, None


_fused_lm_loss.defvjp(_forward, _backward)
