"""Attention within segments, with a backward pass of its own: it keeps the probabilities in
the compute type and nothing else of size [L, L]. Letters of shapes: see layers.py."""

import functools

import jax
import jax.numpy as jnp

from dwt_jax.models.common.matmul import Policy, at_least_fp32, batched_dot, row_major, swap_last_axes

NEG_INF = -1e9  # finite, so that a row without a partner stays free of NaN; exp of it is 0 in fp32


def dot_product_attention(
    projections: tuple[jax.Array, ...],
    segment_ids: tuple[jax.Array, jax.Array],
    policy: Policy,
    keep: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Softmax attention of Q tokens a row over those of the L tokens of the row in their own segment.

    parts: queries, keys and values as they were projected, together [B, L, 3, H, K] (then Q = L), or
    queries [B, Q, 1, H, K] and the others [B, L, 2, H, K]. segments: of queries int [B, Q] and of keys
    int [B, L], 0 is padding. keep: bool [B, H, Q, L], the probabilities that dropout leaves, times
    `scale`, or None. Returns fp32 [B, Q, H, K]. Scores and softmax are fp32.
    """
    mask = segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :]
    return _attention(projections, mask, keep, policy, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(projections, mask, keep, policy: Policy, scale: float):
    return _forward(projections, mask, keep, policy, scale)[0]


def _split_heads(x: jax.Array, policy: Policy) -> jax.Array:
    """[B, L, N, H, K] → compute type [N, B, H, L, K]"""
    return row_major(x.astype(policy.compute_dtype).transpose(2, 0, 3, 1, 4), policy)


def _forward(projections, mask, keep, policy: Policy, scale: float):
    query, key, value = (array for projection in projections for array in _split_heads(projection, policy))
    scores = batched_dot(query, key, (3, 3)) * query.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(jnp.where(mask, scores, NEG_INF), axis=-1)
    context = batched_dot(
        _apply_dropout(probabilities, keep, scale).astype(policy.compute_dtype), value, (3, 2)
    )
    templates = tuple(jnp.zeros(projection.shape[2:3], projection.dtype) for projection in projections)
    residuals = query, key, value, probabilities.astype(policy.compute_dtype), keep, templates
    return context.transpose(0, 2, 1, 3), residuals


def _apply_dropout(x, keep, scale: float):
    return x if keep is None else jnp.where(keep, x * scale, 0)


def _backward(policy: Policy, scale: float, residuals, gradient):
    """Softmax backward: ds = p · (dp − Σ p·dp), here with the scores' factor K^−½."""
    query, key, value, probabilities, keep, templates = residuals
    gradient = _split_heads(gradient[:, :, None], policy)[0]
    p = probabilities.astype(at_least_fp32(probabilities))
    weights = _apply_dropout(p, keep, scale).astype(policy.compute_dtype)
    grad_value = batched_dot(swap_last_axes(weights, policy), gradient, (3, 2))
    grad_p = _apply_dropout(batched_dot(gradient, value, (3, 3)), keep, scale)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdims=True)) * query.shape[-1] ** -0.5
    grad_scores = grad_scores.astype(policy.compute_dtype)
    grad_query = batched_dot(grad_scores, key, (3, 2))
    grad_key = batched_dot(swap_last_axes(grad_scores, policy), query, (3, 2))
    grads = iter((grad_query, grad_key, grad_value))
    grad_projections = (
        jnp.stack([next(grads) for _ in projection]).astype(projection.dtype) for projection in templates
    )  # [N, B, H, L, K]
    return tuple(projection.transpose(1, 3, 0, 2, 4) for projection in grad_projections), None, None


_attention.defvjp(_forward, _backward)
