"""Dropout with masks that are a hash of positions, so that they are equal for every device layout."""

import jax
import jax.numpy as jnp


def dropout_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Draw a dropout mask, or return None without a key or with rate 0.

    The mask is a hash of each entry's index in the array. Every device computes its own rows, and any
    layout gives the same mask. jax.random.bits is not sharded under rbg keys: compiled for 256 chips,
    every chip drew the bits of all (4 GiB of temporaries). Under threefry keys it is, and slower.

    Args:
        key: a PRNG key; its data seed the hash.
        rate: the fraction to drop, from 0 to 1.
        shape: of the mask.

    Returns:
        bool array of this shape, False where an entry is dropped.
    """
    if key is None or rate == 0:
        return None
    key_data = jax.random.key_data(key).reshape(-1)
    row = jax.lax.iota(jnp.uint32, shape[0])
    offset = _lowbias32(_lowbias32(row + key_data[0]) ^ key_data[1])
    stride = _lowbias32(offset + jnp.uint32(0x9E3779B9)) | 1  # else rows are shifted copies of each other
    index = jnp.zeros(shape[1:], jnp.uint32)
    for axis, size in enumerate(shape[1:]):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, shape[1:], axis)
    broadcast_shape = (-1, *(1,) * (len(shape) - 1))
    return _lowbias32(
        index * stride.reshape(broadcast_shape) + offset.reshape(broadcast_shape)
    ) >> 16 < keep_threshold(rate)


def _lowbias32(x: jax.Array) -> jax.Array:
    """Hash uint32 one to one: each bit of x flips each bit of the result with probability one half.

    (lowbias32, C. Wellons' search for multiply-xorshift hashes, 2018; public domain)
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_threshold(rate: float) -> int:
    """Return how many of 65,536 hash values keep an entry."""
    return round((1 - rate) * 65536)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Set a fraction `rate` of x to zero and scale the rest so that the mean stays."""
    keep = dropout_mask(key, rate, x.shape)
    return x if keep is None else jnp.where(keep, x * (65536 / keep_threshold(rate)), 0).astype(x.dtype)
