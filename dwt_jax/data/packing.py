"""Sentences into rows, whole chunks at a time.

A row is [CLS] sentences [SEP] for each document that it holds a stretch of, then padding.
Nothing here loops over tokens or sentences: where a row that begins at a sentence would end
is one binary search for all sentences at once, and only the chain of rows is followed.
"""

from typing import Literal, NamedTuple

import numpy as np


class Sentences(NamedTuple):
    """S sentences one after the other."""

    tokens: np.ndarray  # [sum of lengths], without special tokens
    lengths: np.ndarray  # int64 [S], from 1 to L - 2
    documents: np.ndarray  # int64 [S], ordinals; each the last one's or one more


class PackedRows(NamedTuple):
    """R rows of L tokens."""

    tokens: np.ndarray  # [R, L]
    segments: np.ndarray  # [R, L]; stretches of documents are numbered from 1, 0 is padding
    documents: np.ndarray  # int64 [R]: segment s belongs to document documents[row] + s - 1


class RowFormat(NamedTuple):
    """What a row looks like."""

    length: int
    row_mode: Literal["packed", "sentence"]
    pad_id: int
    cls_id: int
    sep_id: int
    dtype: np.dtype  # of tokens

    @property
    def segment_dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.length // 3 <= 255 else np.uint16)


def empty_sentences(dtype: np.dtype) -> Sentences:
    return Sentences(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.int64))


def concat_sentences(first: Sentences, second: Sentences) -> Sentences:
    return Sentences(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def pack_sentences(sentences: Sentences, row_format: RowFormat, last: bool) -> tuple[PackedRows, Sentences]:
    """(rows, the sentences that are left for the next call).

    Rows take sentences in order; one that does not fit begins the next row. Without `last`, a
    row that more sentences might still fit into is left over: rows do not depend on how the
    stream was cut into calls.
    """
    num_sentences = len(sentences.lengths)
    starts_segment = np.ones(
        num_sentences, bool
    )  # the sentence is the first of its document (or of this call)
    starts_segment[1:] = np.diff(sentences.documents) != 0
    ends = np.cumsum(sentences.lengths + 2 * starts_segment)  # on one endless row
    row_begins = (
        ends - sentences.lengths - 2
    )  # of a row whose first sentence this is, with its own [CLS] [SEP]
    if row_format.row_mode == "packed":
        next_row_start = np.searchsorted(ends, row_begins + row_format.length, side="right")
    else:
        next_row_start = np.arange(1, num_sentences + 1)
    *chain, num_used = _follow_row_starts(next_row_start.tolist(), last or row_format.row_mode == "sentence")
    row_starts = np.array(chain, np.int64)
    rows = np.repeat(np.arange(len(row_starts)), np.diff(row_starts, append=num_used))
    starts_segment = starts_segment[:num_used].copy()
    starts_segment[row_starts] = True
    row_sentences = Sentences(sentences.tokens, sentences.lengths[:num_used], sentences.documents[:num_used])
    column = ends[:num_used] - row_sentences.lengths - row_begins[row_starts][rows] - 1
    packed_rows = _write_rows(
        row_sentences, rows, column, starts_segment, row_sentences.documents[row_starts], row_format
    )
    num_used_tokens = int(row_sentences.lengths.sum())
    return packed_rows, Sentences(
        sentences.tokens[num_used_tokens:], sentences.lengths[num_used:], sentences.documents[num_used:]
    )


def _follow_row_starts(next_row_start: list[int], last: bool) -> list[int]:
    """The first sentence of each row that is complete, and then of the rest."""
    starts, current, total = [0], 0, len(next_row_start)
    while current < total and (last or next_row_start[current] < total):
        current = next_row_start[current]
        starts.append(current)
    return starts


def _write_rows(
    sentences: Sentences,
    rows: np.ndarray,
    column: np.ndarray,
    starts_segment: np.ndarray,
    documents: np.ndarray,
    row_format: RowFormat,
) -> PackedRows:
    """Put each sentence at `column` of its row; [CLS] before those that open a stretch, and
    [SEP] behind those before them. rows, column: int64 [S]; opens: bool [S]; documents: [R]."""
    tokens = np.full((len(documents), row_format.length), row_format.pad_id, row_format.dtype)
    segments = np.zeros((len(documents), row_format.length), row_format.segment_dtype)
    flat_tokens, flat_segments = tokens.reshape(-1), segments.reshape(-1)
    flat_start = rows * row_format.length + column
    segment = sentences.documents - documents[rows] + 1
    count = int(sentences.lengths.sum())
    offsets = np.cumsum(sentences.lengths) - sentences.lengths
    targets = np.repeat(flat_start - offsets, sentences.lengths) + np.arange(count)
    flat_tokens[targets] = sentences.tokens[:count]
    flat_segments[targets] = np.repeat(segment, sentences.lengths)
    ends_segment = np.roll(
        starts_segment, -1
    )  # the next one opens; the last of all closes as the first opens
    for mask, index, token in (
        (starts_segment, flat_start - 1, row_format.cls_id),
        (ends_segment, flat_start + sentences.lengths, row_format.sep_id),
    ):
        flat_tokens[index[mask]] = token
        flat_segments[index[mask]] = segment[mask]
    return PackedRows(tokens, segments, documents)
