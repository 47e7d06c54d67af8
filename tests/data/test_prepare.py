import dataclasses
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import dataset, tokenizer
from dwt_jax.data.packing import RowFormat, Sentences, concat_sentences, empty_sentences, pack_sentences
from dwt_jax.data.prepare import get_prepared, prepare_data
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import iter_documents
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_pipelines import WORDPIECE
from helpers.paths import PYTHONPATH, ROOT

PAD, CLS, SEP = 0, 2, 3


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer"
    texts = [*iter_documents(Source())][::40]
    tokenizer.save_tokenizer(tokenizer.train_tokenizer(lambda: texts, 1000, True), path, True)
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """60 documents of 1 to 40 sentences, some without a token, one pair of duplicates."""
    sentences = split_sentences([*iter_documents(Source())][100])
    draw = random.Random(0)
    found = [" ".join(draw.choices(sentences, k=draw.randint(1, 40))) for _ in range(57)]
    return [*found[:20], "\u200b", *found[20:], "\u0003 \u200b", found[3]]


@pytest.fixture
def corpus(texts, tmp_path) -> Source:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(kind="jsonl", path=str(path))


def config(words: Path, *sources: Source, **changes) -> Data:
    base = Data(
        sources=sources, tokenizer=Tokenizer(path=str(words)), sequence_length=32, validation_fraction=0.2
    )
    return dataclasses.replace(base, **changes)


def content(directory: Path) -> dict[str, str]:
    """Hashes of all files of a prepared directory."""
    found = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in found}


def share(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=32).digest()[:8], "big") / 2**64


def tokenised(words: Path, text: str) -> list[list[int]]:
    ours = tokenizer.load_hf_tokenizer(words)
    return [ours.encode(sentence, add_special_tokens=False).ids for sentence in split_sentences(text)]


# Rows, against a packer that takes one sentence after the other


def naive(documents_: list[list[list[int]]], length: int) -> list[tuple[list[int], list[int], int]]:
    """(tokens, segments, first document) of each row."""
    done, row, segments, first, inside = [], [], [], None, None
    number = -1

    def close():
        nonlocal row, segments, first, inside
        if row:
            filler = [PAD] * (length - len(row))
            done.append((row + filler, segments + [0] * len(filler), first))
        row, segments, first, inside = [], [], None, None

    for document in documents_:
        if not any(document):
            continue
        number += 1
        for sentence in document:
            for at in range(0, len(sentence), length - 2):
                piece = sentence[at : at + length - 2]
                if len(row) + len(piece) + (0 if inside == number else 2) > length:
                    close()
                if inside == number:
                    segment = segments[-1]
                    row.pop()
                    segments.pop()
                else:
                    segment = segments[-1] + 1 if segments else 1
                    first = number if first is None else first
                    row.append(CLS)
                    segments.append(segment)
                row += [*piece, SEP]
                segments += [segment] * (len(piece) + 1)
                inside = number
    close()
    return done


def stored(directory: Path, split: str) -> list[tuple[list[int], list[int], int]]:
    opened = dataset.open_dataset(directory, split)
    found = dataset.read_rows(opened, np.arange(dataset.num_rows(opened)))
    first = dataset.first_document_ids(opened)
    return [*zip(found["tokens"].tolist(), found["segments"].tolist(), first.tolist(), strict=True)]


@pytest.mark.parametrize("length", [8, 32, 128])
def test_rows_are_those_of_the_naive_packer(words, texts, corpus, tmp_path, length):
    data = config(words, corpus, sequence_length=length)
    index = prepare_data(data, tmp_path / "out", workers=1, log=silent, shard_bytes=length * 2 * 50)
    for split, inside in (("train", lambda t: share(t) >= 0.2), ("held_out", lambda t: share(t) < 0.2)):
        expected = naive([tokenised(words, text) for text in texts if inside(text)], length)
        assert stored(tmp_path / "out", split) == expected
        found = index["splits"][split]
        real = sum(segment > 0 for _, segments, _ in expected for segment in segments)
        assert (found["rows"], found["tokens"]) == (len(expected), real)
        assert found["padding"] == pytest.approx(1 - real / (len(expected) * length))
        assert [shard["rows"] for shard in found["sources"][0]["shards"][:-1]] == [50] * (len(expected) // 50)
    assert index["sources"][0]["documents"] == len(texts)
    assert sum(index["splits"][split]["documents"] for split in index["splits"]) == len(texts) - 2


def test_documents_can_be_read_back(words, texts, corpus, tmp_path):
    """From the rows alone: the tokens of segment s of a row belong to document first + s − 1."""
    prepare_data(config(words, corpus), tmp_path / "out", workers=1, log=silent)
    back: dict[int, list[int]] = {}
    for tokens, segments, first in stored(tmp_path / "out", "train"):
        for segment in range(1, max(segments) + 1):
            stretch = [t for t, s in zip(tokens, segments, strict=True) if s == segment]
            assert (stretch[0], stretch[-1]) == (CLS, SEP)
            back.setdefault(first + segment - 1, []).extend(stretch[1:-1])
    whole = [[*chain.from_iterable(tokenised(words, text))] for text in texts if share(text) >= 0.2]
    assert [back[number] for number in sorted(back)] == [ids for ids in whole if ids]


def test_tokens_are_those_of_transformers(words, texts, corpus, tmp_path):
    from transformers import AutoTokenizer

    prepare_data(
        config(words, corpus, row_mode="sentence", sequence_length=512),
        tmp_path / "out",
        workers=1,
        log=silent,
    )
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "tokenizer"))
    sentences = [s for text in texts if share(text) >= 0.2 for s in split_sentences(text)]
    expected = [theirs(sentence)["input_ids"] for sentence in sentences]
    found = [
        [t for t, s in zip(tokens, segments, strict=True) if s]
        for tokens, segments, _ in stored(tmp_path / "out", "train")
    ]
    assert found == [ids for ids in expected if len(ids) > 2]


def test_sentence_mode(words, texts, corpus, tmp_path):
    prepare_data(config(words, corpus, row_mode="sentence"), tmp_path / "out", workers=1, log=silent)
    expected = []
    number = -1
    for text in texts:
        sentences = [ids for ids in tokenised(words, text) if ids]
        if share(text) < 0.2 or not sentences:
            continue
        number += 1
        for ids in sentences:
            row = [CLS, *ids[:30], SEP]
            expected.append((row + [PAD] * (32 - len(row)), [1] * len(row) + [0] * (32 - len(row)), number))
    assert stored(tmp_path / "out", "train") == expected


def test_keep_every(words, texts, corpus, tmp_path):
    """Of each document every n-th sentence, from a place that its text decides."""
    prepare_data(
        config(words, corpus, sentence_stride=4, row_mode="sentence"), tmp_path / "out", workers=1, log=silent
    )
    expected = []
    for text in texts:
        if share(text) >= 0.2:
            print_ = hashlib.blake2b(text.encode(), digest_size=32).digest()
            phase = int.from_bytes(print_[8:16], "big")
            expected += [ids for i, ids in enumerate(tokenised(words, text)) if (i + phase) % 4 == 0 and ids]
    found = stored(tmp_path / "out", "train")
    assert [tokens[1 : len(ids[:30]) + 1] for (tokens, _, _), ids in zip(found, expected, strict=True)] == [
        ids[:30] for ids in expected
    ]


FRAMES = [RowFormat(length, "packed", PAD, CLS, SEP, np.dtype(np.uint16)) for length in (8, 13, 1000)]


@settings(deadline=None)
@given(
    st.sampled_from(FRAMES),
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), max_size=30),
    st.integers(1, 9),
)
def test_rows_do_not_depend_on_how_the_stream_was_cut(frame, lengths, cut):
    """And are the naive packer's; with rows of 1000 some hold more than 255 segments' worth."""
    numbers = iter(range(10, 60000))
    documents_ = [[[next(numbers) for _ in range(n)] for n in document] for document in lengths]
    left = empty_sentences(frame.dtype)
    found = []
    for start in range(0, len(documents_), cut):
        flat = [(i, ids) for i, d in enumerate(documents_[start : start + cut], start) for ids in d]
        tokens = np.array([t for _, ids in flat for t in ids], np.uint16)
        more = Sentences(tokens, np.array([len(ids) for _, ids in flat]), np.array([i for i, _ in flat]))
        packed, left = pack_sentences(concat_sentences(left, more), frame, last=False)
        found.append(packed)
    found.append(pack_sentences(left, frame, last=True)[0])
    rows_ = [row for packed in found for row in zip(*(part.tolist() for part in packed), strict=True)]
    assert rows_ == naive(documents_, frame.length)


def test_more_than_255_segments_in_a_row():
    frame = FRAMES[2]
    count = 300
    ones = np.ones(count, np.int64)
    packed, _ = pack_sentences(
        Sentences(np.full(count, 9, np.uint16), ones, np.arange(count)), frame, last=True
    )
    assert packed.segments.dtype == np.uint16
    assert packed.segments.max() == 300
    assert packed.tokens.tolist() == [[CLS, 9, SEP] * 300 + [PAD] * 100]


# What the output depends on


@pytest.mark.slow
def test_same_output_for_any_number_of_workers(words, texts, tmp_path):
    path = tmp_path / "many.jsonl"
    draw = random.Random(1)
    many = ["\n".join(draw.choices(texts, k=40)) for _ in range(30)]  # several chunks of a megabyte
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    data = config(words, Source(kind="jsonl", path=str(path)))
    for workers in (1, 2):
        prepare_data(data, tmp_path / f"out{workers}", workers=workers, log=silent)
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


def test_split_depends_on_the_text_alone(words, texts, tmp_path):
    found = []
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", texts[30:] + texts[:30])):
        paths = [tmp_path / f"{name}{part}.jsonl" for part in range(2)]
        for path, half in zip(paths, (order[:25], order[25:]), strict=True):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
        data = config(words, *(Source(kind="jsonl", path=str(path)) for path in paths), row_mode="sentence")
        prepare_data(data, tmp_path / name, workers=1, log=silent)
        tokens = [row[0] for row in stored(tmp_path / name, "held_out")]
        found.append(sorted(tokens))
    assert found[0] == found[1] == found[2]


def test_digest_is_of_the_content(words, corpus, tmp_path):
    index = prepare_data(config(words, corpus), tmp_path / "a", workers=1, log=silent)
    moved = tmp_path / "moved.jsonl.gz"
    moved.write_bytes(gzip.compress(Path(corpus.path).read_bytes()))
    elsewhere = dataclasses.replace(corpus, path=str(moved), weight=2.0)
    assert (
        prepare_data(config(words, elsewhere), tmp_path / "b", workers=1, log=silent)["digest"]
        == index["digest"]
    )
    for name, changes in {
        "c": {"sentence_stride": 2},
        "d": {"validation_fraction": 0.3},
        "e": {"row_mode": "sentence"},
    }.items():
        other = prepare_data(config(words, corpus, **changes), tmp_path / name, workers=1, log=silent)
        assert other["digest"] != index["digest"]


def test_documents_are_numbered_through_the_sources(words, texts, tmp_path):
    paths = [tmp_path / f"{part}.jsonl" for part in range(2)]
    for path, half in zip(paths, (texts[:30], texts[30:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    prepare_data(
        config(words, *(Source(kind="jsonl", path=str(p)) for p in paths)),
        tmp_path / "o",
        workers=1,
        log=silent,
    )
    opened = dataset.open_dataset(tmp_path / "o", "train")
    first, segments = (
        dataset.first_document_ids(opened),
        dataset.read_rows(opened, np.arange(dataset.num_rows(opened)))["segments"],
    )
    seen = {int(d) + s for d, last in zip(first, segments.max(1), strict=True) for s in range(last)}
    have_tokens = [text for text in texts if share(text) >= 0.2 and any(tokenised(words, text))]
    assert seen == set(range(len(have_tokens)))


def test_special_tokens_in_a_text_are_text(words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"A {n} [SEP] b [MASK] c." for n in range(50)))
    prepare_data(config(words, Source(kind="text", path=str(path))), tmp_path / "out", workers=1, log=silent)
    for tokens, segments, _ in stored(tmp_path / "out", "train"):
        assert tokens.count(SEP) == max(segments)
        assert 4 not in tokens


def test_tokenizer_is_trained_without_the_held_out_documents(tmp_path):
    lines = [
        f"document number {n} {'ж' if share(f'document number {n} ж') < 0.3 else ''}".strip()
        for n in range(99)
    ]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    source = Source(kind="text", path=str(tmp_path / "a.txt"), documents="lines")
    held = [line for line in lines if "ж" in line]
    assert held
    data = Data(
        sources=(source,), tokenizer=Tokenizer(vocab_size=200), sequence_length=16, validation_fraction=0.3
    )
    prepare_data(data, tmp_path / "out", workers=1, log=silent)
    assert "ж" not in tokenizer.load_vocabulary(tmp_path / "out" / "tokenizer").tokens


def test_index(words, corpus, tmp_path):
    data = config(words, corpus)
    index = prepare_data(data, tmp_path / "out", workers=1, log=silent)
    assert index == json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["data"] == json.loads(json.dumps(dataclasses.asdict(data)))
    assert (index["sequence_length"], index["row_mode"], index["dtype"]) == (32, "packed", "uint16")
    assert index["tokenizer"]["vocab_size"] == 1000
    assert index["tokenizer"]["digest"] == tokenizer.tokenizer_digest(words)


# Directories: whole or absent


PROGRAM = """
import sys
from pathlib import Path
from dwt_jax.config import Data, Tokenizer, Source
from dwt_jax.data.prepare import prepare_data
if __name__ == "__main__":
    source = Source(kind="jsonl", path=sys.argv[3])
    data = Data(tokenizer=Tokenizer(path=sys.argv[1]), sources=(source,), validation_fraction=0.2)
    prepare_data(data, Path(sys.argv[2]), workers=int(sys.argv[4]))
"""


def start(words: Path, out: Path, corpus: Path, workers: int, tmp_path: Path) -> subprocess.Popen:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(program), str(words), str(out), str(corpus), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def endless(texts: list[str], tmp_path: Path) -> Path:
    """A source that takes longer than the test waits."""
    path = tmp_path / "endless.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 400))
    return path


def processes_of(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group_ = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group_) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_prepare_leaves_nothing_that_looks_finished(words, texts, corpus, tmp_path):
    out = tmp_path / "sub" / "out"
    process = start(words, out, endless(texts, tmp_path), 2, tmp_path)
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(".out.partial-*/train")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # the workers are at it
    assert process.poll() is None, "ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    leftovers = list(out.parent.glob(".out.partial-*"))
    assert len(leftovers) == 1
    assert not (leftovers[0] / "index.json").exists()
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(process.pid), "workers outlived their parent"
    prepare_data(config(words, corpus), out, workers=1, log=silent)
    assert stored(out, "train")
    assert not list(out.parent.glob(".out.partial-*"))


def test_leftover_of_a_living_process_stays(words, corpus, tmp_path):
    import socket

    other = tmp_path / f".out.partial-1.{socket.gethostname()}"
    elsewhere = tmp_path / ".out.partial-999999999.another-host"
    gone = tmp_path / f".out.partial-999999999.{socket.gethostname()}"
    for path in (other, elsewhere, gone):
        path.mkdir()
    prepare_data(config(words, corpus), tmp_path / "out", workers=1, log=silent)
    assert other.exists()
    assert elsewhere.exists()
    assert not gone.exists()


@pytest.mark.slow
def test_two_processes_at_once(words, corpus, tmp_path):
    out = tmp_path / "out"
    both = [start(words, out, Path(corpus.path), 1, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert stored(out, "train")
    assert not list(tmp_path.glob(".out.partial-*"))


def test_loser_of_the_rename_uses_the_winners(words, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    data = config(words, corpus)
    winner = prepare_data(data, tmp_path / "winner", workers=1, log=silent)
    from dwt_jax.data import prepare as module

    build = module._build_dataset

    def slower(*arguments):
        index = build(*arguments)
        shutil.copytree(tmp_path / "winner", out)
        return index

    monkeypatch.setattr(module, "_build_dataset", slower)
    assert prepare_data(data, out, workers=1, log=silent) == winner
    assert content(out) == content(tmp_path / "winner")


def test_failure_leaves_nothing(words, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": ""}\n')
    with pytest.raises(UserError, match="line 2: no field 'text'"):
        prepare_data(
            config(words, Source(kind="jsonl", path=str(tmp_path / "a.jsonl"))), tmp_path / "out", workers=1
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_ready_directory_is_left_alone(words, corpus, tmp_path):
    data = config(words, corpus)
    first = prepare_data(data, tmp_path / "out", workers=1, log=silent)
    before = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    assert (
        prepare_data(dataclasses.replace(data, prefetch=9), tmp_path / "out", workers=1, log=silent) == first
    )
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == before
    with pytest.raises(
        UserError, match=r"other data.sequence_length and data.sentence_stride, expected a new dir"
    ):
        prepare_data(
            dataclasses.replace(data, sequence_length=16, sentence_stride=2), tmp_path / "out", log=silent
        )


def test_other_things_in_the_directory(words, corpus, tmp_path):
    with pytest.raises(UserError, match="something else than prepared rows"):
        prepare_data(config(words, corpus), tmp_path, workers=1, log=silent)
    (tmp_path / "empty").mkdir()
    prepare_data(config(words, corpus), tmp_path / "empty", workers=1, log=silent)
    assert stored(tmp_path / "empty", "train")


@pytest.mark.parametrize(("held_out", "split"), [(1e-9, "held_out"), (1 - 1e-9, "train")])
def test_empty_splits(words, corpus, tmp_path, held_out, split):
    with pytest.raises(UserError, match=rf"data.validation_fraction is .* split '{split}', expected a "):
        prepare_data(
            config(words, corpus, validation_fraction=held_out), tmp_path / "out", workers=1, log=silent
        )
    assert not (tmp_path / "out").exists()


# Finding prepared rows


def test_cache_is_used_and_renewed(words, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DWT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dwt_jax.data.prepare._cpu_count", lambda: 1)
    data = config(words, corpus)
    lines: list[str] = []
    path = get_prepared(data, log=lines.append)
    assert path.parent == tmp_path / "cache"
    assert path.name.startswith("data-")
    assert lines
    assert get_prepared(dataclasses.replace(data, prefetch=7), log=pytest.fail) == path
    assert get_prepared(dataclasses.replace(data, sentence_stride=2), log=silent) != path
    os.utime(corpus.path, ns=(1, 1))
    assert get_prepared(data, log=silent) != path


def test_data_path(words, corpus, tmp_path):
    data = config(words, corpus)
    out = tmp_path / "out"
    prepare_data(data, out, workers=1, log=silent)
    assert get_prepared(dataclasses.replace(data, path=str(out))) == out
    bare = dataclasses.replace(data, path=str(out), tokenizer=Tokenizer(), sources=(Source(),))
    assert get_prepared(bare) == out
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECE.special_tokens, "a"]))
    for change, says in [
        ({"sequence_length": 64}, "data.sequence_length is 64, expected 32"),
        ({"row_mode": "sentence"}, "data.row_mode is sentence, expected packed"),
        ({"tokenizer": Tokenizer(path=str(tmp_path / "vocab.txt"))}, "data.tokenizer.path is .*vocab.txt"),
        (
            {"path": str(tmp_path / "gone")},
            "does not exist, expected prepared rows; run dwt prepare --config",
        ),
        ({"path": str(tmp_path)}, "holds no index.json, expected prepared rows; run dwt prepare --config"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            get_prepared(dataclasses.replace(data, **{"path": str(out), **change}))
        assert "\n" not in str(error.value)
    (out / "index.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="format 0, expected 1"):
        get_prepared(dataclasses.replace(data, path=str(out)))


def test_data_path_as_a_url(words, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DWT_CACHE", str(tmp_path / "cache"))
    data = config(words, corpus)
    prepare_data(data, tmp_path / "out", workers=1, log=silent)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/bucket/rows", recursive=True)
    remote = dataclasses.replace(data, path="memory://bucket/rows")
    path = get_prepared(remote, log=silent)
    assert content(path) == content(tmp_path / "out")
    assert get_prepared(remote, log=pytest.fail) == path
    assert not [child for child in path.parent.iterdir() if "partial" in child.name]
    for url, says in (("memory://bucket/none", "FileNotFoundError"), ("nonesuch://x", "ValueError")):
        with pytest.raises(UserError, match=f"data.path is {url}: {says}"):
            get_prepared(dataclasses.replace(data, path=url))


# Memory


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
def test_memory_is_flat(words, texts, tmp_path):
    peak = {}
    block = "\n\n".join(texts)
    for megabytes in (15, 60):
        path = tmp_path / f"{megabytes}.txt"
        with open(path, "w") as file:
            for n in range(megabytes * 10**6 // len(block)):
                file.write(f"{n}\n\n{block}\n\n")
        command = [sys.executable, "-c", MEASURE, str(words), str(path), str(tmp_path / f"out{megabytes}")]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        peak[megabytes] = int(run.stdout.split()[-1])
    assert peak[60] - peak[15] < 100, f"peak MB by corpus MB: {peak}"
