import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.data import encode
from dwt_jax.data.encode import EncodeConfig, split_words
from dwt_jax.data.packing import Spans
from dwt_jax.data.tokenizer import save_tokenizer
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS, build_wordpiece_tokenizer
from helpers.paths import ROOT
from helpers.prepared_data import wrap_cuts


def test_worker_process_imports_neither_jax_nor_tokenizers():
    program = "import sys, dwt_jax.data.encode; print({'jax', 'flax', 'tokenizers'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "set()"


word_lengths = st.lists(st.integers(1, 11), max_size=8)  # of a sentence
documents_of_words = st.lists(st.lists(st.tuples(word_lengths, st.booleans()), max_size=4), max_size=6)


@settings(deadline=None)
@given(documents_of_words)
def test_words_are_split_where_rows_may_end(documents):
    """Also with empty documents and sentences, and sentences that begin with a continuation."""
    ids = iter(range(10**6))
    tokens = [
        [[[next(ids) for _ in range(n)] for n in lengths] for lengths, _ in document]
        for document in documents
    ]
    continuations = {token for document in tokens for s in document for word in s for token in word[1:]}
    for document, sentences in zip(tokens, documents, strict=True):
        for words, (_, begins_with_continuation) in zip(document, sentences, strict=True):
            continuations |= {words[0][0]} if words and begins_with_continuation else set()
    flat = [[[*chain.from_iterable(words)] for words in document] for document in tokens]
    num_tokens = next(ids)
    spans = split_words(
        Spans(
            np.arange(num_tokens),
            np.array([len(s) for document in flat for s in document], np.int64),
            np.array([i for i, document in enumerate(flat) for _ in document], np.int64),
        ),
        np.isin(np.arange(num_tokens), [*continuations]),
    )
    cuts = [np.cumsum(spans.lengths[spans.documents == i]).tolist() for i in range(len(documents))]
    assert cuts == [wrap_cuts(document, continuations) for document in flat]
    np.testing.assert_array_equal(spans.tokens, np.arange(num_tokens))


lines_of_text = st.lists(st.text(alphabet='ab.!?…"é。 \t\x0b', max_size=12), max_size=5)


@settings(deadline=None)
@given(lines_of_text)
def test_words_of_lines_are_those_of_their_sentences(tmp_path_factory, lines):
    """Where the ids of a text are those of its words, it is split into lines: the rows are the same."""
    directory = tmp_path_factory.getbasetemp() / "letters"
    if not directory.exists():
        pieces = ["a", "b", "é", "##a", "##b", "ab", "ba", ".", "!", "?", "…", '"', "。"]
        vocab = {token: i for i, token in enumerate([*WORDPIECE_TOKENS, *pieces])}
        save_tokenizer(build_wordpiece_tokenizer(vocab, lowercase=False), directory, lowercase=False)
    config = EncodeConfig(str(directory), "", 12, "wrapped", 1, 0.0)
    encode_fn = encode._load_encode_fn(config)
    assert encode_fn[-1]
    chunk = encode.encode_chunk(["\n".join(lines)], config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_load_encode_fn", lambda _: (*encode_fn[:-1], False))
        by_sentences = encode.encode_chunk(["\n".join(lines)], config)
    for found, expected in zip(chunk.train, by_sentences.train, strict=True):
        np.testing.assert_array_equal(found, expected)
