import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.data.packing import RowFormat, Spans, concat_spans, empty_spans, pack_spans
from helpers.prepared_data import CLS, PAD, SEP, pack_naively

ROW_FORMATS = [
    RowFormat(length, row_mode, PAD, CLS, SEP, np.dtype(np.uint16), end_token)
    for end_token in ("documents", "segments")
    for length in (8, 13, 1000)
    for row_mode in ("packed", "wrapped")  # which differ in what a span is
]


@settings(deadline=None)
@given(
    st.sampled_from(ROW_FORMATS),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), max_size=30),
    st.integers(1, 9),
)
def test_rows_do_not_depend_on_the_division_into_calls(row_format, lengths, documents_a_call):
    """And are the naive packer's; with rows of 1000 some hold more than 255 segments' worth."""
    numbers = iter(range(10, 60000))
    documents = [[[next(numbers) for _ in range(n)] for n in document] for document in lengths]
    pending = empty_spans(row_format.dtype)
    packed_rows = []
    for start in range(0, len(documents), documents_a_call):
        flat = [
            (i, ids) for i, d in enumerate(documents[start : start + documents_a_call], start) for ids in d
        ]
        tokens = np.array([t for _, ids in flat for t in ids], np.uint16)
        new_spans = Spans(tokens, np.array([len(ids) for _, ids in flat]), np.array([i for i, _ in flat]))
        packed, pending = pack_spans(concat_spans(pending, new_spans), row_format, last=False)
        packed_rows.append(packed)
    packed_rows.append(pack_spans(pending, row_format, last=True)[0])
    rows = [row for packed in packed_rows for row in zip(*(array.tolist() for array in packed), strict=True)]
    assert rows == pack_naively(documents, row_format.length, row_format.end_token)


def test_more_than_255_segments_in_a_row():
    row_format = ROW_FORMATS[-1]
    count = 300
    ones = np.ones(count, np.int64)
    packed, _ = pack_spans(Spans(np.full(count, 9, np.uint16), ones, np.arange(count)), row_format, last=True)
    assert packed.segments.dtype == np.uint16
    assert packed.segments.max() == 300
    assert packed.tokens.tolist() == [[CLS, 9, SEP] * 300 + [PAD] * 100]


def test_a_row_of_767_tokens_may_have_256_segments():
    """The last of them without its end: the document goes on in the next row."""
    row_format = RowFormat(767, "packed", PAD, CLS, SEP, np.dtype(np.uint16), "documents")
    documents = np.append(np.arange(256), 255)
    spans = Spans(np.full(257, 9, np.uint16), np.ones(257, np.int64), documents)
    packed, _ = pack_spans(spans, row_format, last=True)
    assert packed.tokens.tolist()[0] == [CLS, 9, SEP] * 255 + [CLS, 9]
    assert packed.segments[0, -2:].tolist() == [256, 256]


@given(
    st.sampled_from(["documents", "segments"]),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), max_size=9),
    st.integers(1, 9),
)
def test_a_sentence_a_row_has_its_end_wherever_calls_end(end_token, lengths, documents_a_call):
    row_format = RowFormat(8, "sentence", PAD, CLS, SEP, np.dtype(np.uint16), end_token)
    pending, rows, expected = empty_spans(row_format.dtype), [], []
    for start in range(0, len(lengths), documents_a_call):
        flat = [(i, n) for i, d in enumerate(lengths[start : start + documents_a_call], start) for n in d]
        documents, counts = np.array(flat, np.int64).T
        new_spans = Spans(np.repeat(10 + counts, counts).astype(np.uint16), counts, documents)
        packed, pending = pack_spans(concat_spans(pending, new_spans), row_format, last=False)
        rows += packed.tokens.tolist()
    rows += pack_spans(pending, row_format, last=True)[0].tokens.tolist()
    for document in lengths:
        for i, n in enumerate(document, 1):
            row = [CLS, *[10 + n] * n, *[SEP] * (end_token == "segments" or i == len(document))]
            expected.append(row + [PAD] * (8 - len(row)))
    assert rows == expected
