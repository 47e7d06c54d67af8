import json
import random

import pytest

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import tokenizer
from dwt_jax.data.prepare import prepare_data
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.prepared_data import CLS, SEP, data_config, read_split

CHINESE = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]
HINDI = "यह एक किताब है। वह विद्यालय जाता है और कुछ पढ़ता है॥ क्या तुम सुन रहे हो? हाँ, मैं सुन रहा हूँ।"


def source_of(tmp_path, lines: list[str]) -> Source:
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Source(kind="text", path=str(tmp_path / "corpus.txt"), documents="lines")


def chinese_lines(count: int = 200) -> list[str]:
    draw = random.Random(0)
    sentences = [
        "".join(draw.choices(CHINESE, k=draw.randint(3, 60))) + "。！？"[i % 3] for i in range(4 * count)
    ]
    return ["".join(sentences[4 * i : 4 * i + 4]) for i in range(count)]


@pytest.mark.parametrize("row_mode", ["sentence", "packed", "wrapped"])
def test_no_character_of_chinese_is_lost(tmp_path, row_mode):
    lines = chinese_lines()
    data = Data(
        sources=(source_of(tmp_path, lines),), sequence_length=32, validation_fraction=0.1, row_mode=row_mode
    )
    index = prepare_data(data, tmp_path / "out", workers=1)
    tokens = tokenizer.load_vocabulary(tmp_path / "out" / "tokenizer").tokens
    text = {
        split: "".join(
            tokens[t]
            for row, segments, _ in read_split(tmp_path / "out", split)
            for t, segment in zip(row, segments, strict=True)
            if segment and t not in (CLS, SEP)
        )
        for split in ("train", "held_out")
    }
    assert sum(map(len, text.values())) > 0.99 * sum(map(len, lines))
    all_text = text["train"] + text["held_out"]
    assert all(line in all_text for line in lines if "[UNK]" not in line and set(line) <= set(tokens))
    shares = index["sources"][0]["text"]
    assert shares["lost"] == shares["skipped"] == 0
    assert shares["unknown_tokens"] < 0.005
    assert shares["longest_document"] == max(map(len, lines))
    assert shares["characters_per_token"] == pytest.approx(1, rel=0.01)
    assert (shares["cut"] > 0) == (row_mode != "wrapped")


def test_shares_and_rows_are_printed(tokenizer_dir, corpus, tmp_path, log_lines):
    data = data_config(tokenizer_dir, corpus, sentence_stride=4)
    index = prepare_data(data, tmp_path / "out", workers=1)
    text = index["sources"][0]["text"]
    assert 0.5 < text["skipped"] < 0.9
    summary = next(line for line in log_lines if "characters a token" in line)
    for value in (f"{text['skipped']:.2%} skipped", f"{text['longest_document']:,} characters;"):
        assert value in summary
    rows = [line for line in log_lines if ", row " in line]
    assert len(rows) == 3
    assert "[CLS]" in rows[0]
    assert json.loads((tmp_path / "out" / "index.json").read_text())["sources"][0]["text"] == text


def test_a_tokenizer_that_drops_text_is_refused_before_the_rows(tmp_path):
    """A BPE of Latin letters without a token for unknown characters drops all others in silence."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import models

    vocab = {token: i for i, token in enumerate([*WORDPIECE_TOKENS, *"abcdefg "])}
    LibraryTokenizer(models.BPE(vocab, [])).save(str(tmp_path / "tokenizer.json"))
    lines = [f"abc def {'é' if i < 3 else ''} {'a' * i}" for i in range(20)]
    data = data_config(tmp_path / "tokenizer.json", source_of(tmp_path, lines))
    with pytest.raises(
        UserError, match=r"data\.sources\.0: \d\.\d% of the text \(such as 'é'\) is in no token"
    ) as error:
        prepare_data(Data(**{**vars(data), "max_lost_share": 0.001}), tmp_path / "out", workers=1)
    assert "\n" not in str(error.value)
    index = prepare_data(data, tmp_path / "out", workers=1)  # up to 1 %
    assert index["sources"][0]["text"]["lost"] == pytest.approx(
        3 / sum(len(x.replace(" ", "")) for x in lines)
    )


def test_sentences_without_tokens_are_refused_where_the_sample_does_not_reach(
    tokenizer_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("dwt_jax.data.text_checks.SAMPLE_MEGABYTES", 0.0001)
    monkeypatch.setattr(
        "dwt_jax.data.encode.make_text_encoder",
        lambda _: lambda texts: [[] if "lost" in text else [7] * 5 for text in texts],
    )
    source = source_of(tmp_path, [f"{'This is lost' if i > 90 else 'This is found'} {i}" for i in range(100)])
    with pytest.raises(UserError, match=r"data\.sources\.0: \d+\.\d% of the text is in no token"):
        prepare_data(data_config(tokenizer_dir, source), tmp_path / "out", workers=1)


@pytest.mark.parametrize("text", [HINDI, "「すごい！」と彼は言った。ガラスの器がある。"])
def test_lost_vowel_signs_are_refused(tmp_path, text):
    source = source_of(tmp_path, [f"{text} {i}" for i in range(100)])
    data = Data(sources=(source,), sequence_length=32, validation_fraction=0.1)
    with pytest.raises(
        UserError, match=r"vowel signs and other marks, .*data.tokenizer.lowercase=False keeps"
    ):
        prepare_data(data, tmp_path / "out", workers=1)
    cased = Data(**{**vars(data), "tokenizer": Tokenizer(lowercase=False)})
    index = prepare_data(cased, tmp_path / "out", workers=1)
    assert index["sources"][0]["text"]["lost"] == 0


def test_accents_of_latin_letters_may_be_dropped(tmp_path):
    source = source_of(tmp_path, [f"Ärzte und Élan, naïve Café {i}" for i in range(100)])
    data = Data(sources=(source,), sequence_length=32, validation_fraction=0.1)
    assert prepare_data(data, tmp_path / "out", workers=1)["sources"][0]["text"]["lost"] == 0


def test_much_unknown_text_is_warned_of(tmp_path, log_lines):
    source = source_of(tmp_path, chinese_lines())
    data = Data(
        sources=(source,),
        tokenizer=Tokenizer(alphabet_size=1400),
        sequence_length=32,
        validation_fraction=0.1,
    )
    index = prepare_data(data, tmp_path / "out", workers=1)
    assert 0.02 < index["sources"][0]["text"]["unknown_tokens"] < 0.1
    warning = next(line for line in log_lines if "warning" in line and "unknown to the tokenizer" in line)
    assert warning.endswith("(a larger data.tokenizer.alphabet_size)")


def test_words_that_are_too_long_are_named_as_the_cause(tmp_path, log_lines):
    """Thai has no spaces between words."""
    draw = random.Random(0)
    words = ["ไทย", "ภาษา", "ว่าง", "ระหว่าง", "คำ", "มาก"]
    source = source_of(tmp_path, ["".join(draw.choices(words, k=10 + i % 30)) for i in range(300)])
    data = Data(
        sources=(source,),
        tokenizer=Tokenizer(lowercase=False, vocab_size=500),
        sequence_length=32,
        validation_fraction=0.1,
    )
    index = prepare_data(data, tmp_path / "out", workers=1)
    text = (tmp_path / "corpus.txt").read_text(encoding="utf-8").split()
    share = sum(len(word) for word in text if len(word) > 100) / sum(map(len, text))
    assert index["sources"][0]["text"]["unknown_in_long_words"] == pytest.approx(share, abs=0.02)
    warning = next(line for line in log_lines if "unknown to the tokenizer" in line)
    assert "(its words are too long for the tokenizer, as in scripts without spaces: divide them" in warning


def test_too_small_an_alphabet_is_named_as_the_cause(tmp_path):
    data = Data(sources=(source_of(tmp_path, chinese_lines()),), tokenizer=Tokenizer(alphabet_size=9))
    with pytest.raises(UserError, match=r"are unknown, .* \(a larger data\.tokenizer\.alphabet_size\)"):
        prepare_data(data, tmp_path / "out", workers=1)
