"""Generate minimal pairs in frequent words of the built-in corpus.

BLiMP and Zorro have many words that a model of the built-in corpus has never read. Here every word occurs at
least 100 times in it. The paradigms are agreement of subject and verb and of determiner and noun, and the
order of words.

A frame is a sentence in singular and plural and gives two pairs. In agreement, the unacceptable sentence of
one pair has the verb or determiner of the other pair. In word order, both sentences of a pair have the same
words. So a model that knows word frequencies only is right in exactly half of the pairs.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from dwt_jax.eval.minimal_pairs import MinimalPair, Paradigm

FRAMES = 100  # of each paradigm: twice as many pairs

Contrast = tuple[str, str]  # acceptable, unacceptable
Frame = tuple[Contrast, Contrast]  # in the singular, in the plural
Number = tuple[str, str]  # a word in the singular and in the plural


def _nouns(text: str) -> list[Number]:
    """Parse 'law country/countries': plurals end with s unless they are given."""
    pairs = (noun.partition("/") for noun in text.split())
    return [(singular, plural or f"{singular}s") for singular, _, plural in pairs]


_BODIES = _nouns("nation state country/countries government department court bank city/cities")
_PERSONS = _nouns("citizen officer member man/men child/children farmer family/families")
_THINGS = _nouns("law treaty/treaties measure plan policy/policies program system right duty/duties report")


class _Subjects(NamedTuple):
    """Nouns and the words that sentences about them may use, separated by spaces."""

    nouns: list[Number]
    adjectives: str  # what they can be
    preposition: str  # between them and an attractor
    attractors: list[Number]
    past_forms: str  # what the attractors did to them


_SUBJECTS = (
    _Subjects(_THINGS, "important necessary just useful wise new", "of", _BODIES, "adopted proposed made"),
    _Subjects(_PERSONS, "free ready happy proud responsible safe", "in", _BODIES, "called sent supported"),
    _Subjects(_BODIES, "free strong great small important ready", "of", _PERSONS, "supported served left"),
)
_COPULAS: tuple[Number, ...] = (("is", "are"), ("was", "were"), ("has been", "have been"))
_DETERMINERS: tuple[Number, ...] = (("this", "these"), ("that", "those"))
_ATTRIBUTES = "new great important good national public"
_CLAUSES = (  # what a noun may follow, with its determiner
    (_THINGS, ("congress has considered", "the president has proposed", "we have supported")),
    (_BODIES + _PERSONS, ("congress has recognized", "the president has called", "we have protected")),
)


def _subject_agreement() -> Iterator[Frame]:
    for nouns, adjectives, *_ in _SUBJECTS:
        for noun in nouns:
            yield from _with_predicates(noun, ("", ""), adjectives)


def _across_prepositional_phrase() -> Iterator[Frame]:
    """Between subject and verb there is a noun of the other number, the attractor."""
    for nouns, adjectives, preposition, attractors, _ in _SUBJECTS:
        for noun, (singular, plural) in itertools.product(nouns, attractors):
            phrases = f" {preposition} the {plural}", f" {preposition} the {singular}"
            yield from _with_predicates(noun, phrases, adjectives)


def _across_relative_clause() -> Iterator[Frame]:
    """The attractor is the subject of a relative clause, whose verb has one form for both numbers."""
    for nouns, adjectives, _, attractors, past_forms in _SUBJECTS:
        for noun, (singular, plural), past in itertools.product(nouns, attractors, past_forms.split()):
            yield from _with_predicates(
                noun, (f" that the {plural} {past}", f" that the {singular} {past}"), adjectives
            )


def _with_predicates(noun: Number, phrases: Number, adjectives: str) -> Iterator[Frame]:
    """Yield frames of a subject, the phrase after it, and each copula with each adjective."""
    for copula, adjective in itertools.product(_COPULAS, adjectives.split()):
        yield _agreement_frame(
            (f"the {noun[0]}{phrases[0]} ", f"the {noun[1]}{phrases[1]} "), copula, (f" {adjective}",) * 2
        )


def _determiner_noun() -> Iterator[Frame]:
    for nouns, clauses in _CLAUSES:
        for noun, clause, determiner in itertools.product(nouns, clauses, _DETERMINERS):
            yield _agreement_frame((f"{clause} ",) * 2, determiner, (f" {noun[0]}", f" {noun[1]}"))


def _determiner_adjective_noun() -> Iterator[Frame]:
    for nouns, clauses in _CLAUSES:
        for noun, clause, determiner in itertools.product(nouns, clauses, _DETERMINERS):
            for adjective in _ATTRIBUTES.split():
                endings = f" {adjective} {noun[0]}", f" {adjective} {noun[1]}"
                yield _agreement_frame((f"{clause} ",) * 2, determiner, endings)


def _agreement_frame(before: Number, forms: Number, after: Number) -> Frame:
    """Return the pairs in which the form that agrees is replaced by that of the other number."""
    (singular, plural), (a, b), (c, d) = forms, before, after
    return (f"{a}{singular}{c}", f"{a}{plural}{c}"), (f"{b}{plural}{d}", f"{b}{singular}{d}")


def _determiner_after_noun() -> Iterator[Frame]:
    """`nation the is free`"""
    yield from (_swapped_frame(frame, 0) for frame in _subject_agreement())


def _adjective_before_copula() -> Iterator[Frame]:
    """`the nation free is`, with copulas of one word"""
    for frame in _subject_agreement():
        if len(frame[0][0].split()) == 4:
            yield _swapped_frame(frame, 2)


def _preposition_after_determiner() -> Iterator[Frame]:
    """`the laws the of nation are just`"""
    yield from (_swapped_frame(frame, 2) for frame in _across_prepositional_phrase())


def _adjective_after_noun() -> Iterator[Frame]:
    """`we have supported this law new`"""
    yield from (_swapped_frame(frame, -2) for frame in _determiner_adjective_noun())


def _swapped_frame(frame: Frame, index: int) -> Frame:
    """Pair a frame's acceptable sentences with copies that have words index and index + 1 swapped."""

    def swap(sentence: str) -> Contrast:
        tokens = sentence.split()
        i = index % len(tokens)
        return sentence, " ".join([*tokens[:i], tokens[i + 1], tokens[i], *tokens[i + 2 :]])

    return swap(frame[0][0]), swap(frame[1][0])


_PARADIGMS = {
    "agreement_subject_verb-simple": _subject_agreement,
    "agreement_subject_verb-across_prepositional_phrase": _across_prepositional_phrase,
    "agreement_subject_verb-across_relative_clause": _across_relative_clause,
    "agreement_determiner_noun-simple": _determiner_noun,
    "agreement_determiner_noun-across_adjective": _determiner_adjective_noun,
    "word_order-determiner_after_noun": _determiner_after_noun,
    "word_order-adjective_before_copula": _adjective_before_copula,
    "word_order-preposition_after_determiner": _preposition_after_determiner,
    "word_order-adjective_after_noun": _adjective_after_noun,
}


def grammar_paradigms(frames: int = FRAMES, seed: int = 0) -> list[Paradigm]:
    """Generate the paradigms, each with `frames` random frames (or all, if there are fewer).

    The same seed gives the same pairs with every version of Python: the frames with the smallest random
    numbers are selected.
    """
    paradigms = []
    for name, generate in sorted(_PARADIGMS.items()):
        rng = random.Random(f"{name} {seed}")
        selected = sorted(generate(), key=lambda _: rng.random())[:frames]
        pairs: list[MinimalPair] = []
        for good, bad in itertools.chain.from_iterable(selected):
            location = f"grammar: {name}, pair {len(pairs) + 1}"
            pairs.append(MinimalPair(_sentence(good), _sentence(bad), location, location))
        paradigms.append(Paradigm(name, name.partition("-")[0], "", tuple(pairs)))
    return paradigms


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
