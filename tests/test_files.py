"""What is renamed into place is on the disk before, and so is the rename after it."""

import errno
import os
from pathlib import Path

import pytest

from dwt_jax import files
from dwt_jax.config import Train
from dwt_jax.errors import UserError
from dwt_jax.runs.metric_writer import MetricWriter


@pytest.fixture
def events(monkeypatch, tmp_path):
    """The calls of fsync and rename, in their order, with the paths below tmp_path."""
    recorded = []

    def fsync(descriptor):
        recorded.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))

    def rename(self, target):
        recorded.append(("rename", os.path.relpath(target, tmp_path)))
        os.rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr(Path, "rename", rename)
    return recorded


def test_a_file_is_synced_before_its_rename_and_the_directory_after(tmp_path, events):
    files.write_json(tmp_path / "a.json", {"x": 1})
    partial = f".a.json.partial-{os.getpid()}"
    assert events == [("fsync", partial), ("rename", "a.json"), ("fsync", ".")]


def test_a_directory_is_synced_with_all_that_is_in_it(tmp_path, events):
    with files.atomic_dir(tmp_path / "out") as partial:
        (partial / "model").mkdir()
        (partial / "model" / "weights").write_bytes(b"1")
        (partial / "link").symlink_to("nowhere")
        assert files.commit_dir(partial, tmp_path / "out")
    *synced, renamed, last = events
    name = partial.name
    assert [path for _, path in synced] == [f"{name}/model/weights", f"{name}/model", name]
    assert (renamed, last) == (("rename", "out"), ("fsync", "."))


def fail(number):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOSPC, True)])
def test_a_file_system_without_fsync_is_no_error_and_a_full_one_is(tmp_path, monkeypatch, number, is_raised):
    monkeypatch.setattr(os, "fsync", fail(number))
    if is_raised:
        with pytest.raises(OSError, match="No space left"):
            files.write_json(tmp_path / "a.json", {})
        assert not [*tmp_path.iterdir()]
    else:
        files.write_json(tmp_path / "a.json", {})
        assert files.read_json(tmp_path / "a.json") == {}


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.sync(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_tensorboard_on_a_file_system_without_fsync(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    writer = MetricWriter(tmp_path, Train(steps=2, tensorboard=True), 0, "run")
    writer.log_evaluation({"step": 1, "held_out_loss": 2.5, "standard_error": 0.5})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"held_out_loss" in events.read_bytes()


@pytest.mark.parametrize(("bits", "end"), [(None, ""), (1.25, ", 1.2500 bits per byte")])
def test_evaluation_line(tmp_path, capsys, bits, end):
    record = {"step": 1, "held_out_loss": 2.5, "standard_error": 0.5}
    writer = MetricWriter(tmp_path, Train(steps=2, tensorboard=False), 0, "run")
    writer.log_evaluation(record if bits is None else {**record, "bits_per_byte": bits})
    writer.close()
    assert capsys.readouterr().err == f"run: step 1: held-out loss 2.5000 ± 0.5000{end}\n"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\0\0\0", b"\xff\xfe{", b"[1]"])
def test_a_damaged_file_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert files.read_intact_json(tmp_path / "a.json") is None
    assert files.read_intact_json(tmp_path / "nowhere.json") is None


SYSTEM_NAMES = [
    *("lost+found", ".DS_Store", "._a.txt", ".Trash-1000", ".Trashes", ".nfs000001", "__MACOSX", "@eaDir"),
    *("System Volume Information", "$RECYCLE.BIN", "desktop.ini", "Desktop.ini", "Thumbs.db"),
]


@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_what_file_managers_write_is_no_content(tmp_path, name):
    """The directory counts as empty, is filled, and keeps it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("")
    assert files.is_empty_dir(out)
    assert files.resolve_output_dir(out) == out.resolve()
    with files.atomic_dir(out) as partial:
        (partial / "rows").write_text("")
        assert files.commit_dir(partial, out)
    assert {path.name for path in out.iterdir()} == {name, "rows"}
    assert not files.is_empty_dir(out)


@pytest.mark.parametrize("name", ["lost", "DS_Store", "trash-1", "desktop.txt", "volume information"])
def test_other_files_are_content(tmp_path, name):
    (tmp_path / name).write_text("")
    assert not files.is_empty_dir(tmp_path)


def test_an_output_file_is_never_a_device_or_a_pipe(tmp_path):
    """Renaming onto /dev/null would replace it for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(UserError, match="is no regular file, expected a file in a directory"):
            files.resolve_output_file(path)
    reader, writer = os.pipe()
    with open(reader), open(writer, "w"), pytest.raises(UserError, match="is no regular file"):
        files.resolve_output_file(Path(f"/dev/fd/{writer}"))


def test_an_output_file_that_is_a_link_is_written_where_it_leads(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/new.tsv")
    assert files.resolve_output_file(tmp_path / "link") == tmp_path.resolve() / "there" / "new.tsv"
    (tmp_path / "lost").symlink_to("nowhere/new.tsv")
    with pytest.raises(UserError, match="nowhere, which is no directory"):
        files.resolve_output_file(tmp_path / "lost")
