"""Examples as token ids, in batches padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.data.hf_tokenizer import load
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.datasets import Data, Split, read

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


class Texts:
    """Examples that this process has read and encoded: once, for however many models."""

    def __init__(self) -> None:
        self._data: dict[Examples, Data] = {}
        self._encoded: dict[tuple[Examples, str, int], dict[str, Encoded]] = {}

    def read(self, examples: Examples) -> Data:
        """Raises UserError as examples.read does."""
        if examples not in self._data:
            self._data[examples] = read(examples)
        return self._data[examples]

    def encode(self, examples: Examples, tokenizer: Path, max_length: int) -> dict[str, Encoded]:
        """Every split; models with equal tokenizers share them, wherever those lie."""
        key = examples, load(tokenizer).to_str(), max_length
        if key not in self._encoded:
            splits = self.read(examples).splits.items()
            self._encoded[key] = {name: encode(split, tokenizer, max_length) for name, split in splits}
        return self._encoded[key]


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


WINDOW = 32  # batches that examples are sorted within


def epoch(
    count: int, batch_size: int, seeds: Sequence[int], number: int, lengths: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Rows of the batches of an epoch, int [S, B]: every seed has an order of its own. −1 fills up.

    lengths [count]: batches are of examples of like length. The order is cut into windows, each is
    sorted and cut into batches, and these are dealt in an order that all seeds share, so that seeds
    side by side have their long ones together.
    """
    steps = -(-count // batch_size)
    order = np.full((len(seeds), steps * batch_size), -1)
    for i, seed in enumerate(seeds):
        rows = np.random.default_rng([seed, number]).permutation(count)
        if lengths is not None:
            window = np.arange(count) // (WINDOW * batch_size)
            rows = rows[np.lexsort((lengths[rows], window))]
        order[i, :count] = rows
    parts = np.split(order, steps, axis=1)
    if lengths is None:
        yield from parts
    else:
        yield from (parts[i] for i in np.random.default_rng([number, 0, 0, 1]).permutation(steps))


def in_order(encoded: Encoded, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of batches for evaluation, int [B], the shortest examples first."""
    order = np.argsort(encoded.lengths, kind="stable")
    padded = np.full(-(-len(order) // batch_size) * batch_size, -1)
    padded[: len(order)] = order
    yield from padded.reshape(-1, batch_size)
