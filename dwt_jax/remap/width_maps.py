"""Index maps: what each entry of a target axis is taken from, and how copies share its work.

With R for what a map does to activations and A for its undoing, R·A = 1: entry j of the
target is a copy of entry index[j] of the source, R[index[j], j] = 1, and takes the share
A[j, index[j]] = split[j] of it, where the shares of all copies of an entry add up to 1.
Applied by gathering and scaling, never as matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COPIED, DUPLICATE, NEW = 0, 1, 2
"""An entry that stays what and where it was; a further copy; one without a source."""


class AxisMap(NamedTuple):
    """From an axis of `old` entries to one of D. N: layers of the target."""

    old: int
    index: Any  # int [D], or [N, D] with a map for every layer; 0 where an entry is new
    split: Any  # float, the same shape; 0 where an entry is new
    kind: np.ndarray  # int8 [D]: COPIED, DERIVED or NEW, known without any value
    fill: str = "random"  # what new entries get: random, zero or mean
    valid_size: int = -1  # new entries from here on are padding and get 0


def truncate(old: int, new: int) -> AxisMap:
    """Shrinking: the first `new` entries."""
    return AxisMap(old, np.arange(new), np.ones(new), np.full(new, COPIED, np.int8))


def pad(old: int, new: int, fill: str) -> AxisMap:
    """The old entries, then new ones that nobody reads: their split is 0."""
    entries = np.arange(new)
    is_old = entries < old
    kind = np.where(is_old, COPIED, NEW).astype(np.int8)
    return AxisMap(old, np.where(is_old, entries, 0), is_old.astype(float), kind, fill)


def tile(old: int, new: int, weights: Any = None) -> AxisMap:
    """Entry j is a copy of j mod old."""
    return copy_map(old, np.arange(new) % old, weights)


def random_copies(key: jax.Array, old: int, new: int, layers: int = 0, weights: Any = None) -> AxisMap:
    """The old entries, then copies drawn at random, each entry as often as any other (once more
    or less where it does not come out even). layers: draw for every layer anew."""
    rows, blocks = max(layers, 1), -(-(new - old) // old)
    extra = to_numpy_if_concrete(jax.random.uniform(key, (rows, blocks, old))).argsort(-1).reshape(rows, -1)
    xp = np if isinstance(extra, np.ndarray) else jnp
    identity = np.broadcast_to(np.arange(old), (rows, old))
    index = xp.concatenate([identity, extra[:, : new - old]], axis=1)
    return copy_map(old, index if layers else index[0], weights)


def uneven_weights(key: jax.Array, shape: tuple[int, ...]) -> Any:
    """Weights from 0.5 to 1.5 for shares that differ, which is what parts copies in training
    (LEMON, Wang et al. 2024)."""
    return to_numpy_if_concrete(jax.random.uniform(key, shape, minval=0.5, maxval=1.5))


def copy_map(old: int, index: Any, weights: Any) -> AxisMap:
    """The map of `index`, each share in proportion to `weights` (None: even)."""
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
    """On the host where there is a value, so that host arrays never meet a device; unchanged
    inside a trace."""
    return x if isinstance(x, jax.core.Tracer) else np.asarray(x)
