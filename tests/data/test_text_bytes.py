"""The bytes of text that index.json counts, against the source text and against the decoded rows."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest

from dwt_jax.config import Source, Tokenizer
from dwt_jax.data import prepare
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.text_checks import count_text_bytes
from dwt_jax.data.tokenizer import load_vocabulary
from helpers.decoders import save_decoder_tokenizer
from helpers.prepared_data import data_config, hash_fraction, read_split

SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()]
SENTENCES = [
    "The café is naïve, 3 € a cup.",
    "Ärger über Größe!",
    "「你好」，世界。",
    "今天天气很好。我们去公园！",
    "Что это? Это кот.",
    "No end 🙂 here",
    "One 'quoted' … and so on.",
]


def one_byte_a_gap(text: str) -> int:
    return len(" ".join(text.split()).encode())


def make_texts(gaps: list[str], number: int = 60) -> list[str]:
    """Documents of sentences in several scripts, with `gaps` between sentences."""
    draw = random.Random(0)

    def document() -> str:
        sentences = draw.choices(SENTENCES, k=draw.randint(1, 12))
        return "".join(part for s in sentences for part in (s, draw.choice(gaps))).strip()

    return [document() for _ in range(number)]


def write_source(tmp_path, texts: list[str]) -> Source:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    return Source(kind="jsonl", path=str(path))


def byte_level_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    return save_decoder_tokenizer(tmp_path / "tokenizer", "qwen2", tmp_path / "corpus.txt")


def test_white_space_counts_as_one_byte_a_run():
    draw = random.Random(0)
    for _ in range(300):
        texts = [
            "x".join(
                "".join(draw.choices([*SPACES, "a", "é", "字", "🙂", "\x00", "\x1b"], k=9)) for _ in "ab"
            )
            for _ in range(draw.randint(0, 3))
        ]
        assert count_text_bytes(texts) == sum(map(one_byte_a_gap, texts))


@pytest.mark.parametrize("row_mode", ["wrapped", "packed", "sentence"])
@pytest.mark.parametrize("kind", ["wordpiece", "byte-level"])
def test_bytes_are_those_of_the_source_for_every_tokenizer(tmp_path, monkeypatch, kind, row_mode):
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 500)
    texts = make_texts([" ", "", "  ", "\n", " \n\t\n", "\u3000", "\xa0 ", "\r\n"])
    texts += [texts[3], "\u200b"]  # WordPiece makes nothing of a space of width 0
    source = write_source(tmp_path, texts)
    tokenizer = Tokenizer(vocab_size=400, lowercase=False)
    if kind == "byte-level":
        tokenizer = Tokenizer(path=str(byte_level_tokenizer(tmp_path)))
    data = data_config(tmp_path, source, row_mode=row_mode, tokenizer=tokenizer)
    splits = prepare_data(data, tmp_path / "out", workers=1)["splits"]
    num_tokens = {split: totals["text_tokens"] for split, totals in splits.items()}
    assert all(splits[split]["sources"][0]["text_bytes"] == splits[split]["text_bytes"] for split in splits)
    counted = [text for text in texts if text != "\u200b" or kind == "byte-level"]
    for split, is_held_out in (("train", False), ("held_out", True)):
        expected = [one_byte_a_gap(text) for text in counted if (hash_fraction(text) < 0.2) == is_held_out]
        assert splits[split]["text_bytes"] == sum(expected) > num_tokens[split]


@pytest.mark.parametrize("end_token", ["segments", "documents"])
@pytest.mark.parametrize(
    ("row_mode", "stride", "number"),
    [("wrapped", 1, 60), ("wrapped", 3, 60), ("packed", 2, 60), ("sentence", 1, 60), ("wrapped", 1, 1)],
)
def test_bytes_are_those_of_the_decoded_rows(tmp_path, row_mode, stride, number, end_token):
    """Nothing is lost but breaks of lines. A single document is held out in part."""
    texts = [" ".join(make_texts([" ", "", "\n"], 60))] if number == 1 else make_texts([" ", "", "\n"])
    source = write_source(tmp_path, texts)
    tokenizer_dir = byte_level_tokenizer(tmp_path)
    data = data_config(tokenizer_dir, source, row_mode=row_mode, sentence_stride=stride, end_token=end_token)
    splits = prepare_data(data, tmp_path / "out", workers=1)["splits"]
    special = load_vocabulary(tokenizer_dir).special_ids
    decode = load_hf_tokenizer(tokenizer_dir).decode
    for split in splits:
        documents = defaultdict(list)
        for tokens, segments, first in read_split(tmp_path / "out", split):
            for token, segment in zip(tokens, segments, strict=True):
                if segment and token not in special:
                    documents[first + segment - 1].append(token)
        decoded = [decode(ids).strip().encode() for ids in documents.values()]
        assert sum(map(len, decoded)) == splits[split]["text_bytes"] > 0
        if stride == 1 and number > 1:
            in_split = [t for t in texts if (hash_fraction(t) < 0.2) == (split == "held_out")]
            assert decoded == [" ".join(text.split()).encode() for text in in_split]


def test_skipped_sentences_count_the_same_for_every_tokenizer(tmp_path):
    source = write_source(tmp_path, make_texts([" ", "", "\n"]))
    counts = []
    for name, tokenizer in (
        ("a", Tokenizer(vocab_size=400, lowercase=False)),
        ("b", Tokenizer(path=str(byte_level_tokenizer(tmp_path)))),
    ):
        data = data_config(tmp_path, source, sentence_stride=3, tokenizer=tokenizer)
        splits = prepare_data(data, tmp_path / name, workers=1)["splits"]
        counts.append([splits[split]["text_bytes"] for split in splits])
    assert counts[0] == counts[1]
    assert np.sum(counts[0]) < 0.5 * sum(map(one_byte_a_gap, make_texts([" ", "", "\n"])))
