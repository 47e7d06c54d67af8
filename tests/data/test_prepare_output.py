import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwt_jax.config import Source
from dwt_jax.data.prepare import prepare_data
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir, commit_dir
from helpers.paths import PYTHONPATH
from helpers.prepared_data import (
    data_config,
    file_hashes,
    read_split,
)

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


def start(tokenizer_dir: Path, out: Path, corpus: Path, workers: int, tmp_path: Path) -> subprocess.Popen:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(program), str(tokenizer_dir), str(out), str(corpus), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def endless(texts: list[str], tmp_path: Path) -> Path:
    """A source that takes longer than the test waits."""
    path = tmp_path / "endless.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 400))
    return path


def processes_of(group: int) -> list[str]:
    processes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group_ = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group_) == group and state != "Z":
            processes.append(stat.parent.name)
    return processes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_prepare_leaves_no_index(tokenizer_dir, texts, corpus, tmp_path):
    out = tmp_path / "sub" / "out"
    process = start(tokenizer_dir, out, endless(texts, tmp_path), 2, tmp_path)
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
    prepare_data(data_config(tokenizer_dir, corpus), out, workers=1)
    assert read_split(out, "train")
    assert not list(out.parent.glob(".out.partial-*"))


def test_only_leftovers_of_dead_processes_are_removed(tokenizer_dir, corpus, tmp_path):
    of_living_process = tmp_path / f".out.partial-1.{socket.gethostname()}"
    of_other_host = tmp_path / ".out.partial-999999999.another-host"
    of_dead_process = tmp_path / f".out.partial-999999999.{socket.gethostname()}"
    for path in (of_living_process, of_other_host, of_dead_process):
        path.mkdir()
    prepare_data(data_config(tokenizer_dir, corpus), tmp_path / "out", workers=1)
    assert of_living_process.exists()
    assert of_other_host.exists()
    assert not of_dead_process.exists()


@pytest.mark.slow
def test_two_processes_write_one_directory(tokenizer_dir, corpus, tmp_path):
    out = tmp_path / "out"
    both = [start(tokenizer_dir, out, Path(corpus.path), 1, tmp_path) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert read_split(out, "train")
    assert not list(tmp_path.glob(".out.partial-*"))


def test_directory_of_a_faster_process_is_used(tokenizer_dir, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    data = data_config(tokenizer_dir, corpus)
    winner = prepare_data(data, tmp_path / "winner", workers=1)
    from dwt_jax.data import prepare as module

    build = module._build_dataset

    def slower(*arguments):
        index = build(*arguments)
        shutil.copytree(tmp_path / "winner", out)
        return index

    monkeypatch.setattr(module, "_build_dataset", slower)
    assert prepare_data(data, out, workers=1) == winner
    assert file_hashes(out) == file_hashes(tmp_path / "winner")


def test_failure_leaves_no_files(tokenizer_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": ""}\n')
    with pytest.raises(UserError, match="line 2: no field 'text'"):
        prepare_data(
            data_config(tokenizer_dir, Source(kind="jsonl", path=str(tmp_path / "a.jsonl"))),
            tmp_path / "out",
            workers=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_prepared_directory_is_not_changed(tokenizer_dir, corpus, tmp_path):
    data = data_config(tokenizer_dir, corpus)
    first = prepare_data(data, tmp_path / "out", workers=1)
    before = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    assert prepare_data(dataclasses.replace(data, prefetch=9), tmp_path / "out", workers=1) == first
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == before
    with pytest.raises(
        UserError, match=r"other data.sequence_length and data.sentence_stride, expected a new dir"
    ):
        prepare_data(dataclasses.replace(data, sequence_length=16, sentence_stride=2), tmp_path / "out")


def test_directory_with_other_files_is_refused(tokenizer_dir, corpus, tmp_path):
    with pytest.raises(UserError, match="not empty and without prepared rows"):
        prepare_data(data_config(tokenizer_dir, corpus), tmp_path, workers=1)
    (tmp_path / "empty").mkdir()
    prepare_data(data_config(tokenizer_dir, corpus), tmp_path / "empty", workers=1)
    assert read_split(tmp_path / "empty", "train")


@pytest.mark.parametrize("is_known", [True, False], ids=["mount point", "rename fails"])
def test_directory_that_cannot_be_replaced_is_filled(tokenizer_dir, corpus, tmp_path, monkeypatch, is_known):
    """A volume, which has its file system's lost+found and what a killed process left."""
    data, out, rename = data_config(tokenizer_dir, corpus), tmp_path / "volume", os.rename
    prepare_data(data, tmp_path / "elsewhere", workers=1)
    (out / "lost+found").mkdir(parents=True)
    if is_known:
        (out / f".volume.partial-999999999.{socket.gethostname()}" / "train").mkdir(parents=True)

    def busy(source, target, **options):
        if Path(target) == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(out))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(os.path, "ismount", lambda path: is_known and Path(path) == out)
    prepare_data(data, out, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["elsewhere", "volume"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("held_out", "index.json", "lost+found", "tokenizer", "train")
    ]
    assert file_hashes(out) == file_hashes(tmp_path / "elsewhere")


def test_what_was_whole_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    for name in ("volume", "folder"):
        with atomic_dir(tmp_path / name) as partial:
            (partial / "config.json").write_text("mine")
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text("of another")
            assert not commit_dir(partial, tmp_path / name)
        assert file_hashes(tmp_path / name) == {"config.json": hashlib.md5(b"of another").hexdigest()}


def test_contents_are_moved_in_the_order_of_their_writing(tmp_path, monkeypatch):
    """The file that marks a directory as complete, whatever its name, is written last."""
    moved = []
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    monkeypatch.setattr(shutil, "move", lambda source, target: moved.append(Path(target).name))
    (tmp_path / "volume").mkdir()
    with atomic_dir(tmp_path / "volume") as partial:
        for age, name in enumerate(["index.json", "a.json", "z.txt"]):
            (partial / name).write_text("")
            os.utime(partial / name, ns=(0, 10**18 - age))
        (partial / "train").mkdir()
        assert commit_dir(partial, tmp_path / "volume")
    assert moved == ["train", "z.txt", "a.json", "index.json"]


def test_new_volume_is_empty(tokenizer_dir, corpus, tmp_path):
    """File systems put lost+found into it."""
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    prepare_data(data_config(tokenizer_dir, corpus), tmp_path / "out", workers=1)
    prepare_data(data_config(tokenizer_dir, corpus), tmp_path / "again", workers=1)
    (tmp_path / "out" / "lost+found").rmdir()
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "again")
    assert not list(tmp_path.glob(".*"))


def test_text_that_is_mostly_unknown_is_refused(tmp_path):
    """A vocabulary with capitals whose tokenizer lower-cases; and the share as it is printed."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "\n".join(f"CAT DOG {'bird' if i % 2 else 'CAT'} Document{i}" for i in range(40)) + "\n"
    )
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "CAT", "DOG", "bird"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    source = Source(kind="text", path=str(corpus), documents="lines")
    data = data_config(tmp_path / "vocab.txt", source, validation_fraction=0.3)
    lower_cased = dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, lowercase=True))
    with pytest.raises(
        UserError, match=r"data\.tokenizer: 87\.5% of the text's tokens are unknown, expected"
    ):
        prepare_data(lower_cased, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    cased = dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, lowercase=False))
    prepare_data(cased, tmp_path / "out", workers=1)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert sum(totals["unknown"] for totals in index["splits"].values()) == 40


@pytest.mark.parametrize(("held_out", "split"), [(1e-9, "held_out"), (1 - 1e-9, "train")])
def test_empty_splits_are_refused(tokenizer_dir, corpus, tmp_path, held_out, split):
    with pytest.raises(UserError, match=rf"data.validation_fraction is .* split '{split}', expected a "):
        prepare_data(
            data_config(tokenizer_dir, corpus, validation_fraction=held_out),
            tmp_path / "out",
            workers=1,
        )
    assert not (tmp_path / "out").exists()
