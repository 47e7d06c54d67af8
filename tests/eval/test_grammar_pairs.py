"""The generated pairs: their vocabulary, and what word frequencies alone say about them."""

import re
from collections import Counter

import numpy as np
import pytest

from dwt_jax.config import Source
from dwt_jax.data.sources import iter_documents
from dwt_jax.eval.grammar_pairs import grammar_paradigms
from dwt_jax.eval.pair_results import PairScores

PARADIGMS = grammar_paradigms()


def word_list(sentence):
    return re.findall("[a-z]+", sentence.lower())


def test_each_word_is_frequent_in_the_builtin_corpus():
    counts = Counter()
    for document in iter_documents(Source()):
        counts.update(word_list(document))
    vocabulary = {
        word for x in PARADIGMS for pair in x.pairs for word in word_list(f"{pair.good} {pair.bad}")
    }
    assert len(vocabulary) > 80
    assert {word: counts[word] for word in vocabulary if counts[word] < 100} == {}


@pytest.mark.parametrize("paradigm", PARADIGMS, ids=lambda x: x.name)
def test_word_frequencies_alone_are_right_in_half_of_the_pairs(paradigm):
    """For any weights of words. Integers, so that sums do not depend on the order of the words."""
    vocabulary = sorted({word for pair in paradigm.pairs for word in word_list(pair.good + " " + pair.bad)})
    for seed in range(3):
        weights = np.random.default_rng(seed).integers(-(2**30), 2**30, len(vocabulary)).tolist()
        weight = dict(zip(vocabulary, weights, strict=True))
        scores = (
            np.array([sum(weight[word] for word in word_list(pair[side])) for pair in paradigm.pairs])
            for side in (0, 1)
        )
        assert PairScores(*scores).accuracy == 50


@pytest.mark.parametrize("paradigm", PARADIGMS, ids=lambda x: x.name)
def test_pairs_are_distinct_and_minimal(paradigm):
    """Agreement changes one word (`has been` to `have been` too), word order swaps two neighbours."""
    assert len({pair[:2] for pair in paradigm.pairs}) == len(paradigm.pairs) == 200
    for pair in paradigm.pairs:
        good, bad = word_list(pair.good), word_list(pair.bad)
        assert len(good) == len(bad)
        changed = [i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b]
        if paradigm.term == "word_order":
            assert changed == [changed[0], changed[0] + 1]
            assert sorted(good) == sorted(bad)
        else:
            assert len(changed) == 1


AGREES = {
    "is": 0,
    "was": 0,
    "has": 0,
    "this": 0,
    "that": 0,
    "are": 1,
    "were": 1,
    "have": 1,
    "these": 1,
    "those": 1,
}


@pytest.mark.parametrize("paradigm", [x for x in PARADIGMS if x.term != "word_order"], ids=lambda x: x.name)
def test_the_acceptable_sentence_agrees(paradigm):
    """The noun, whose ending has the number, is the second word (the subject) or the last (the object)."""
    for pair in paradigm.pairs:
        for sentence, agrees in ((pair.good, True), (pair.bad, False)):
            tokens = word_list(sentence)
            is_subject = paradigm.term == "agreement_subject_verb"
            noun = tokens[1] if is_subject else tokens[-1]
            is_plural = noun in ("men", "children") or noun.endswith("s")
            number = [AGREES[token] for token in tokens if token in AGREES][-1]
            assert (number == is_plural) == agrees, sentence


def test_the_seed_selects_the_frames():
    assert grammar_paradigms() == PARADIGMS
    assert grammar_paradigms(seed=1) != PARADIGMS
    assert [len(x.pairs) for x in grammar_paradigms(frames=7)] == [14] * len(PARADIGMS)
