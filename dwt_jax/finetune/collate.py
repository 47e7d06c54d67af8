"""Tokenize labelled examples and collate them into batches padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.data.hf_tokenizer import LoadedTokenizer
from dwt_jax.errors import UserError
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.datasets import ExampleSplit, TaskData, read_examples

TOKENIZER_BATCH_SIZE = 10_000  # texts per call of the tokenizer


class EncodedExamples(NamedTuple):
    """Token ids of N examples, concatenated. Example i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # int32 [total tokens]
    token_type_ids: (
        np.ndarray
    )  # int32 [total tokens]; 1 in the second text of a pair, if the tokenizer sets it
    offsets: np.ndarray  # int64 [N + 1]
    labels: np.ndarray  # int32 (classes) or float32 (numbers) [N]; zeros for an unlabelled split

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [N]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """Number of examples, unlike a plain NamedTuple's number of fields."""
        return len(self.labels)


class ExampleBatch(NamedTuple):
    """A padded batch. Leading axes [...] are the seeds that are trained in parallel, if any."""

    tokens: Any  # int32 [..., B, L]
    segment_ids: Any  # int32 [..., B, L]; 1 for tokens, 0 for padding
    token_type_ids: Any  # int32 [..., B, L]
    labels: Any  # int32 or float32 [..., B]
    weights: Any  # float32 [..., B]; 0 for rows that only fill up the batch


def encode_examples(split: ExampleSplit, tokenizer: LoadedTokenizer, max_length: int) -> EncodedExamples:
    """Tokenize a split, and add its labels. Arguments as for `encode_texts`."""
    (tokens, token_type_ids, offsets, zeros), _ = encode_texts(split, tokenizer, max_length)
    labels = zeros if split.labels is None else split.labels
    return EncodedExamples(tokens, token_type_ids, offsets, labels)


def encode_texts(
    split: ExampleSplit, tokenizer: LoadedTokenizer, max_length: int
) -> tuple[EncodedExamples, int]:
    """Tokenize the texts of a split with the special tokens of the tokenizer (`[CLS] a [SEP] b [SEP]`).

    Args:
        split: the texts.
        tokenizer: puts the special tokens around the texts.
        max_length: maximum tokens of an example; in a pair the longer text is truncated first. The
            tokenizer's `truncation_side` says on which side.

    Returns:
        (examples without labels, number of examples that were truncated)

    Raises:
        UserError: a text has no token, or more special tokens than `max_length`.
    """
    hf_tokenizer = tokenizer.tokenizer
    hf_tokenizer.enable_truncation(
        max_length, strategy="longest_first", direction=tokenizer.source.truncation_side
    )
    texts: list[Any] = split.texts
    if split.text_pairs is not None:
        texts = list(zip(split.texts, split.text_pairs, strict=True))
    ids: list[np.ndarray] = []
    token_type_ids: list[np.ndarray] = []
    num_truncated = 0
    for start in range(0, len(texts), TOKENIZER_BATCH_SIZE):
        for encoding in hf_tokenizer.encode_batch_fast(texts[start : start + TOKENIZER_BATCH_SIZE]):
            ids.append(np.array(encoding.ids, np.int32))
            token_type_ids.append(np.array(encoding.type_ids, np.int32))
            num_truncated += bool(encoding.overflowing)
    hf_tokenizer.no_truncation()
    if not all(map(len, ids)):
        raise UserError(
            f"{tokenizer.source.path}: gives no token to an empty text, expected a tokenizer that adds "
            "special tokens (the post_processor of its tokenizer.json)"
        )
    if (longest := max(map(len, ids), default=0)) > max_length:  # the special tokens alone do not fit
        raise UserError(
            f"{tokenizer.source.path}: cannot cut an example of {longest} tokens to {max_length}, expected "
            "room for the special tokens"
        )
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    labels = np.zeros(len(ids), np.int32)
    return (
        EncodedExamples(np.concatenate(ids), np.concatenate(token_type_ids), offsets, labels),
        num_truncated,
    )


def cut_final_padding(encoded: EncodedExamples, pad_id: int) -> EncodedExamples:
    """Cut padding tokens off the ends of examples, but for the first token of each.

    transformers reads a decoder at the last token that is not padding, even if the text itself ends with it.

    Args:
        encoded: the examples, each with at least one token.
        pad_id: token id of the padding; −1: none.
    """
    lengths = encoded.lengths
    positions = np.arange(len(encoded.tokens)) - np.repeat(encoded.offsets[:-1], lengths)
    last = np.maximum.reduceat(np.where(encoded.tokens != pad_id, positions, 0), encoded.offsets[:-1])
    mask = positions <= np.repeat(last, lengths)
    offsets = np.cumsum([0, *(last + 1)], dtype=np.int64)
    return EncodedExamples(encoded.tokens[mask], encoded.token_type_ids[mask], offsets, encoded.labels)


class ExampleCache:
    """Cache of the examples that this process has read and tokenized, shared between models."""

    def __init__(self) -> None:
        self._data: dict[Examples, TaskData] = {}
        self._encoded: dict[tuple[Examples, str, int], dict[str, EncodedExamples]] = {}

    def read(self, examples: Examples) -> TaskData:
        """Return the splits of `examples`. Raises UserError as `datasets.read_examples` does."""
        if examples not in self._data:
            self._data[examples] = read_examples(examples)
        return self._data[examples]

    def encode(
        self, examples: Examples, tokenizer: LoadedTokenizer, max_length: int
    ) -> dict[str, EncodedExamples]:
        """Return every split tokenized, by split name.

        Models whose tokenizers are equal share the result, even from different directories.
        Arguments and errors are those of `encode_examples` and `read`.
        """
        key = examples, tokenizer.tokenizer.to_str() + tokenizer.source.truncation_side, max_length
        if key not in self._encoded:
            splits = self.read(examples).splits.items()
            self._encoded[key] = {
                name: encode_examples(split, tokenizer, max_length) for name, split in splits
            }
        return self._encoded[key]


def collate_examples(
    encoded: EncodedExamples, rows: np.ndarray, lengths: Sequence[int], pad_id: int
) -> ExampleBatch:
    """Pad examples to the smallest bucket that holds the longest of them.

    Args:
        encoded: the split.
        rows: indices of the examples, int [..., B]; −1 for rows without an example.
        lengths: the buckets in tokens, increasing; the last one holds every example.
        pad_id: token id of the padding.
    """
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


SORT_WINDOW_BATCHES = 32  # batches per window in which group_by_length sorts examples


def epoch_batch_indices(
    num_examples: int,
    batch_size: int,
    seeds: Sequence[int],
    epoch_index: int,
    lengths: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield the example indices of each batch of an epoch, int [S, B], shuffled per seed.

    The last batch is filled up with −1. With `lengths`, batches group examples of similar length:
    each seed's order is cut into windows, every window is sorted by length and cut into batches, and
    the batches are permuted. All seeds share that permutation, so that seeds trained in parallel have
    their long batches in the same step.

    Args:
        num_examples: N.
        batch_size: B.
        seeds: the S seeds; each has its own order.
        epoch_index: counts from 0.
        lengths: tokens of each example, [N]; None for a plain shuffle.
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
    """Yield the example indices of each evaluation batch, int [B], shortest examples first.

    The last batch is filled up with −1.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    padded = np.full(-(-len(order) // batch_size) * batch_size, -1)
    padded[: len(order)] = order
    yield from padded.reshape(-1, batch_size)
