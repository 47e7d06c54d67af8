import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import multiprocessing
import random
import subprocess
import sys
from itertools import chain
from multiprocessing import resource_tracker, util
from pathlib import Path

import numpy as np
import pytest

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import dataset, encode, prepare, tokenizer
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.sentence_splitter import split_sentences
from helpers.paths import ROOT
from helpers.prepared_data import (
    CLS,
    PAD,
    SEP,
    data_config,
    encode_sentences,
    file_hashes,
    hash_fraction,
    pack_naively,
    read_split,
    wrap_naively,
)


@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
@pytest.mark.parametrize("length", [8, 32, 128])
def test_rows_equal_the_naive_packer(tokenizer_dir, texts, corpus, tmp_path, length, row_mode):
    data = data_config(tokenizer_dir, corpus, sequence_length=length, row_mode=row_mode)
    index = prepare_data(data, tmp_path / "out", workers=1, shard_bytes=length * 2 * 50)
    for split, in_split in (
        ("train", lambda t: hash_fraction(t) >= 0.2),
        ("held_out", lambda t: hash_fraction(t) < 0.2),
    ):
        documents = [encode_sentences(tokenizer_dir, text) for text in texts if in_split(text)]
        expected = (
            pack_naively(documents, length)
            if row_mode == "packed"
            else wrap_naively(documents, length, continuation_ids(tokenizer_dir))
        )
        assert read_split(tmp_path / "out", split) == expected
        totals = index["splits"][split]
        num_tokens = sum(segment > 0 for _, segments, _ in expected for segment in segments)
        assert (totals["rows"], totals["tokens"]) == (len(expected), num_tokens)
        assert totals["padding"] == pytest.approx(1 - num_tokens / (len(expected) * length))
        assert [shard["rows"] for shard in totals["sources"][0]["shards"][:-1]] == [50] * (
            len(expected) // 50
        )
    assert index["sources"][0]["documents"] == len(texts)
    assert sum(index["splits"][split]["documents"] for split in index["splits"]) == len(texts) - 2


def continuation_ids(tokenizer_dir: Path) -> set[int]:
    tokens = tokenizer.load_vocabulary(tokenizer_dir).tokens
    return {i for i, token in enumerate(tokens) if token.startswith("##")}


@pytest.mark.parametrize("length", [64, 128])
def test_wrapped_rows_are_full_and_cut_no_word(tokenizer_dir, texts, corpus, tmp_path, length):
    data = data_config(tokenizer_dir, corpus, row_mode="wrapped", sequence_length=length)
    index = prepare_data(data, tmp_path / "out", workers=1)
    rows = read_split(tmp_path / "out", "train")
    last_row_padding = rows[-1][1].count(0) / (len(rows) * length)
    assert index["splits"]["train"]["padding"] - last_row_padding < 0.02
    continuations = continuation_ids(tokenizer_dir)
    for tokens, _, _ in rows:
        assert not any(t in continuations for cls, t in itertools.pairwise(tokens) if cls == CLS)


@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
def test_documents_can_be_read_back(tokenizer_dir, texts, corpus, tmp_path, row_mode):
    """From the rows alone: the tokens of segment s of a row belong to document first + s − 1."""
    data = data_config(tokenizer_dir, corpus, row_mode=row_mode)
    prepare_data(data, tmp_path / "out", workers=1)
    documents: dict[int, list[int]] = {}
    for tokens, segments, first in read_split(tmp_path / "out", "train"):
        for segment in range(1, max(segments) + 1):
            segment_tokens = [t for t, s in zip(tokens, segments, strict=True) if s == segment]
            assert (segment_tokens[0], segment_tokens[-1]) == (CLS, SEP)
            documents.setdefault(first + segment - 1, []).extend(segment_tokens[1:-1])
    expected = [
        [*chain.from_iterable(encode_sentences(tokenizer_dir, text))]
        for text in texts
        if hash_fraction(text) >= 0.2
    ]
    assert [documents[number] for number in sorted(documents)] == [ids for ids in expected if ids]


def test_tokens_are_those_of_transformers(tokenizer_dir, texts, corpus, tmp_path):
    from transformers import AutoTokenizer

    prepare_data(
        data_config(tokenizer_dir, corpus, row_mode="sentence", sequence_length=512),
        tmp_path / "out",
        workers=1,
    )
    auto_tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "tokenizer"))
    sentences = [s for text in texts if hash_fraction(text) >= 0.2 for s in split_sentences(text)]
    expected = [auto_tokenizer(sentence)["input_ids"] for sentence in sentences]
    rows = [
        [t for t, s in zip(tokens, segments, strict=True) if s]
        for tokens, segments, _ in read_split(tmp_path / "out", "train")
    ]
    assert rows == [ids for ids in expected if len(ids) > 2]


def in_rows_of(size: int, ids: list[int]) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def test_sentence_mode(tokenizer_dir, texts, corpus, tmp_path):
    prepare_data(data_config(tokenizer_dir, corpus, row_mode="sentence"), tmp_path / "out", workers=1)
    expected = []
    number = -1
    for text in texts:
        sentences = [ids for ids in encode_sentences(tokenizer_dir, text) if ids]
        if hash_fraction(text) < 0.2 or not sentences:
            continue
        number += 1
        for ids in itertools.chain.from_iterable(in_rows_of(30, ids) for ids in sentences):
            row = [CLS, *ids, SEP]
            expected.append((row + [PAD] * (32 - len(row)), [1] * len(row) + [0] * (32 - len(row)), number))
    assert any(len(ids) > 30 for text in texts for ids in encode_sentences(tokenizer_dir, text))
    assert read_split(tmp_path / "out", "train") == expected


def test_sentence_stride(tokenizer_dir, texts, corpus, tmp_path):
    """Of each document every n-th sentence, from a place that its text decides."""
    prepare_data(
        data_config(tokenizer_dir, corpus, sentence_stride=4, row_mode="sentence"),
        tmp_path / "out",
        workers=1,
    )
    expected = []
    for text in texts:
        if hash_fraction(text) >= 0.2:
            fingerprint = hashlib.blake2b(text.encode(), digest_size=32).digest()
            phase = int.from_bytes(fingerprint[8:16], "big")
            expected += [
                part
                for i, ids in enumerate(encode_sentences(tokenizer_dir, text))
                for part in in_rows_of(30, ids)
                if (i + phase) % 4 == 0
            ]
    rows = read_split(tmp_path / "out", "train")
    assert [tokens[1 : len(ids) + 1] for (tokens, _, _), ids in zip(rows, expected, strict=True)] == expected


# What the output depends on


@pytest.mark.parametrize("row_mode", ["wrapped", "packed", "sentence"])
def test_same_output_for_any_chunks(tokenizer_dir, corpus, tmp_path, monkeypatch, row_mode):
    data = data_config(tokenizer_dir, corpus, row_mode=row_mode)
    hashes = []
    for chars in (1, 5000, 1 << 20):
        monkeypatch.setattr("dwt_jax.data.prepare.CHUNK_CHARS", chars)
        prepare_data(data, tmp_path / str(chars), workers=1)
        hashes.append(file_hashes(tmp_path / str(chars)))
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.slow
@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
def test_same_output_for_any_number_of_workers(tokenizer_dir, texts, tmp_path, row_mode):
    path = tmp_path / "many.jsonl"
    draw = random.Random(1)
    many = ["\n".join(draw.choices(texts, k=40)) for _ in range(30)]  # several chunks of a megabyte
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    data = data_config(tokenizer_dir, Source(kind="jsonl", path=str(path)), row_mode=row_mode)
    for workers in (1, 2):
        prepare_data(data, tmp_path / f"out{workers}", workers=workers)
    assert file_hashes(tmp_path / "out1") == file_hashes(tmp_path / "out2")


@pytest.mark.parametrize(
    ("started", "error"),
    [(0, BrokenPipeError(errno.EPIPE, "helper")), (1, BlockingIOError(errno.EAGAIN, "limit"))],
    ids=["none", "one"],
)
def test_without_processes_one_does_the_work(
    tokenizer_dir, corpus, tmp_path, monkeypatch, started, error, log_lines
):
    """A limit of processes, or the helper of multiprocessing that has ended."""
    data = data_config(tokenizer_dir, corpus)
    spawn, calls = util.spawnv_passfds, itertools.count()

    def fail(*arguments):
        if next(calls) >= started:
            raise error
        return spawn(*arguments)

    resource_tracker.ensure_running()
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 1000)
    prepare_data(data, tmp_path / "out1", workers=1)
    monkeypatch.setattr(util, "spawnv_passfds", fail)
    prepare_data(data, tmp_path / "out2", workers=3)
    assert file_hashes(tmp_path / "out1") == file_hashes(tmp_path / "out2")
    assert sum("prepare: 3 worker processes cannot be started ([Errno" in line for line in log_lines) == 1
    for process in multiprocessing.active_children():
        process.join(10)
        assert not process.is_alive()


def test_split_depends_on_the_text_alone(tokenizer_dir, texts, tmp_path):
    held_out = []
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", texts[30:] + texts[:30])):
        paths = [tmp_path / f"{name}{part}.jsonl" for part in range(2)]
        for path, half in zip(paths, (order[:25], order[25:]), strict=True):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
        data = data_config(
            tokenizer_dir, *(Source(kind="jsonl", path=str(path)) for path in paths), row_mode="sentence"
        )
        prepare_data(data, tmp_path / name, workers=1)
        tokens = [row[0] for row in read_split(tmp_path / name, "held_out")]
        held_out.append(sorted(tokens))
    assert held_out[0] == held_out[1] == held_out[2]


def test_digest_depends_on_the_content_only(tokenizer_dir, corpus, tmp_path):
    index = prepare_data(data_config(tokenizer_dir, corpus), tmp_path / "a", workers=1)
    moved = tmp_path / "moved.jsonl.gz"
    moved.write_bytes(gzip.compress(Path(corpus.path).read_bytes()))
    moved_source = dataclasses.replace(corpus, path=str(moved), weight=2.0)
    assert (
        prepare_data(data_config(tokenizer_dir, moved_source), tmp_path / "b", workers=1)["digest"]
        == index["digest"]
    )
    for name, changes in {
        "c": {"sentence_stride": 2},
        "d": {"validation_fraction": 0.3},
        "e": {"row_mode": "sentence"},
        "f": {"row_mode": "packed"},
    }.items():
        other = prepare_data(data_config(tokenizer_dir, corpus, **changes), tmp_path / name, workers=1)
        assert other["digest"] != index["digest"]


def test_documents_are_numbered_through_the_sources(tokenizer_dir, texts, tmp_path):
    paths = [tmp_path / f"{part}.jsonl" for part in range(2)]
    for path, half in zip(paths, (texts[:30], texts[30:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    prepare_data(
        data_config(tokenizer_dir, *(Source(kind="jsonl", path=str(p)) for p in paths)),
        tmp_path / "o",
        workers=1,
    )
    train = dataset.open_dataset(tmp_path / "o", "train")
    first, segments = (
        dataset.first_document_ids(train),
        dataset.read_rows(train, np.arange(dataset.num_rows(train))).segment_ids,
    )
    numbers = {int(d) + s for d, last in zip(first, segments.max(1), strict=True) for s in range(last)}
    texts_with_tokens = [
        text for text in texts if hash_fraction(text) >= 0.2 and any(encode_sentences(tokenizer_dir, text))
    ]
    assert numbers == set(range(len(texts_with_tokens)))


def test_special_tokens_in_a_text_are_encoded_as_text(tokenizer_dir, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"A {n} [SEP] b [MASK] c." for n in range(50)))
    prepare_data(
        data_config(tokenizer_dir, Source(kind="text", path=str(path))),
        tmp_path / "out",
        workers=1,
    )
    for tokens, segments, _ in read_split(tmp_path / "out", "train"):
        assert tokens.count(SEP) == max(segments)
        assert 4 not in tokens


def test_tokenizer_is_trained_without_the_held_out_documents(tmp_path):
    lines = [
        f"document number {n} {'ж' if hash_fraction(f'document number {n} ж') < 0.3 else ''}".strip()
        for n in range(99)
    ]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    source = Source(kind="text", path=str(tmp_path / "a.txt"), documents="lines")
    held = [line for line in lines if "ж" in line]
    assert held
    data = Data(
        sources=(source,), tokenizer=Tokenizer(vocab_size=200), sequence_length=16, validation_fraction=0.3
    )
    prepare_data(data, tmp_path / "out", workers=1)
    assert "ж" not in tokenizer.load_vocabulary(tmp_path / "out" / "tokenizer").tokens


def test_index_describes_config_and_tokenizer(tokenizer_dir, corpus, tmp_path):
    data = data_config(tokenizer_dir, corpus)
    index = prepare_data(data, tmp_path / "out", workers=1)
    assert index == json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["data"] == json.loads(json.dumps(dataclasses.asdict(data)))
    assert (index["sequence_length"], index["row_mode"], index["dtype"]) == (32, "wrapped", "uint16")
    assert index["tokenizer"]["vocab_size"] == 1000
    assert index["tokenizer"]["digest"] == tokenizer.tokenizer_digest(tokenizer_dir)


# Memory


@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
def test_long_sentences_are_encoded_in_pieces(tokenizer_dir, tmp_path, monkeypatch, row_mode):
    """The rows are the same: a WordPiece tokenizer does not look across white space."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"{'a long line of words ' * n} {n}" for n in range(40)))
    data = data_config(tokenizer_dir, Source(kind="text", path=str(tmp_path / "a.txt")), row_mode=row_mode)
    index = prepare_data(data, tmp_path / "long", workers=1)
    batches = []
    make_text_encoder = encode.make_text_encoder

    def counting(tokenizer):
        encode_texts = make_text_encoder(tokenizer)
        return lambda texts: batches.append(sum(map(len, texts))) or encode_texts(texts)

    monkeypatch.setattr(encode, "make_text_encoder", counting)
    monkeypatch.setattr(encode, "MAX_SENTENCE_CHARS", 100)
    cut = prepare_data(data, tmp_path / "cut", workers=1)
    assert max(batches) <= 200
    if row_mode == "wrapped":
        assert read_split(tmp_path / "cut", "train") == read_split(tmp_path / "long", "train")
    assert cut["splits"]["train"]["text_tokens"] == index["splits"]["train"]["text_tokens"]
    assert cut["digest"] != index["digest"] or row_mode == "packed"


MEASURE = """
import resource, sys
from pathlib import Path
from dwt_jax.config import Data, Tokenizer, Source
from dwt_jax.data.prepare import prepare_data
source = Source(kind="text", path=sys.argv[2])
tokenizer = Tokenizer(path=sys.argv[1])
data = Data(tokenizer=tokenizer, sources=(source,), validation_fraction=0.2, sentence_stride=10)
prepare_data(data, Path(sys.argv[3]), workers=1, shard_bytes=1 << 18)  # a tenth of the tokens, quickly
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_one_line", [False, True])
def test_memory_is_flat(tokenizer_dir, texts, tmp_path, in_one_line):
    peak = {}
    block = "\n\n".join(texts)
    for megabytes in (15, 60):
        path = tmp_path / f"{megabytes}.txt"
        with open(path, "w") as file:
            for n in range(megabytes * 10**6 // len(block)):
                file.write(" ".join(block.split()) if in_one_line else f"{n}\n\n{block}\n\n")
        command = [
            sys.executable,
            "-c",
            MEASURE,
            str(tokenizer_dir),
            str(path),
            str(tmp_path / f"out{megabytes}"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peak[megabytes] = int(run.stdout.split()[-1])
    assert peak[60] - peak[15] < 100, f"peak MB by corpus MB: {peak}"
