"""Attention within segments, with a backward pass of its own: it keeps the probabilities in
the compute type and nothing else of size [L, L]. Letters of shapes: see layers.py."""

import functools

import jax
import jax.numpy as jnp

from dwt_jax.models.common.matmul import Numerics, at_least_fp32, dot, row_major, transposed

MASKED = -1e9  # finite, so that a row without a partner stays free of NaN; exp of it is 0 in fp32


def attend(
    parts: tuple[jax.Array, ...],
    segments: tuple[jax.Array, jax.Array],
    numerics: Numerics,
    keep: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Softmax attention of Q tokens a row over those of the L tokens of the row in their own segment.

    parts: queries, keys and values as they were projected, together [B, L, 3, H, K] (then Q = L), or
    queries [B, Q, 1, H, K] and the others [B, L, 2, H, K]. segments: of queries int [B, Q] and of keys
    int [B, L], 0 is padding. keep: bool [B, H, Q, L], the probabilities that dropout leaves, times
    `scale`, or None. Returns fp32 [B, Q, H, K]. Scores and softmax are fp32.
    """
    same = segments[0][:, None, :, None] == segments[1][:, None, None, :]
    return _attend(parts, same, keep, numerics, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(parts, same, keep, numerics: Numerics, scale: float):
    return _forward(parts, same, keep, numerics, scale)[0]


def _heads(x: jax.Array, numerics: Numerics) -> jax.Array:
    """[B, L, N, H, K] → compute type [N, B, H, L, K]"""
    return row_major(x.astype(numerics.compute).transpose(2, 0, 3, 1, 4), numerics)


def _forward(parts, same, keep, numerics: Numerics, scale: float):
    query, key, value = (one for part in parts for one in _heads(part, numerics))
    scores = dot(query, key, (3, 3)) * query.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(jnp.where(same, scores, MASKED), axis=-1)
    mixed = dot(_dropped(probabilities, keep, scale).astype(numerics.compute), value, (3, 2))
    like = tuple(jnp.zeros(part.shape[2:3], part.dtype) for part in parts)
    saved = query, key, value, probabilities.astype(numerics.compute), keep, like
    return mixed.transpose(0, 2, 1, 3), saved


def _dropped(x, keep, scale: float):
    return x if keep is None else jnp.where(keep, x * scale, 0)


def _backward(numerics: Numerics, scale: float, saved, gradient):
    """Softmax backward: ds = p · (dp − Σ p·dp), here with the scores' factor K^−½."""
    query, key, value, probabilities, keep, like = saved
    gradient = _heads(gradient[:, :, None], numerics)[0]
    p = probabilities.astype(at_least_fp32(probabilities))
    kept = _dropped(p, keep, scale).astype(numerics.compute)
    to_value = dot(transposed(kept, numerics), gradient, (3, 2))
    to_p = _dropped(dot(gradient, value, (3, 3)), keep, scale)
    to_scores = p * (to_p - (p * to_p).sum(-1, keepdims=True)) * query.shape[-1] ** -0.5
    to_scores = to_scores.astype(numerics.compute)
    to_query = dot(to_scores, key, (3, 2))
    to_key = dot(transposed(to_scores, numerics), query, (3, 2))
    each = iter((to_query, to_key, to_value))
    to_parts = (jnp.stack([next(each) for _ in part]).astype(part.dtype) for part in like)  # [N, B, H, L, K]
    return tuple(part.transpose(1, 3, 0, 2, 4) for part in to_parts), None, None


_attend.defvjp(_forward, _backward)
