"""Pack sentences into rows, a chunk of documents at a time.

A row consists of segments and then padding. A segment is `[CLS] sentences [SEP]`, with consecutive
sentences of one document. Nothing loops over tokens or sentences: one binary search finds, for all
sentences at once, where a row that begins at that sentence would end. Only the chain of row starts is
followed in Python.
"""

from typing import Literal, NamedTuple

import numpy as np


class Sentences(NamedTuple):
    """S consecutive sentences."""

    tokens: np.ndarray  # [sum of lengths], without special tokens
    lengths: np.ndarray  # int64 [S], 1 to L - 2
    documents: np.ndarray  # int64 [S], document numbers; they increase in steps of 0 or 1


class PackedRows(NamedTuple):
    """R rows of L tokens."""

    tokens: np.ndarray  # [R, L]
    segments: np.ndarray  # [R, L]; segments are numbered from 1 in each row, 0 is padding
    documents: np.ndarray  # int64 [R]: segment s belongs to document documents[row] + s - 1


class RowFormat(NamedTuple):
    """Layout of a row."""

    length: int  # L
    row_mode: Literal["packed", "sentence"]
    pad_id: int
    cls_id: int
    sep_id: int
    dtype: np.dtype  # of tokens

    @property
    def segment_dtype(self) -> np.dtype:
        """The smallest dtype for segment numbers; a segment has at least 3 tokens."""
        return np.dtype(np.uint8 if self.length // 3 <= 255 else np.uint16)


def empty_sentences(dtype: np.dtype) -> Sentences:
    """Return zero sentences with tokens of `dtype`."""
    return Sentences(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.int64))


def concat_sentences(first: Sentences, second: Sentences) -> Sentences:
    """Concatenate sentences. Documents must be numbered through both."""
    return Sentences(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def pack_sentences(sentences: Sentences, row_format: RowFormat, last: bool) -> tuple[PackedRows, Sentences]:
    """Pack sentences into rows in order; a sentence that does not fit begins the next row.

    The rows do not depend on how the stream of sentences is divided into calls.

    Args:
        sentences: those left over by the previous call, then new ones.
        row_format: layout of a row. In row_mode "sentence" each row holds one sentence.
        last: whether no more sentences follow. If False, a row that could take more sentences is left over.

    Returns:
        (rows, the sentences left over for the next call)
    """
    num_sentences = len(sentences.lengths)
    # Whether a sentence is the first of its document, or of this call.
    starts_segment = np.ones(num_sentences, bool)
    starts_segment[1:] = np.diff(sentences.documents) != 0
    # Where each sentence ends if all of them are in one row, with [CLS] and [SEP] around each segment.
    ends = np.cumsum(sentences.lengths + 2 * starts_segment)
    # Where a row would begin whose first sentence is this one, preceded by [CLS].
    row_begins = ends - sentences.lengths - 2
    if row_format.row_mode == "packed":
        next_row_start = np.searchsorted(ends, row_begins + row_format.length, side="right")
    else:
        next_row_start = np.arange(1, num_sentences + 1)
    *chain, num_used = _follow_row_starts(next_row_start.tolist(), last or row_format.row_mode == "sentence")
    row_starts = np.array(chain, np.int64)
    rows = np.repeat(np.arange(len(row_starts)), np.diff(row_starts, append=num_used))
    starts_segment = starts_segment[:num_used].copy()
    starts_segment[row_starts] = True
    used = Sentences(sentences.tokens, sentences.lengths[:num_used], sentences.documents[:num_used])
    columns = ends[:num_used] - used.lengths - row_begins[row_starts][rows] - 1
    packed_rows = _write_rows(used, rows, columns, starts_segment, used.documents[row_starts], row_format)
    num_used_tokens = int(used.lengths.sum())
    return packed_rows, Sentences(
        sentences.tokens[num_used_tokens:], sentences.lengths[num_used:], sentences.documents[num_used:]
    )


def _follow_row_starts(next_row_start: list[int], last: bool) -> list[int]:
    """The index of the first sentence of each complete row, then of the first sentence left over.

    next_row_start: for each sentence, the first sentence of the next row if a row begins at it.
    """
    starts, current, total = [0], 0, len(next_row_start)
    while current < total and (last or next_row_start[current] < total):
        current = next_row_start[current]
        starts.append(current)
    return starts


def _write_rows(
    sentences: Sentences,
    rows: np.ndarray,
    columns: np.ndarray,
    starts_segment: np.ndarray,
    documents: np.ndarray,
    row_format: RowFormat,
) -> PackedRows:
    """Write each sentence into its row, with [CLS] and [SEP] around each segment.

    Args:
        sentences: S sentences; further tokens are ignored.
        rows: int64 [S], the row of each sentence.
        columns: int64 [S], where in its row each sentence begins.
        starts_segment: bool [S], whether [CLS] precedes the sentence.
        documents: int64 [R], the first document of each row.
        row_format: layout of a row.
    """
    tokens = np.full((len(documents), row_format.length), row_format.pad_id, row_format.dtype)
    segments = np.zeros((len(documents), row_format.length), row_format.segment_dtype)
    flat_tokens, flat_segments = tokens.reshape(-1), segments.reshape(-1)
    flat_starts = rows * row_format.length + columns
    segment_numbers = sentences.documents - documents[rows] + 1
    num_tokens = int(sentences.lengths.sum())
    offsets = np.cumsum(sentences.lengths) - sentences.lengths
    targets = np.repeat(flat_starts - offsets, sentences.lengths) + np.arange(num_tokens)
    flat_tokens[targets] = sentences.tokens[:num_tokens]
    flat_segments[targets] = np.repeat(segment_numbers, sentences.lengths)
    # A sentence ends a segment if the next one starts one. The last sentence ends one, and the roll gives
    # it the value of the first, which starts one.
    ends_segment = np.roll(starts_segment, -1)
    for mask, index, token in (
        (starts_segment, flat_starts - 1, row_format.cls_id),
        (ends_segment, flat_starts + sentences.lengths, row_format.sep_id),
    ):
        flat_tokens[index[mask]] = token
        flat_segments[index[mask]] = segment_numbers[mask]
    return PackedRows(tokens, segments, documents)
