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


class Packed(NamedTuple):
    """R rows of L tokens."""

    tokens: np.ndarray  # [R, L]
    segments: np.ndarray  # [R, L]; stretches of documents are numbered from 1, 0 is padding
    documents: np.ndarray  # int64 [R]: segment s belongs to document documents[row] + s - 1


class Frame(NamedTuple):
    """What a row looks like."""

    length: int
    mode: Literal["packed", "sentence"]
    pad_id: int
    cls_id: int
    sep_id: int
    dtype: np.dtype  # of tokens

    @property
    def segment_dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.length // 3 <= 255 else np.uint16)


def no_sentences(dtype: np.dtype) -> Sentences:
    return Sentences(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.int64))


def join(first: Sentences, second: Sentences) -> Sentences:
    return Sentences(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def pack(sentences: Sentences, frame: Frame, last: bool) -> tuple[Packed, Sentences]:
    """(rows, the sentences that are left for the next call).

    Rows take sentences in order; one that does not fit begins the next row. Without `last`, a
    row that more sentences might still fit into is left over: rows do not depend on how the
    stream was cut into calls.
    """
    total = len(sentences.lengths)
    opens = np.ones(total, bool)  # the sentence is the first of its document (or of this call)
    opens[1:] = np.diff(sentences.documents) != 0
    ends = np.cumsum(sentences.lengths + 2 * opens)  # on one endless row
    begins = ends - sentences.lengths - 2  # of a row whose first sentence this is, with its own [CLS] [SEP]
    if frame.mode == "packed":
        following = np.searchsorted(ends, begins + frame.length, side="right")
    else:
        following = np.arange(1, total + 1)
    *chain, used = _follow(following.tolist(), last or frame.mode == "sentence")
    starts = np.array(chain, np.int64)
    rows = np.repeat(np.arange(len(starts)), np.diff(starts, append=used))
    opens = opens[:used].copy()
    opens[starts] = True
    taken = Sentences(sentences.tokens, sentences.lengths[:used], sentences.documents[:used])
    column = ends[:used] - taken.lengths - begins[starts][rows] - 1
    packed = _lay_out(taken, rows, column, opens, taken.documents[starts], frame)
    cut = int(taken.lengths.sum())
    return packed, Sentences(sentences.tokens[cut:], sentences.lengths[used:], sentences.documents[used:])


def _follow(following: list[int], last: bool) -> list[int]:
    """The first sentence of each row that is complete, and then of the rest."""
    starts, at, total = [0], 0, len(following)
    while at < total and (last or following[at] < total):
        at = following[at]
        starts.append(at)
    return starts


def _lay_out(
    sentences: Sentences,
    rows: np.ndarray,
    column: np.ndarray,
    opens: np.ndarray,
    documents: np.ndarray,
    frame: Frame,
) -> Packed:
    """Put each sentence at `column` of its row; [CLS] before those that open a stretch, and
    [SEP] behind those before them. rows, column: int64 [S]; opens: bool [S]; documents: [R]."""
    tokens = np.full((len(documents), frame.length), frame.pad_id, frame.dtype)
    segments = np.zeros((len(documents), frame.length), frame.segment_dtype)
    flat, flat_segments = tokens.reshape(-1), segments.reshape(-1)
    place = rows * frame.length + column
    segment = sentences.documents - documents[rows] + 1
    count = int(sentences.lengths.sum())
    offsets = np.cumsum(sentences.lengths) - sentences.lengths
    targets = np.repeat(place - offsets, sentences.lengths) + np.arange(count)
    flat[targets] = sentences.tokens[:count]
    flat_segments[targets] = np.repeat(segment, sentences.lengths)
    closes = np.roll(opens, -1)  # the next one opens; the last of all closes as the first opens
    for where, at, token in (
        (opens, place - 1, frame.cls_id),
        (closes, place + sentences.lengths, frame.sep_id),
    ):
        flat[at[where]] = token
        flat_segments[at[where]] = segment[where]
    return Packed(tokens, segments, documents)
