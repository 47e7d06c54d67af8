import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.data.sentence_splitter import cut_pieces, split_sentences

PIECES = st.sampled_from(
    [
        *"aZé9 .!?…\"'”’)(“\n\r\t\x85\u2028\u00a0\x1c我。！？．」「।؟ह\u3000",
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
    for at_spaces in (False, True):
        sentences = split_sentences(text, at_spaces=at_spaces)
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


@pytest.mark.parametrize(
    "sentences",
    [
        ["今天下雨。", "我们在家！", "为什么？！", "没人知道……", "他说：“你好！”", "走了。"],
        ["你好!", "这是iPhone15。", "iOS 3.5版?", "好"],  # half-width ends, as they are often typed
        ["「すごい！」", "本当？", "これは３．５である．", "また見た｡", "はい"],
        ["यह है।", "वह था॥", "क्या?", "हाँ।"],
        ["هل هذا؟", "نعم.", "لا"],
        ["یہ ہے۔", "وہ تھا۔"],
        ["ሰላም ነው።", "አዎ፧", "እሺ።"],
        ["Բարեւ։", "Այո։"],
        ["နေကောင်းလား။", "ကောင်းပါတယ်။"],
    ],
)
def test_other_scripts(sentences):
    """Where a script has no spaces, and where it has some."""
    assert split_sentences(" ".join(sentences)) == sentences
    if sentences[1] != "نعم.":  # a full stop alone needs the space
        assert split_sentences("".join(sentences)) == sentences


def test_ends_are_those_of_unicode():
    regex = pytest.importorskip("regex")
    characters = map(chr, range(sys.maxunicode + 1))
    ends = [c for c in characters if regex.fullmatch(r"\p{SB=STerm}", c)]
    assert len(ends) > 150
    assert not [c for c in ends if split_sentences(f"我{c}我") != [f"我{c}", "我"]]
    assert not [c for c in ends if split_sentences(f"Yes{c} No") != [f"Yes{c}", "No"]]


@given(st.lists(st.sampled_from([*'aZ9 我的。！.!?…"”\n', "Mr. ", ". "])).map("".join))
def test_at_spaces_splits_at_spaces_alone(text):
    sentences = split_sentences(text, at_spaces=True)
    position = 0
    for sentence in sentences:
        start = text.index(sentence, position)
        assert position == 0 or text[position:start].isspace()
        position = start + len(sentence)
    assert split_sentences("他走了。我也走了。", at_spaces=True) == ["他走了。我也走了。"]


def test_line_end_always_ends_a_sentence():
    assert split_sentences("A title\nand then\r\nmore\n\n  \n") == ["A title", "and then", "more"]
    assert split_sentences("") == split_sentences(" \n\t ") == []


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)), st.integers(1, 20))
def test_pieces_are_the_text(text, size):
    pieces = [*cut_pieces(text, size)]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces[:-1])
    assert len(pieces[-1]) <= size


def test_pieces_end_between_lines_sentences_or_words():
    assert [*cut_pieces("One.\ntwo lines. Three", 12)] == ["One.\n", "two lines. ", "Three"]
    assert [*cut_pieces("one two three", 9)] == ["one two ", "three"]
    assert [*cut_pieces("我来了。我看了。我赢", 6)] == ["我来了。", "我看了。我赢"]
    assert [*cut_pieces("unbroken", 3)] == ["unb", "rok", "en"]


def test_time_is_linear():
    for text in (
        "." * 200_000,
        ". " * 100_000,
        "a" * 200_000,
        '"' * 100_000 + ". A",
        "A. " * 60_000,
        "!" + " " * 10**5,
        "。" * 200_000,
        "!" * 200_000 + "我",
        "！" + "」" * 10**5,
        "!「" * 10**5,
    ):
        split_sentences(text)  # each would take minutes if it were quadratic
