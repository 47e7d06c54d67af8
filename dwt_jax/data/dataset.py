"""Rows of prepared data as a pure function of (seed, step).

Nothing is held but memory maps: the order is a cipher over positions, so any process can
compute any part of any batch, and a run resumes anywhere.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dwt_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Rows:
    """One split, its sources one after the other: row numbers count through all shards."""

    tokens: tuple[np.ndarray, ...]  # by shard, [rows, L]
    segments: tuple[np.ndarray, ...]  # by shard, [rows, L]
    documents: tuple[np.ndarray, ...]  # by shard, [rows], counted within the source
    bounds: np.ndarray  # int64 [shards + 1]: the first row of each shard, and the end
    sources: np.ndarray  # int64 [sources + 1]: the first row of each source, and the end
    places: np.ndarray  # int64 [sources + 1]: the same in an epoch of the mixture
    shard_documents: np.ndarray  # int64 [shards]: documents of the sources before the shard's


def open_rows(path: Path, split: str, weights: Sequence[float] | None = None) -> Rows:
    """Memory-map a split ('train' or 'held_out') of a prepared directory.

    weights: for each source, how often its rows are seen in one epoch (all 1 by default); see
    `row_indices`. Raises UserError for a directory without that split or with broken shards,
    and where the weights are not one for each source or leave nothing.
    """
    path = Path(path)
    try:
        found = json.loads((path / "index.json").read_text())["splits"][split]["sources"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: no split '{split}' ({reason}), expected what dwt prepare writes") from None
    weights = [1.0] * len(found) if weights is None else list(weights)
    if len(weights) != len(found):
        raise UserError(f"{path}: prepared from {len(found)} sources, but data.sources has {len(weights)}")
    shards = [(source, shard) for source in found for shard in source["shards"]]
    _allow_open_files(3 * len(shards))
    parts = {
        part: tuple(_map(path / split / f"{shard['name']}.{part}.npy", shard["rows"]) for _, shard in shards)
        for part in ("tokens", "segments", "documents")
    }
    places = [round(weight * source["rows"]) for weight, source in zip(weights, found, strict=True)]
    if not sum(places):
        raise UserError(f"{path}: split '{split}' has no rows under the weights {weights}, expected some")
    before = dict(zip(map(id, found), _sums(source["documents"] for source in found), strict=False))
    return Rows(
        **parts,
        bounds=_sums(shard["rows"] for _, shard in shards),
        sources=_sums(source["rows"] for source in found),
        places=_sums(places),
        shard_documents=np.array([before[id(source)] for source, _ in shards], np.int64),
    )


def _sums(counts: Iterator[int] | Sequence[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(counts)], np.int64)


def _map(path: Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}, expected a shard of {rows} rows") from None
    if len(array) != rows:
        raise UserError(f"{path}: holds {len(array)} rows, expected {rows}")
    return array.view(np.ndarray)  # the memory-map class makes every small slice slow


def _allow_open_files(count: int) -> None:
    """A map keeps its file open, and shells allow 1024 of them."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft < wanted and soft != resource.RLIM_INFINITY:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def count(rows: Rows) -> int:
    """Rows there are."""
    return int(rows.bounds[-1])


def epoch_rows(rows: Rows) -> int:
    """Places in one epoch of the mixture; `count(rows)` where all weights are 1."""
    return int(rows.places[-1])


def first_documents(rows: Rows) -> np.ndarray:
    """int64 [count(rows)]: the document of each row's segment 1, numbered through all sources of
    the split; segment s belongs to the s − 1-th after it."""
    shifted = [part + before for part, before in zip(rows.documents, rows.shard_documents, strict=True)]
    return np.concatenate(shifted) if shifted else np.empty(0, np.int64)


def gather(rows: Rows, indices: np.ndarray) -> dict[str, np.ndarray]:
    """tokens, segments: [n, L] of rows int64 [n], as stored (uint16 or uint32; uint8 or uint16):
    the cast to int32 costs less on the device than its transfer. IndexError outside of the rows."""
    indices = np.asarray(indices, np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= rows.bounds[-1]):
        raise IndexError(f"rows {indices.min()} to {indices.max()}, expected 0 to {rows.bounds[-1] - 1}")
    shards = np.searchsorted(rows.bounds, indices, side="right") - 1
    length = rows.tokens[0].shape[1]
    tokens = np.empty((len(indices), length), rows.tokens[0].dtype)
    segments = np.empty((len(indices), length), rows.segments[0].dtype)
    for shard in np.unique(shards):
        where = np.flatnonzero(shards == shard)
        inside = indices[where] - rows.bounds[shard]
        tokens[where] = rows.tokens[shard][inside]
        segments[where] = rows.segments[shard][inside]
    return {"tokens": tokens, "segments": segments}


def row_indices(rows: Rows, seed: int, start: int, stop: int) -> np.ndarray:
    """int64 [stop − start]: the rows at those positions of the endless stream of `seed`.

    An epoch has round(weightᵢ · rowsᵢ) places for source i, in an order of its own for each
    (seed, epoch). Place k of a source in epoch e shows its row (e · places + k) mod rows: with
    weight 1 every row once, with weight 2 twice, and with weight ½ one half of them in one epoch
    and the other half in the next.
    """
    length = epoch_rows(rows)
    positions = np.arange(start, stop)
    epochs = positions // length
    parts = [
        _shuffle(positions[epochs == epoch] - epoch * length, length, seed, int(epoch))
        for epoch in np.unique(epochs)
    ]
    shuffled = np.concatenate(parts) if parts else positions
    source = np.searchsorted(rows.places, shuffled, side="right") - 1
    sizes, places = np.diff(rows.sources), np.diff(rows.places)
    return rows.sources[source] + (epochs * places[source] + shuffled - rows.places[source]) % sizes[source]


def _shuffle(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of 0 … length − 1, chosen by seed and epoch, takes the positions.

    A Feistel cipher over the next power of 4, walked until it lands inside (Black & Rogaway
    2002), all positions at once. Grain's index_shuffle does the same one call a row, which
    took ten times as long as the rest of a batch (and with 4ⁿ + 1 rows shows one twice).
    """
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    found = positions.astype(np.uint64)
    outside = np.arange(len(found))
    while outside.size:
        left, right = found[outside] >> half, found[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        found[outside] = left << half | right
        outside = outside[found[outside] >= length]
    return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of uint64 x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def batch(
    rows: Rows, seed: int, step: int, batch_size: int, part: slice | np.ndarray = slice(None)
) -> dict[str, np.ndarray]:
    """The batch of a step: tokens, segments [B, L].

    part: which rows of the global batch this process wants, a slice or int [n]. Any partition into
    parts gives the same rows as the whole.
    """
    if isinstance(part, np.ndarray):
        return gather(rows, row_indices(rows, seed, step * batch_size, (step + 1) * batch_size)[part])
    first, last, stride = part.indices(batch_size)
    if stride == 1:  # a process computes no more of the order than it shows
        numbers = row_indices(rows, seed, step * batch_size + first, step * batch_size + max(first, last))
    else:
        numbers = row_indices(rows, seed, step * batch_size, (step + 1) * batch_size)[part]
    return gather(rows, numbers)


def batches(
    rows: Rows,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    part: slice | np.ndarray = slice(None),
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """`batch` for steps start … stop − 1, `prefetch` of them read ahead by threads."""
    import grain

    # As fast as a hand-made pool of threads (7 to 11 million tokens a second either way, two cores,
    # rows of 64, the machine busy); one thread more than one hides a page that has to come from disk.
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    steps = grain.MapDataset.range(start, stop)
    yield from steps.map(lambda step: batch(rows, seed, int(step), batch_size, part)).to_iter_dataset(options)
