"""Examples as token ids, in batches padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.data.pretrained import load
from dwt_jax.finetune.examples import Split

AT_ONCE = 10_000  # texts that the tokenizer holds


class Encoded(NamedTuple):
    """Token ids of all examples, one after the other."""

    tokens: np.ndarray  # int32
    types: np.ndarray  # int32, 1 in the second text of a pair (where the tokenizer says so)
    starts: np.ndarray  # int64 [N + 1]
    labels: np.ndarray  # int32 or float32 [N]; zeros where there are none

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __len__(self) -> int:  # of examples
        return len(self.labels)


class Batch(NamedTuple):
    """Arrays of shape [..., B, L] and [..., B]; rows that fill up a batch have weight 0."""

    tokens: Any
    segments: Any  # 1 where there is a token
    types: Any
    labels: Any
    weights: Any  # float32


def encode(split: Split, tokenizer: Path, max_length: int) -> Encoded:
    """As the tokenizer frames its texts (`[CLS] a [SEP] b [SEP]`), the longer of a pair cut first."""
    tokens = load(tokenizer)
    tokens.enable_truncation(max_length, strategy="longest_first")
    texts: list[Any] = split.first
    if split.second is not None:
        texts = list(zip(split.first, split.second, strict=True))
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(texts), AT_ONCE):
        for one in tokens.encode_batch_fast(texts[start : start + AT_ONCE]):
            ids.append(np.array(one.ids, np.int32))
            types.append(np.array(one.type_ids, np.int32))
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    labels = np.zeros(len(ids), np.int32) if split.labels is None else split.labels
    return Encoded(np.concatenate(ids), np.concatenate(types), starts, labels)


def gather(encoded: Encoded, rows: np.ndarray, lengths: Sequence[int], pad_id: int) -> Batch:
    """The examples `rows` (int [..., B], −1: none) in the smallest of `lengths` that holds the longest."""
    real = rows >= 0
    index = np.maximum(rows, 0)
    own = np.where(real, encoded.lengths[index], 0)
    length = next(length for length in lengths if length >= own.max())
    at = np.arange(length)
    inside = at < own[..., None]
    flat = np.minimum(encoded.starts[index][..., None] + at, len(encoded.tokens) - 1)
    return Batch(
        tokens=np.where(inside, encoded.tokens[flat], pad_id).astype(np.int32),
        segments=inside.astype(np.int32),
        types=np.where(inside, encoded.types[flat], 0).astype(np.int32),
        labels=encoded.labels[index],
        weights=real.astype(np.float32),
    )


def epoch(count: int, batch_size: int, seeds: Sequence[int], number: int) -> Iterator[np.ndarray]:
    """Rows of the batches of an epoch, int [S, B]: every seed has an order of its own. −1 fills up."""
    steps = -(-count // batch_size)
    order = np.full((len(seeds), steps * batch_size), -1)
    for i, seed in enumerate(seeds):
        order[i, :count] = np.random.default_rng([seed, number]).permutation(count)
    yield from np.split(order, steps, axis=1)


def in_order(encoded: Encoded, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of batches for evaluation, int [B], the shortest examples first."""
    order = np.argsort(encoded.lengths, kind="stable")
    padded = np.full(-(-len(order) // batch_size) * batch_size, -1)
    padded[: len(order)] = order
    yield from padded.reshape(-1, batch_size)
