import json

import pytest

from dwt_jax.config import Data, Source
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.splits import choose_split
from dwt_jax.errors import UserError
from helpers.prepared_data import data_config, encode_sentences, hash_fraction, read_split


def source_of(texts: list[str], path) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(kind="jsonl", path=str(path))


def rows_of_text(directory, split) -> list[list[int]]:
    return [
        [t for t, s in zip(tokens[1:], segments[1:], strict=True) if s][:-1]
        for tokens, segments, _ in read_split(directory, split)
    ]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_the_end_of_a_single_document_is_held_out(tokenizer_dir, tmp_path, fraction, log_lines):
    sentences = [f"This is sentence number {i} of one long document." for i in range(100)]
    source = source_of([" ".join(sentences)], tmp_path / "one.jsonl")
    data = data_config(tokenizer_dir, source, validation_fraction=fraction, row_mode="sentence")
    index = prepare_data(data, tmp_path / "out", workers=1)
    num_held_out = len(rows_of_text(tmp_path / "out", "held_out"))
    assert num_held_out == pytest.approx(100 * fraction, abs=1)
    for split, part in (("train", sentences[:-num_held_out]), ("held_out", sentences[-num_held_out:])):
        assert rows_of_text(tmp_path / "out", split) == encode_sentences(tokenizer_dir, " ".join(part))
        assert index["splits"][split]["documents"] == 1
    assert "the last part of each is held out" in log_lines[0]


def test_of_a_few_documents_the_one_with_the_lowest_hash_is_held_out(tokenizer_dir, tmp_path):
    texts = [f"A document. It has the number {i}. That is all." for i in range(100)]
    texts = [text for text in texts if hash_fraction(text) > 0.01][:30]
    lowest = min(texts, key=hash_fraction)
    source = source_of(texts, tmp_path / "few.jsonl")
    data = data_config(tokenizer_dir, source, validation_fraction=0.01, row_mode="sentence")
    index = prepare_data(data, tmp_path / "out", workers=1)
    assert rows_of_text(tmp_path / "out", "held_out") == encode_sentences(tokenizer_dir, lowest)
    assert index["data"]["validation_fraction"] == 0.01
    assert len(read_split(tmp_path / "out", "train")) == 29 * 3


def test_enough_documents_are_split_by_their_hash_alone(corpus, log_lines):
    assert choose_split(Data(sources=(corpus,), validation_fraction=0.2)) == (0.2, False)
    assert not log_lines


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_the_share_in_the_message_works(tmp_path, fraction):
    """And the tokenizer, which does not exist, was not needed for it."""
    text = " ".join(f"Sentence {i} is short." for i in range(12))
    data = Data(sources=(source_of([text], tmp_path / "one.jsonl"),), validation_fraction=fraction)
    with pytest.raises(UserError, match=r"data\.validation_fraction is") as error:
        choose_split(data)
    share = float(str(error.value).split()[-1])
    works = Data(sources=data.sources, validation_fraction=share)
    assert choose_split(works) == (share, True)


def test_nothing_to_read_is_told_at_once(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    data = Data(sources=(Source(kind="text", path=str(tmp_path / "empty.txt")),))
    with pytest.raises(UserError, match="no document in any of the files read"):
        choose_split(data)


def test_tokenizer_is_trained_without_the_held_out_part(tmp_path):
    sentences = [f"Sentence number {i}." for i in range(60)]
    (tmp_path / "a.txt").write_text(" ".join([*sentences, "The last has a ж."]))
    source = Source(kind="text", path=str(tmp_path / "a.txt"))
    data = Data(sources=(source,), sequence_length=16, validation_fraction=0.02)
    prepare_data(data, tmp_path / "out", workers=1)
    assert "ж" not in (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text()
    assert len(split_sentences((tmp_path / "a.txt").read_text())) == 61
