"""Masked attention with a custom backward pass.

It saves only the probabilities, in the compute dtype, and nothing else of size [L, L].
`dot_product_attention_reference` is the plain form. Letters of shapes: see models/bert.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dwt_jax.models.common.matmul import Policy, at_least_fp32, batched_dot, row_major, swap_last_axes

NEG_INF = -1e9  # finite, so that a row without a partner stays free of NaN; exp of it is 0 in fp32


def dot_product_attention(
    projections: tuple[jax.Array, ...],
    mask: jax.Array,
    policy: Policy,
    keep: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Compute softmax attention of Q tokens a row over the L tokens of the row.

    Args:
        projections: projected queries, keys and values as one array [B, L, 3, H, K] (then Q = L), or
            queries [B, Q, 1, H, K] and keys and values [B, L, 2, H, K].
        mask: bool [B, 1, Q, L], which keys a query attends to, see `segment_mask`.
        policy: dtypes of the products. Scores and softmax are fp32.
        keep: bool [B, H, Q, L], the probabilities that dropout keeps, or None.
        scale: factor of the probabilities that dropout keeps.

    Returns:
        fp32 [B, Q, H, K].
    """
    return _attention(projections, mask, keep, policy, scale)


def dot_product_attention_reference(
    projections: tuple[jax.Array, ...],
    mask: jax.Array,
    policy: Policy,
    keep: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Compute what `dot_product_attention` computes, with JAX's own backward pass."""
    stacked = [projection[:, :, i] for projection in projections for i in range(projection.shape[2])]
    query, key, value = (x.astype(policy.compute_dtype) for x in stacked)
    dtype = at_least_fp32(query)
    scores = jnp.einsum("bqhk,blhk->bhql", query, key, preferred_element_type=dtype)
    scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, NEG_INF)
    weights = _apply_dropout(jax.nn.softmax(scores, axis=-1), keep, scale).astype(policy.compute_dtype)
    return jnp.einsum("bhql,blhk->bqhk", weights, value, preferred_element_type=dtype)


def segment_mask(query_segment_ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return whether query and key are in the same segment.

    Args:
        query_segment_ids: of the queries, int [B, Q].
        segment_ids: of the keys, int [B, L].

    Returns:
        bool [B, 1, Q, L].
    """
    return query_segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def window_mask(query_positions: jax.Array, positions: jax.Array, distance: int) -> jax.Array:
    """Return whether a key is at most `distance` tokens from the query, on either side.

    Args:
        query_positions: of the queries in their rows, int [B, Q].
        positions: of the keys, int [B, L].
        distance: half of the window.

    Returns:
        bool [B, 1, Q, L].
    """
    return jnp.abs(query_positions[:, None, :, None] - positions[:, None, None, :]) <= distance


def causal_mask(query_positions: jax.Array, positions: jax.Array) -> jax.Array:
    """Return whether a key is the query itself or before it.

    Args:
        query_positions: of the queries in their rows, int [B, Q].
        positions: of the keys, int [B, L].

    Returns:
        bool [B, 1, Q, L].
    """
    return query_positions[:, None, :, None] >= positions[:, None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(
    projections: tuple[jax.Array, ...], mask: jax.Array, keep: jax.Array | None, policy: Policy, scale: float
) -> jax.Array:
    return _forward(projections, mask, keep, policy, scale)[0]


def _split_heads(x: jax.Array, policy: Policy) -> jax.Array:
    """[B, L, N, H, K] → compute type [N, B, H, L, K]"""
    return row_major(x.astype(policy.compute_dtype).transpose(2, 0, 3, 1, 4), policy)


def _forward(
    projections: tuple[jax.Array, ...], mask: jax.Array, keep: jax.Array | None, policy: Policy, scale: float
) -> tuple[jax.Array, Any]:
    query, key, value = (array for projection in projections for array in _split_heads(projection, policy))
    scores = batched_dot(query, key, (3, 3)) * query.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(jnp.where(mask, scores, NEG_INF), axis=-1)
    context = batched_dot(
        _apply_dropout(probabilities, keep, scale).astype(policy.compute_dtype), value, (3, 2)
    )
    templates = tuple(jnp.zeros(projection.shape[2:3], projection.dtype) for projection in projections)
    residuals = query, key, value, probabilities.astype(policy.compute_dtype), keep, templates
    return context.transpose(0, 2, 1, 3), residuals


def _apply_dropout(x: jax.Array, keep: jax.Array | None, scale: float) -> jax.Array:
    return x if keep is None else jnp.where(keep, x * scale, 0)


def _backward(policy: Policy, scale: float, residuals: Any, gradient: jax.Array) -> Any:
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
