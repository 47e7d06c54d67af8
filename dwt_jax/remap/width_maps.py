"""Index maps: which source entry each target entry is copied from, and the share of each copy.

Let R [d, D] be the action of a map on activations and A [D, d] its inverse, R·A = 1. Entry j of the target
is a copy of entry index[j] of the source, R[index[j], j] = 1, and has the share A[j, index[j]] = split[j] of
its contribution. The shares of all copies of an entry add up to 1 (not those of `undivided_tile`). Maps
are applied by gathering and scaling, never as matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COPIED, DUPLICATE, NEW = 0, 1, 2
"""Kinds of target entries: the first copy of an entry, a further copy of one, one without a source."""


class AxisMap(NamedTuple):
    """A map from an axis of `old` entries to one of D entries. N: layers of the target."""

    old: int
    index: Any  # int [D], or [N, D] with a map per layer; 0 where an entry is new
    split: Any  # float, shares, the same shape; 0 where an entry is new
    kind: np.ndarray  # int8 [D]: COPIED, DUPLICATE or NEW; concrete inside jit too
    fill: str = "random"  # values of new entries: random, zero or mean
    valid_size: int = -1  # new entries from this index on are padding and get 0; -1: no padding


def truncate(old: int, new: int) -> AxisMap:
    """Return the map of a smaller axis: the first `new` entries."""
    return AxisMap(old, np.arange(new), np.ones(new), np.full(new, COPIED, np.int8))


def pad(old: int, new: int, fill: str) -> AxisMap:
    """Return the old entries, then new ones with zero fan-in: their share is 0."""
    entries = np.arange(new)
    is_old = entries < old
    kind = np.where(is_old, COPIED, NEW).astype(np.int8)
    return AxisMap(old, np.where(is_old, entries, 0), is_old.astype(float), kind, fill)


def tile(old: int, new: int, weights: Any = None) -> AxisMap:
    """Return the map in which entry j is a copy of entry j mod `old`."""
    return copy_map(old, np.arange(new) % old, weights)


def undivided_tile(old: int, new: int) -> AxisMap:
    """Return the map with the old entries in the middle, which wrap around at both ends.

    Each copy has the share 1: shares do not add up to 1.
    """
    offset = (new - old) // 2
    entries = np.arange(new) - offset
    kind = np.where((entries >= 0) & (entries < old), COPIED, DUPLICATE).astype(np.int8)
    return AxisMap(old, entries % old, np.ones(new), kind)


def random_copies(key: jax.Array, old: int, new: int, layers: int = 0, weights: Any = None) -> AxisMap:
    """Return the old entries, then random copies: numbers of copies differ by at most one.

    Args:
        key: random key.
        old: entries of the source.
        new: entries of the target.
        layers: number of layers with a map each. 0: one map for all layers.
        weights: relative shares, [new] or [layers, new]. None: even shares.
    """
    rows, blocks = max(layers, 1), -(-(new - old) // old)
    extra = to_numpy_if_concrete(jax.random.uniform(key, (rows, blocks, old))).argsort(-1).reshape(rows, -1)
    xp = np if isinstance(extra, np.ndarray) else jnp
    identity = np.broadcast_to(np.arange(old), (rows, old))
    index = xp.concatenate([identity, extra[:, : new - old]], axis=1)
    return copy_map(old, index if layers else index[0], weights)


def product(outer: AxisMap, inner: AxisMap) -> AxisMap:
    """Return the map of an axis of `outer` · `inner` entries, entry (i, j) of which is number i·D_inner + j.

    An entry is new if either part is.
    """
    index = outer.index[..., :, None] * inner.old + inner.index[..., None, :]
    split = outer.split[..., :, None] * inner.split[..., None, :]
    kind = np.maximum(outer.kind[:, None], inner.kind[None, :]).reshape(-1)
    shape = (*index.shape[:-2], -1)
    return AxisMap(
        outer.old * inner.old, index.reshape(shape), split.reshape(shape), kind, outer.fill, outer.valid_size
    )


def uneven_weights(key: jax.Array, shape: tuple[int, ...]) -> Any:
    """Return weights from 0.5 to 1.5 for unequal shares, which break the symmetry of copies in training.

    Source: LEMON, Wang et al. 2024, arXiv 2310.07999.
    """
    return to_numpy_if_concrete(jax.random.uniform(key, shape, minval=0.5, maxval=1.5))


def copy_map(old: int, index: Any, weights: Any) -> AxisMap:
    """Return the map of `index` [D] or [N, D], each share proportional to `weights` (None: even shares)."""
    if weights is None:
        weights = np.ones(index.shape)
    if index.ndim == 1:
        split = _split_shares(old, index, weights)
    else:
        parts = [_split_shares(old, *row) for row in zip(index, weights, strict=True)]
        split = np.stack(parts) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)
    kind = np.where(np.arange(index.shape[-1]) < old, COPIED, DUPLICATE).astype(np.int8)
    return AxisMap(old, index, split, kind)


def _split_shares(old: int, index: Any, weights: Any) -> Any:
    if isinstance(index, np.ndarray) and isinstance(weights, np.ndarray):
        weights = weights.astype(float)
        return weights / np.bincount(index, weights, old)[index]
    index, weights = jnp.asarray(index), jnp.asarray(weights)
    return weights / jnp.zeros(old, weights.dtype).at[index].add(weights)[index]


def to_numpy_if_concrete(x: jax.Array) -> Any:
    """Return a concrete array as NumPy, so that host arrays stay on the host; a tracer unchanged."""
    return x if isinstance(x, jax.core.Tracer) else np.asarray(x)
