"""Attention within segments, with a backward pass of its own: it keeps the probabilities in
the compute type and nothing else of size [L, L]. Letters of shapes: see layers.py."""

import functools

import jax
import jax.numpy as jnp

from dwt_jax.model.products import Numerics, at_least_fp32, dot, row_major, transposed

MASKED = -1e9  # finite, so that a row without a partner stays free of NaN; exp of it is 0 in fp32


def attend(
    qkv: jax.Array, segments: jax.Array, numerics: Numerics, keep: jax.Array | None = None, scale: float = 1.0
) -> jax.Array:
    """Softmax attention of every token over the tokens of its own segment.

    qkv: [B, L, 3, H, K]; segments: int [B, L], 0 is padding; keep: bool [B, H, L, L], the
    probabilities that dropout leaves, times `scale`, or None. Returns fp32 [B, L, H, K].
    Scores and softmax are fp32.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return _attend(qkv, same, keep, numerics, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(qkv, same, keep, numerics: Numerics, scale: float):
    return _forward(qkv, same, keep, numerics, scale)[0]


def _heads(x: jax.Array, numerics: Numerics) -> jax.Array:
    """[B, L, N, H, K] → compute type [N, B, H, L, K]"""
    return row_major(x.astype(numerics.compute).transpose(2, 0, 3, 1, 4), numerics)


def _forward(qkv, same, keep, numerics: Numerics, scale: float):
    query, key, value = _heads(qkv, numerics)
    scores = dot(query, key, (3, 3)) * query.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(jnp.where(same, scores, MASKED), axis=-1)
    mixed = dot(_dropped(probabilities, keep, scale).astype(numerics.compute), value, (3, 2))
    saved = query, key, value, probabilities.astype(numerics.compute), keep, jnp.zeros((), qkv.dtype)
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
    to_qkv = jnp.stack([to_query, to_key, to_value]).astype(like.dtype)  # [3, B, H, L, K]
    return to_qkv.transpose(1, 3, 0, 2, 4), None, None


_attend.defvjp(_forward, _backward)
