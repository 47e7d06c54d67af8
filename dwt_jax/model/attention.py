"""Attention within segments."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

MASKED = -1e9  # finite, so that a row without a partner stays free of NaN; exp of it is 0 in fp32


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    compute: jnp.dtype,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Softmax attention of every token over the tokens of its own segment.

    query, key, value: [B, L, H, K]; segments: int [B, L], 0 is padding; drop: applied to the
    probabilities [B, H, L, L]. Returns fp32 [B, L, H, K]. Scores and softmax are fp32.
    """
    query, key, value = (x.astype(compute).swapaxes(1, 2) for x in (query, key, value))  # [B, H, L, K]
    scores = jnp.einsum("bhqk,bhmk->bhqm", query, key, preferred_element_type=jnp.float32)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    scores = jnp.where(same, scores * query.shape[-1] ** -0.5, MASKED)
    probabilities = drop(jax.nn.softmax(scores, axis=-1)).astype(compute)
    mixed = jnp.einsum("bhqm,bhmk->bhqk", probabilities, value, preferred_element_type=jnp.float32)
    return mixed.swapaxes(1, 2)
