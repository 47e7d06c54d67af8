"""The objective behind the vocabulary head, with its gradient taken on the way forward.

Logits are by far the largest arrays of a step: [B·P, V] in fp32, several times over in
autodiff. Here the gradient by the logits is formed while they exist, and multiplied out at
once into the gradients of features and word table; what is kept does not contain V·B·P. With
`distill.tile` = n the logits of n rows exist at a time, at no cost in FLOPs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dwt_jax.config import Distill
from dwt_jax.distributed.mesh import split_rows
from dwt_jax.models.bert import Params, decode, decoder_table
from dwt_jax.models.common.matmul import Numerics, dot, transposed
from dwt_jax.objectives.distillation import Sums, objective, position_losses


class Head(NamedTuple):
    """What logits are made of: features [B, P, D], decoder [V, D], bias [V]."""

    features: jax.Array
    table: jax.Array
    bias: jax.Array

    @classmethod
    def of(cls, features: jax.Array, params: Params) -> "Head":
        return cls(features, decoder_table(params), params["mlm"]["bias"])


class Knobs(NamedTuple):
    """The scheduled numbers of a step and the global count of predictions: fp32 scalars."""

    alpha_hard: jax.Array
    alpha_soft: jax.Array
    temperature: jax.Array
    predictions: jax.Array


class Static(NamedTuple):
    distill: Distill
    temperature_is_1: bool
    vocab_size: int
    numerics: Numerics


def head_loss(
    student: Head, teacher: Head | None, labels: jax.Array, weights: jax.Array, knobs: Knobs, static: Static
) -> tuple[jax.Array, Sums]:
    """The objective (objective.py) over labels and weights [B, P], and the sums to be logged.

    Differentiable by the student alone. The student's gradient is one number times what was
    computed on the way forward.
    """
    if teacher is not None:
        teacher = jax.lax.stop_gradient(teacher)
    return _head_loss(student, teacher, labels, weights, jax.lax.stop_gradient(knobs), static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _head_loss(student, teacher, labels, weights, knobs, static: Static):
    return _forward(student, teacher, labels, weights, knobs, static)[0]


def _forward(student: Head, teacher, labels, weights, knobs: Knobs, static: Static):
    rows = labels.shape[0]
    tile = min(static.distill.tile or rows, rows)
    teacher_features = None if teacher is None else teacher.features
    parts = (student.features, teacher_features, labels, weights)
    if tile == rows:
        return _tile(student, teacher, parts, knobs, static)
    tiles = -(-rows // tile)

    def padded(x):  # with rows of weight 0
        return jnp.pad(x, ((0, tiles * tile - rows),) + ((0, 0),) * (x.ndim - 1))

    def one(total, part):
        value, gradient = _tile(student, teacher, part, knobs, static)
        new = value, gradient.table, gradient.bias
        return jax.tree.map(jnp.add, total, new), gradient.features

    start = (jnp.float32(0), Sums.zeros()), jnp.zeros_like(student.table), jnp.zeros_like(student.bias)
    parts = split_rows(jax.tree.map(padded, parts), tiles)
    (value, table, bias), features = jax.lax.scan(one, start, parts)
    features = features.swapaxes(0, 1).reshape(tile * tiles, *features.shape[2:])[:rows]
    return value, Head(features, table, bias)


def _tile(student: Head, teacher: Head | None, part, knobs: Knobs, static: Static):
    """((loss, sums), gradient by the student's head) of some rows."""
    features, teacher_features, labels, weights = part
    shape = (*labels.shape, -1)
    numerics = static.numerics

    def logits(head: Head, features):
        flat = features.reshape(-1, features.shape[-1])
        return decode(flat, head.table, head.bias, static.vocab_size, numerics)

    teacher_logits = None if teacher is None else logits(teacher, teacher_features).reshape(shape)

    def of_logits(student_logits):
        sums = position_losses(
            student_logits.reshape(shape),
            teacher_logits,
            labels,
            weights,
            knobs.temperature,
            static.distill,
            static.temperature_is_1,
        )
        return objective(sums, *knobs, static.distill), sums

    value, by_logits = jax.value_and_grad(of_logits, has_aux=True)(logits(student, features))
    operand = by_logits.astype(numerics.compute)
    flat = features.reshape(-1, features.shape[-1]).astype(numerics.compute)
    by_features = dot(operand, student.table.astype(numerics.compute), (1, 0)).reshape(features.shape)
    by_table = dot(transposed(operand, numerics), flat, (1, 0))
    by_bias = by_logits.sum(0)
    return value, Head(by_features.astype(features.dtype), by_table, by_bias)


def _backward(static: Static, gradient: Head, outside):
    factor, _ = outside  # the sums are for the log
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), gradient), None, None, None, None


_head_loss.defvjp(_forward, _backward)
