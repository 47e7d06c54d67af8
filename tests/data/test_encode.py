import subprocess
import sys
from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.data.encode import split_words
from dwt_jax.data.packing import Spans
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
