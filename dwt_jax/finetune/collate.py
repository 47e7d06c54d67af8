"""Examples as token ids, in batches padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.datasets import ExampleSplit, TaskData, read_examples

TOKENIZER_BATCH_SIZE = 10_000  # texts that the tokenizer holds


class EncodedExamples(NamedTuple):
    """Token ids of all examples, one after the other."""

    tokens: np.ndarray  # int32
    token_type_ids: np.ndarray  # int32, 1 in the second text of a pair (where the tokenizer says so)
    offsets: np.ndarray  # int64 [N + 1]
    labels: np.ndarray  # int32 or float32 [N]; zeros where there are none

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:  # of examples
        return len(self.labels)


class ExampleBatch(NamedTuple):
    """Arrays of shape [..., B, L] and [..., B]; rows that fill up a batch have weight 0."""

    tokens: Any
    segment_ids: Any  # 1 where there is a token
    token_type_ids: Any
    labels: Any
    weights: Any  # float32


def encode_examples(split: ExampleSplit, tokenizer: Path, max_length: int) -> EncodedExamples:
    """As the tokenizer frames its texts (`[CLS] a [SEP] b [SEP]`), the longer of a pair cut first."""
    hf_tokenizer = load_hf_tokenizer(tokenizer)
    hf_tokenizer.enable_truncation(max_length, strategy="longest_first")
    texts: list[Any] = split.first
    if split.second is not None:
        texts = list(zip(split.first, split.second, strict=True))
    ids: list[np.ndarray] = []
    token_type_ids: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENIZER_BATCH_SIZE):
        for encoding in hf_tokenizer.encode_batch_fast(texts[start : start + TOKENIZER_BATCH_SIZE]):
            ids.append(np.array(encoding.ids, np.int32))
            token_type_ids.append(np.array(encoding.type_ids, np.int32))
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    labels = np.zeros(len(ids), np.int32) if split.labels is None else split.labels
    return EncodedExamples(np.concatenate(ids), np.concatenate(token_type_ids), offsets, labels)


class ExampleCache:
    """Examples that this process has read and encoded: once, for however many models."""

    def __init__(self) -> None:
        self._data: dict[Examples, TaskData] = {}
        self._encoded: dict[tuple[Examples, str, int], dict[str, EncodedExamples]] = {}

    def read(self, examples: Examples) -> TaskData:
        """Raises UserError as datasets.read_examples does."""
        if examples not in self._data:
            self._data[examples] = read_examples(examples)
        return self._data[examples]

    def encode(self, examples: Examples, tokenizer: Path, max_length: int) -> dict[str, EncodedExamples]:
        """Every split; models with equal tokenizers share them, wherever those lie."""
        key = examples, load_hf_tokenizer(tokenizer).to_str(), max_length
        if key not in self._encoded:
            splits = self.read(examples).splits.items()
            self._encoded[key] = {
                name: encode_examples(split, tokenizer, max_length) for name, split in splits
            }
        return self._encoded[key]


def collate_examples(
    encoded: EncodedExamples, rows: np.ndarray, lengths: Sequence[int], pad_id: int
) -> ExampleBatch:
    """The examples `rows` (int [..., B], −1: none) in the smallest of `lengths` that holds the longest."""
    valid = rows >= 0
    index = np.maximum(rows, 0)
    row_lengths = np.where(valid, encoded.lengths[index], 0)
    length = next(length for length in lengths if length >= row_lengths.max())
    positions = np.arange(length)
    is_token = positions < row_lengths[..., None]
    flat_index = np.minimum(encoded.offsets[index][..., None] + positions, len(encoded.tokens) - 1)
    return ExampleBatch(
        tokens=np.where(is_token, encoded.tokens[flat_index], pad_id).astype(np.int32),
        segment_ids=is_token.astype(np.int32),
        token_type_ids=np.where(is_token, encoded.token_type_ids[flat_index], 0).astype(np.int32),
        labels=encoded.labels[index],
        weights=valid.astype(np.float32),
    )


SORT_WINDOW_BATCHES = 32  # batches that examples are sorted within


def epoch_batch_indices(
    num_examples: int,
    batch_size: int,
    seeds: Sequence[int],
    epoch_index: int,
    lengths: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Rows of the batches of an epoch, int [S, B]: every seed has an order of its own. −1 fills up.

    lengths [count]: batches are of examples of like length. The order is cut into windows, each is
    sorted and cut into batches, and these are dealt in an order that all seeds share, so that seeds
    side by side have their long ones together.
    """
    steps = -(-num_examples // batch_size)
    order = np.full((len(seeds), steps * batch_size), -1)
    for i, seed in enumerate(seeds):
        rows = np.random.default_rng([seed, epoch_index]).permutation(num_examples)
        if lengths is not None:
            window = np.arange(num_examples) // (SORT_WINDOW_BATCHES * batch_size)
            rows = rows[np.lexsort((lengths[rows], window))]
        order[i, :num_examples] = rows
    batch_indices = np.split(order, steps, axis=1)
    if lengths is None:
        yield from batch_indices
    else:
        yield from (
            batch_indices[i] for i in np.random.default_rng([epoch_index, 0, 0, 1]).permutation(steps)
        )


def eval_batch_indices(encoded: EncodedExamples, batch_size: int) -> Iterator[np.ndarray]:
    """Rows of batches for evaluation, int [B], the shortest examples first."""
    order = np.argsort(encoded.lengths, kind="stable")
    padded = np.full(-(-len(order) // batch_size) * batch_size, -1)
    padded[: len(order)] = order
    yield from padded.reshape(-1, batch_size)
