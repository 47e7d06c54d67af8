"""Pack text into rows, a chunk of documents at a time.

A span is a piece of text that is never cut: a sentence, or with row_mode "wrapped" a word. A row has segments
and then padding. A segment is `[CLS] spans [SEP]`, with consecutive spans of one document; with end_token
"documents" `[SEP]` stands only where the document ends. Nothing loops over tokens or spans: only the chain of
row starts is followed in Python, with one binary search a row.
"""

import bisect
from typing import NamedTuple

import numpy as np

from dwt_jax.config import EndToken, RowMode


class Spans(NamedTuple):
    """S consecutive spans."""

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
    row_mode: RowMode
    pad_id: int
    cls_id: int
    sep_id: int
    dtype: np.dtype  # of tokens
    end_token: EndToken = "segments"

    @property
    def segment_dtype(self) -> np.dtype:
        """The smallest dtype for segment numbers. A segment has 3 tokens and more, or 2 if it has no end."""
        return np.dtype(np.uint8 if (self.length + 1) // 3 <= 255 else np.uint16)


def empty_spans(dtype: np.dtype) -> Spans:
    """Return zero spans with tokens of `dtype`."""
    return Spans(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.int64))


def concat_spans(first: Spans, second: Spans) -> Spans:
    """Concatenate spans. Documents must be numbered through both."""
    return Spans(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def pack_spans(spans: Spans, row_format: RowFormat, last: bool) -> tuple[PackedRows, Spans]:
    """Pack spans into rows in order; a span that does not fit begins the next row.

    The rows do not depend on how the stream of spans is divided into calls.

    Args:
        spans: those left over by the previous call, then new ones.
        row_format: layout of a row. In row_mode "sentence" each row holds one span.
        last: whether no more spans follow. If False, a row that could take more spans is left over, or that
            of the last sentence, which may end its document or not.

    Returns:
        (rows, the spans left over for the next call)
    """
    num_spans = len(spans.lengths)
    one_a_row = row_format.row_mode == "sentence"
    # Whether a span is the first of its document, or of this call.
    starts_segment = np.ones(num_spans, bool)
    starts_segment[1:] = np.diff(spans.documents) != 0
    # Where each span ends if all of them are in one row, with [CLS] and [SEP] around each segment.
    ends = np.cumsum(spans.lengths + 2 * starts_segment)
    # Where a row would begin whose first span is this one, preceded by [CLS].
    row_begins = ends - spans.lengths - 2
    # Whether [SEP] stands after a span that ends its segment. A span that is left over never does.
    has_end = np.ones(num_spans, bool)
    if row_format.end_token == "documents":
        has_end = np.append(starts_segment[1:], last)[:num_spans]
    row_starts = (
        np.arange(max(1, num_spans + last))  # the next call tells whether the last one ends its document
        if one_a_row
        else _row_starts(row_begins, ends - ~has_end, row_format.length, last)
    )
    row_starts, num_used = row_starts[:-1], int(row_starts[-1])
    starts_segment[row_starts] = True
    segment_starts = np.flatnonzero(starts_segment[:num_used])
    segments = Spans(
        spans.tokens,
        np.add.reduceat(spans.lengths[:num_used], segment_starts),
        spans.documents[segment_starts],
    )
    rows = np.searchsorted(row_starts, segment_starts, side="right") - 1
    columns = row_begins[segment_starts] + 1 - row_begins[row_starts][rows]
    has_end = has_end[np.append(segment_starts[1:], num_used) - 1] if num_used else has_end[:0]
    packed_rows = _write_segments(segments, rows, columns, has_end, spans.documents[row_starts], row_format)
    num_used_tokens = int(segments.lengths.sum())
    return packed_rows, Spans(
        spans.tokens[num_used_tokens:], spans.lengths[num_used:], spans.documents[num_used:]
    )


def _row_starts(row_begins: np.ndarray, ends: np.ndarray, length: int, last: bool) -> np.ndarray:
    """The index of the first span of each complete row, then of the first span left over.

    Args:
        row_begins: int64 [S], where a row would begin whose first span is this one.
        ends: int64 [S], where each span ends, with the [SEP] that it needs as the last of a row.
        length: of a row.
        last: whether the last row is complete although it could take more spans.
    """
    begin_view, end_view, total = memoryview(row_begins), memoryview(ends), len(ends)
    starts = [0]
    while (start := starts[-1]) < total:
        row_end = begin_view[start] + length
        next_start = bisect.bisect_right(end_view, row_end, start + 1, min(total, start + length))
        if next_start == total and not last:
            break
        starts.append(next_start)
    return np.array(starts, np.int64)


def _write_segments(
    segments: Spans,
    rows: np.ndarray,
    columns: np.ndarray,
    has_end: np.ndarray,
    documents: np.ndarray,
    row_format: RowFormat,
) -> PackedRows:
    """Write each segment into its row, with [CLS] before it and [SEP] after it.

    Args:
        segments: S spans that fill a segment each; further tokens are ignored.
        rows: int64 [S], the row of each segment.
        columns: int64 [S], where in its row the text of each segment begins.
        has_end: bool [S], whether [SEP] stands after it.
        documents: int64 [R], the first document of each row.
        row_format: layout of a row.
    """
    tokens = np.full((len(documents), row_format.length), row_format.pad_id, row_format.dtype)
    segment_ids = np.zeros((len(documents), row_format.length), row_format.segment_dtype)
    flat_tokens, flat_segment_ids = tokens.reshape(-1), segment_ids.reshape(-1)
    flat_starts = rows * row_format.length + columns
    segment_numbers = segments.documents - documents[rows] + 1
    num_tokens = int(segments.lengths.sum())
    offsets = np.cumsum(segments.lengths) - segments.lengths
    targets = np.repeat(flat_starts - offsets, segments.lengths) + np.arange(num_tokens)
    flat_tokens[targets] = segments.tokens[:num_tokens]
    flat_segment_ids[targets] = np.repeat(segment_numbers, segments.lengths)
    flat_tokens[flat_starts - 1] = row_format.cls_id
    flat_segment_ids[flat_starts - 1] = segment_numbers
    flat_ends = (flat_starts + segments.lengths)[has_end]
    flat_tokens[flat_ends] = row_format.sep_id
    flat_segment_ids[flat_ends] = segment_numbers[has_end]
    return PackedRows(tokens, segment_ids, documents)
