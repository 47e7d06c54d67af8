"""Batches of prepared data as a pure function of (seed, step).

There is no state besides memory maps: the order of rows is a cipher over positions, so any process can
compute any part of any batch, and a run can resume at any step.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dwt_jax.data.batch import Batch
from dwt_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """One split. Rows are numbered through all shards of all sources."""

    tokens: tuple[np.ndarray, ...]  # by shard, [rows, L]
    segments: tuple[np.ndarray, ...]  # by shard, [rows, L]
    documents: tuple[np.ndarray, ...]  # by shard, [rows], numbered within the source
    bounds: np.ndarray  # int64 [shards + 1]: the first row of each shard, then the number of rows
    sources: np.ndarray  # int64 [sources + 1]: the first row of each source, then the number of rows
    epoch_slots: np.ndarray  # int64 [sources + 1]: the first slot of each source, then the number of slots
    shard_documents: np.ndarray  # int64 [shards]: number of documents in the sources before the shard's
    tokens_per_row: float  # mean over an epoch, without padding


def open_dataset(path: Path, split: str, weights: Sequence[float] | None = None) -> PackedDataset:
    """Memory-map a split of a prepared directory.

    Args:
        path: what `dwt prepare` wrote.
        split: "train" or "held_out".
        weights: for each source, how often each of its rows occurs in one epoch (default: 1); see
            `row_indices`.

    Raises:
        UserError: for a directory without that split or with damaged shards, and for weights of another
            number than the sources or without a single row.
    """
    path = Path(path)
    try:
        split_sources = json.loads((path / "index.json").read_text(encoding="utf-8"))["splits"][split][
            "sources"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: no split '{split}' ({reason}), expected a directory that dwt prepare wrote"
        ) from None
    weights = [1.0] * len(split_sources) if weights is None else list(weights)
    if len(weights) != len(split_sources):
        raise UserError(
            f"{path}: prepared from {len(split_sources)} sources, but data.sources has {len(weights)}"
        )
    shards = [(source, shard) for source in split_sources for shard in source["shards"]]
    _raise_open_file_limit(3 * len(shards))
    arrays = {
        array_name: tuple(
            _open_shard(path / split / f"{shard['name']}.{array_name}.npy", shard["rows"])
            for _, shard in shards
        )
        for array_name in ("tokens", "segments", "documents")
    }
    slots = [round(weight * source["rows"]) for weight, source in zip(weights, split_sources, strict=True)]
    if not sum(slots):
        raise UserError(
            f"{path}: split '{split}' has no rows under the weights {weights}, expected at least one"
        )
    tokens_per_epoch = sum(
        count * source["tokens"] / source["rows"]
        for count, source in zip(slots, split_sources, strict=True)
        if count
    )
    documents_before = dict(
        zip(map(id, split_sources), _offsets(source["documents"] for source in split_sources), strict=False)
    )
    return PackedDataset(
        **arrays,
        bounds=_offsets(shard["rows"] for _, shard in shards),
        sources=_offsets(source["rows"] for source in split_sources),
        epoch_slots=_offsets(slots),
        shard_documents=np.array([documents_before[id(source)] for source, _ in shards], np.int64),
        tokens_per_row=tokens_per_epoch / sum(slots),
    )


def _offsets(counts: Iterator[int] | Sequence[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(counts)], np.int64)


def _open_shard(path: Path, rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}, expected a shard of {rows} rows") from None
    if len(array) != rows:
        raise UserError(f"{path}: holds {len(array)} rows, expected {rows}")
    return array.view(np.ndarray)  # the memory-map class makes every small slice slow


def _raise_open_file_limit(count: int) -> None:
    """Allow `count` memory maps: each keeps a file open, and shells often allow 1024."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    required = count + 512
    if soft < required and soft != resource.RLIM_INFINITY:
        limit = required if hard == resource.RLIM_INFINITY else min(required, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def num_rows(dataset: PackedDataset) -> int:
    """Return the number of rows."""
    return int(dataset.bounds[-1])


def rows_per_epoch(dataset: PackedDataset) -> int:
    """Return the number of slots in one epoch of the mixture: `num_rows` if all weights are 1."""
    return int(dataset.epoch_slots[-1])


def first_document_ids(dataset: PackedDataset) -> np.ndarray:
    """Return the document number of segment 1 of each row; segment s has this number plus s − 1.

    Returns:
        int64 [num_rows]; documents are numbered through all sources of the split.
    """
    document_ids = [
        documents + offset
        for documents, offset in zip(dataset.documents, dataset.shard_documents, strict=True)
    ]
    return np.concatenate(document_ids) if document_ids else np.empty(0, np.int64)


def read_rows(dataset: PackedDataset, indices: np.ndarray) -> Batch:
    """Read rows.

    Args:
        indices: int64 [n], row numbers.

    Returns:
        A batch [n, L] of the stored dtypes, tokens uint16 or uint32 and segment ids uint8 or uint16, since
        casting to int32 on the device costs less than transferring int32.

    Raises:
        IndexError: for a row number out of range.
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= dataset.bounds[-1]):
        raise IndexError(f"rows {indices.min()} to {indices.max()}, expected 0 to {dataset.bounds[-1] - 1}")
    shards = np.searchsorted(dataset.bounds, indices, side="right") - 1
    length = dataset.tokens[0].shape[1]
    tokens = np.empty((len(indices), length), dataset.tokens[0].dtype)
    segments = np.empty((len(indices), length), dataset.segments[0].dtype)
    for shard in np.unique(shards):
        positions = np.flatnonzero(shards == shard)
        shard_rows = indices[positions] - dataset.bounds[shard]
        tokens[positions] = dataset.tokens[shard][shard_rows]
        segments[positions] = dataset.segments[shard][shard_rows]
    return Batch(tokens, segments)


def row_indices(dataset: PackedDataset, seed: int, start: int, stop: int) -> np.ndarray:
    """Return the rows at positions start … stop − 1 of the endless stream of `seed`.

    An epoch has round(weightᵢ · rowsᵢ) slots for source i. Each (seed, epoch) permutes the slots of all
    sources. Slot k of a source with n slots is, in epoch e, its row (e · n + k) mod rows: with weight 1
    each row occurs once, with weight 2 twice, and with weight ½ one half of the rows in one epoch and the
    other half in the next.

    Returns:
        int64 [stop − start], row numbers.
    """
    length = rows_per_epoch(dataset)
    positions = np.arange(start, stop)
    epochs = positions // length
    parts = [
        _permute(positions[epochs == epoch] - epoch * length, length, seed, int(epoch))
        for epoch in np.unique(epochs)
    ]
    slots = np.concatenate(parts) if parts else positions
    source = np.searchsorted(dataset.epoch_slots, slots, side="right") - 1
    num_rows_of, num_slots_of = np.diff(dataset.sources), np.diff(dataset.epoch_slots)
    slots_of_source = slots - dataset.epoch_slots[source]
    return dataset.sources[source] + (epochs * num_slots_of[source] + slots_of_source) % num_rows_of[source]


def _permute(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Apply a permutation of 0 … length − 1, chosen by seed and epoch, to positions.

    A Feistel cipher over the next power of 4, with cycle walking (Black & Rogaway 2002): it is applied
    again to values that are not below `length`. All positions are computed at once. Grain's index_shuffle
    does the same with one call a row, which took ten times as long as the rest of a batch (and with
    4ⁿ + 1 rows repeats one).
    """
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
    result = positions.astype(np.uint64)
    outside = np.arange(len(result))
    while outside.size:
        left, right = result[outside] >> half, result[outside] & low
        for key in keys:
            left, right = right, left ^ (_splitmix64(right ^ key) & low)
        result[outside] = left << half | right
        outside = outside[result[outside] >= length]
    return result.astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of uint64 x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def get_batch(
    dataset: PackedDataset,
    seed: int,
    step: int,
    batch_size: int,
    local_rows: slice | np.ndarray = slice(None),
) -> Batch:
    """Read the rows of the batch of a step.

    Args:
        seed: seed of the row order.
        step: from 0.
        batch_size: rows in the global batch.
        local_rows: which rows of the global batch to read, a slice or int [n]. Any partition of the global
            batch gives the same rows.

    Returns:
        A batch [n, L], as `read_rows` returns it.
    """
    return _read_stream(dataset, seed, step * batch_size, batch_size, local_rows)


def _read_stream(
    dataset: PackedDataset, seed: int, start: int, count: int, local_rows: slice | np.ndarray
) -> Batch:
    """Read `local_rows` of the `count` rows of the stream from position `start` on."""
    if isinstance(local_rows, slice):
        first, last, stride = local_rows.indices(count)
        if stride == 1:  # compute only this part of the order
            return read_rows(dataset, row_indices(dataset, seed, start + first, start + max(first, last)))
    return read_rows(dataset, row_indices(dataset, seed, start, start + count)[local_rows])


def batch_iterator(
    dataset: PackedDataset,
    seed: int,
    batch_size: int | np.ndarray,
    start: int,
    stop: int,
    local_rows: slice | np.ndarray | Mapping[int, np.ndarray] = slice(None),
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Yield the batches of steps start … stop − 1, with `prefetch` batches read ahead by threads.

    Args:
        dataset: the rows.
        seed: seed of the row order.
        batch_size: rows in the global batch. One number for all steps, or int [stop], one number per step,
            counted from step 0 and not from `start`. Each step reads the rows after those of the step before.
        start: the first step.
        stop: the step to stop before.
        local_rows: as for `get_batch`, or a mapping from each number of rows in the global batch to them.
        prefetch: batches read ahead.
    """
    import grain

    sizes = np.broadcast_to(np.asarray(batch_size, np.int64), (stop,))
    first_rows = np.cumsum(sizes) - sizes

    def read_batch(step: int) -> Batch:
        size = int(sizes[step])
        rows = local_rows[size] if isinstance(local_rows, Mapping) else local_rows
        return _read_stream(dataset, seed, int(first_rows[step]), size, rows)

    # As fast as a hand-written thread pool (7 to 11 million tokens a second either way, on two busy cores,
    # with rows of 64). The second thread hides the latency of pages that are read from disk.
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    steps = grain.MapDataset.range(start, stop)
    yield from steps.map(lambda step: read_batch(int(step))).to_iter_dataset(options)
