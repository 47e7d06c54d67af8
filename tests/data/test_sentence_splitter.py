import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.data.sentence_splitter import split_sentences

PIECES = st.sampled_from(
    [
        *"aZé9 .!?…\"'”’)(“\n\r\t\x85\u2028\u00a0\x1c",
        "Mr. ",
        "U.S. ",
        "The ",
        "e.g. ",
        "No. ",
        ". ",
        "... ",
        "J. ",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_no_character_is_lost_or_duplicated(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


@given(st.lists(PIECES).map("".join))
def test_lines_are_independent(text):
    by_line = [sentence for line in text.splitlines() for sentence in split_sentences(line)]
    assert split_sentences(text) == by_line


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We stayed in!", "Why?", "Nobody knew…", "So it goes."],
        ['He said "No."', "She left.", "“Really?”", "‘Yes.’", "(He did.)", "So."],
        ["Mr. Smith met Dr. J. R. Jones of St. Louis, Mo., on Jan. 5.", "They talked."],
        ["The U.S. Army is in the U.S.", "The rest is not."],
        ["See e.g. Smith vs. Jones, No. 5, p. 12.", "It is clear."],
        ["I said no.", "No one heard."],
        ["Wait... what?", "Wait...", "What?"],
        ["It grew by 3.5 percent in 1999.", "2000 was better."],
        ["We use node.js and example.com.", "Both work."],
        ["He came at 5 p.m. on Monday.", "She did not."],
        ["Ärzte kamen.", "Über allem Ruhe.", "Élan!", "Étude."],
    ],
)
def test_ordinary_english(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n".join(sentences)) == sentences


def test_line_end_always_ends_a_sentence():
    assert split_sentences("A title\nand then\r\nmore\n\n  \n") == ["A title", "and then", "more"]
    assert split_sentences("") == split_sentences(" \n\t ") == []


def test_time_is_linear():
    for text in (
        "." * 200_000,
        ". " * 100_000,
        "a" * 200_000,
        '"' * 100_000 + ". A",
        "A. " * 60_000,
        "!" + " " * 10**5,
    ):
        split_sentences(text)  # each would take minutes if it were quadratic
