"""Logits of the LM head, for every family."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dwt_jax.models import family
from dwt_jax.models.common.layers import padded_vocab_size
from dwt_jax.models.common.matmul import Policy, batched_dot
from dwt_jax.models.protocol import ModelConfig, Params

MAX_LOGITS = 1 << 27
"""Logits that exist at a time on a device by default, 512 MiB in fp32."""

PADDING_LOGIT = -1e9  # of vocabulary columns that no token owns; finite: 0 · (−∞ − −∞) would be NaN


def lm_logits(
    features: jax.Array, embedding: jax.Array, bias: jax.Array | None, vocab_size: int, policy: Policy
) -> jax.Array:
    """Compute logits from features [N, D], the output embedding [V, D] and bias [V] (None: no bias).

    Returns:
        fp32 [N, V]; columns of the padded vocabulary are at about PADDING_LOGIT.
    """
    # Through the bias: a mask would be another pass over all logits.
    is_token = jnp.arange(embedding.shape[0]) < vocab_size
    bias = jnp.where(is_token, 0.0 if bias is None else bias, PADDING_LOGIT)
    return (
        batched_dot(features.astype(policy.compute_dtype), embedding.astype(policy.compute_dtype), (1, 1))
        + bias
    )


def lm_head_logits(
    params: Params, config: ModelConfig, hidden: jax.Array, *, policy: Policy = Policy()
) -> jax.Array:
    """Return fp32 logits [..., V] of hidden states [..., D]."""
    features = family(config).lm_features(params, config, hidden, policy=policy)
    flat = features.reshape(-1, features.shape[-1])
    logits = lm_logits(flat, *family(config).output_embedding(params), config.vocab_size, policy)
    return logits.reshape(*hidden.shape[:-1], -1)


def num_position_chunks(rows: int, positions: int, vocab_size: int, policy: Policy) -> int:
    """Return the smallest number of equal chunks of `positions` with at most MAX_LOGITS per device each.

    Args:
        rows: rows of the batch, over all devices.
        positions: P, positions per row.
        vocab_size: size of the vocabulary, without padding.
        policy: policy of the program, for its devices.
    """
    row_logits = -(-rows // _num_devices(policy)) * padded_vocab_size(vocab_size)
    divisors = (count for count in range(1, positions + 1) if positions % count == 0)
    return next((count for count in divisors if positions // count * row_logits <= MAX_LOGITS), positions)


def max_rows(rows: int, positions: int, vocab_size: int, policy: Policy) -> int:
    """Return the number of rows with at most MAX_LOGITS per device, at least one per device.

    Arguments as for `num_position_chunks`.
    """
    devices = _num_devices(policy)
    return min(rows, max(1, MAX_LOGITS // (positions * padded_vocab_size(vocab_size))) * devices)


def _num_devices(policy: Policy) -> int:
    return 1 if policy.batch_sharding is None else policy.batch_sharding.num_devices


def split_positions(x: jax.Array, count: int) -> jax.Array:
    """Split the positions of all rows into chunks.

    The shape [B, P, …] becomes [count, B, P / count, …].
    """
    return x.reshape(x.shape[0], count, -1, *x.shape[2:]).swapaxes(0, 1)


def merge_positions(x: jax.Array) -> jax.Array:
    """Merge the chunks of `split_positions`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def map_positions(function: Callable[[Any], Any], inputs: Any, vocab_size: int, policy: Policy) -> Any:
    """Call a function that computes logits on trees of arrays [B, P, …], with MAX_LOGITS at a time."""
    rows, positions = jax.tree.leaves(inputs)[0].shape[:2]
    count = num_position_chunks(rows, positions, vocab_size, policy)
    if count == 1:
        return function(inputs)
    chunks = jax.tree.map(lambda x: split_positions(x, count), inputs)
    return jax.tree.map(merge_positions, jax.lax.map(function, chunks))
