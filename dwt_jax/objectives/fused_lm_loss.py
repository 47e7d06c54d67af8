"""The objective behind the vocabulary head, with its gradient taken on the way forward.

Logits are by far the largest arrays of a step: [B·P, V] in fp32, several times over in
autodiff. Here the gradient by the logits is formed while they exist, and multiplied out at
once into the gradients of features and word table; what is kept does not contain V·B·P. With
`distill.loss_chunk_rows` = n the logits of n rows exist at a time, at no cost in FLOPs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dwt_jax.config import Distill
from dwt_jax.distributed.mesh import split_microbatches
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_logits
from dwt_jax.models.common.matmul import Policy, batched_dot, swap_last_axes
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.distillation import LossSums, loss_sums, total_loss


class LMHead(NamedTuple):
    """What logits are made of: features [B, P, D], decoder [V, D], bias [V]."""

    features: jax.Array
    embedding: jax.Array
    bias: jax.Array

    @classmethod
    def from_params(cls, features: jax.Array, params: Params, model: ModelConfig) -> "LMHead":
        return cls(features, *family(model).output_embedding(params))


class LossWeights(NamedTuple):
    """The scheduled numbers of a step and the global count of predictions: fp32 scalars."""

    alpha_hard: jax.Array
    alpha_soft: jax.Array
    temperature: jax.Array
    predictions: jax.Array


class LossConfig(NamedTuple):
    distill: Distill
    temperature_is_one: bool
    vocab_size: int
    policy: Policy


def fused_lm_loss(
    student: LMHead,
    teacher: LMHead | None,
    labels: jax.Array,
    weights: jax.Array,
    loss_weights: LossWeights,
    loss_config: LossConfig,
) -> tuple[jax.Array, LossSums]:
    """The objective (objective.py) over labels and weights [B, P], and the sums to be logged.

    Differentiable by the student alone. The student's gradient is one number times what was
    computed on the way forward.
    """
    if teacher is not None:
        teacher = jax.lax.stop_gradient(teacher)
    return _fused_lm_loss(student, teacher, labels, weights, jax.lax.stop_gradient(loss_weights), loss_config)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused_lm_loss(student, teacher, labels, weights, loss_weights, loss_config: LossConfig):
    return _forward(student, teacher, labels, weights, loss_weights, loss_config)[0]


def _forward(student: LMHead, teacher, labels, weights, loss_weights: LossWeights, loss_config: LossConfig):
    rows = labels.shape[0]
    chunk_rows = min(loss_config.distill.loss_chunk_rows or rows, rows)
    teacher_features = None if teacher is None else teacher.features
    inputs = (student.features, teacher_features, labels, weights)
    if chunk_rows == rows:
        return _chunk_loss_and_grad(student, teacher, inputs, loss_weights, loss_config)
    num_chunks = -(-rows // chunk_rows)

    def pad_rows(x):  # with rows of weight 0
        return jnp.pad(x, ((0, num_chunks * chunk_rows - rows),) + ((0, 0),) * (x.ndim - 1))

    def add_chunk(total, chunk):
        value, gradient = _chunk_loss_and_grad(student, teacher, chunk, loss_weights, loss_config)
        new = value, gradient.embedding, gradient.bias
        return jax.tree.map(jnp.add, total, new), gradient.features

    zeros = (
        (jnp.float32(0), LossSums.zeros()),
        jnp.zeros_like(student.embedding),
        jnp.zeros_like(student.bias),
    )
    inputs = split_microbatches(jax.tree.map(pad_rows, inputs), num_chunks)
    (value, table, bias), features = jax.lax.scan(add_chunk, zeros, inputs)
    features = features.swapaxes(0, 1).reshape(chunk_rows * num_chunks, *features.shape[2:])[:rows]
    return value, LMHead(features, table, bias)


def _chunk_loss_and_grad(
    student: LMHead, teacher: LMHead | None, chunk, loss_weights: LossWeights, loss_config: LossConfig
):
    """((loss, sums), gradient by the student's head) of some rows."""
    features, teacher_features, labels, weights = chunk
    shape = (*labels.shape, -1)
    policy = loss_config.policy

    def logits(head: LMHead, features):
        flat = features.reshape(-1, features.shape[-1])
        return lm_logits(flat, head.embedding, head.bias, loss_config.vocab_size, policy)

    teacher_logits = None if teacher is None else logits(teacher, teacher_features).reshape(shape)

    def loss_from_logits(student_logits):
        sums = loss_sums(
            student_logits.reshape(shape),
            teacher_logits,
            labels,
            weights,
            loss_weights.temperature,
            loss_config.distill,
            loss_config.temperature_is_one,
        )
        return total_loss(sums, *loss_weights, loss_config.distill), sums

    value, grad_logits = jax.value_and_grad(loss_from_logits, has_aux=True)(logits(student, features))
    operand = grad_logits.astype(policy.compute_dtype)
    flat = features.reshape(-1, features.shape[-1]).astype(policy.compute_dtype)
    grad_features = batched_dot(operand, student.embedding.astype(policy.compute_dtype), (1, 0)).reshape(
        features.shape
    )
    grad_embedding = batched_dot(swap_last_axes(operand, policy), flat, (1, 0))
    grad_bias = grad_logits.sum(0)
    return value, LMHead(grad_features.astype(features.dtype), grad_embedding, grad_bias)


def _backward(loss_config: LossConfig, gradient: LMHead, cotangent):
    scale, _ = cotangent  # the sums are for the log
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradient), None, None, None, None


_fused_lm_loss.defvjp(_forward, _backward)
