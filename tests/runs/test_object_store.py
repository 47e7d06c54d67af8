"""Checkpoints on an object store (gs://), against an emulator of Google Cloud Storage on this machine."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dwt_jax.config import Config, Train
from dwt_jax.errors import UserError
from dwt_jax.runs import run_dir
from helpers.runs import dwt, ended, free_port, prepared_project, start_several

SERVER = """
import sys
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

plain = objects.download

def download(request, response, storage, *args, **kwargs):
    # With the header that the service sends with an object, and that TensorStore wants.
    plain(request, response, storage, *args, **kwargs)
    where = request.params["bucket_name"], request.params["object_id"]
    if response.status in (200, 206):
        response["X-Goog-Generation"] = storage.get_file_obj(*where)["generation"]

objects.download = download
server = create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def store():
    """Variables with which gs:// is a bucket of this machine."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout.readline() == "ready\n"
    address = f"http://localhost:{port}"
    # The first is gcsfs's (listing, renaming, small files), the second TensorStore's (arrays).
    yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return f"--config={prepared_project(tmp_path_factory.mktemp('store'))}"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The weights of a run that was never stopped and keeps its checkpoints on a disk."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert dwt("train", config, f"--workdir={directory}").returncode == 0
    return (directory / "model" / "model.safetensors").read_bytes()


def listing(store, path):
    code = f"import fsspec, json; print(json.dumps(fsspec.filesystem('gs').ls('{path}', detail=False)))"
    env = {**os.environ, **store}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return {name.rstrip("/").rsplit("/", 1)[-1] for name in json.loads(found.stdout)}


@pytest.mark.slow
def test_a_run_goes_on_from_there_in_a_new_work_directory(store, config, whole, tmp_path):
    """Stopped, its work directory lost, resumed by the same command: bitwise what it would have been."""
    at = "--config.train.checkpoint_path=gs://bucket/lost"
    stopped = start_several(
        ["-m", "dwt_jax", "train", config, at, f"--workdir={tmp_path / 'first'}"], 1, **store
    )
    for line in stopped[0].stdout:
        if "step 6" in line:
            stopped[0].send_signal(signal.SIGTERM)
            break
    [(status, said)] = ended(stopped)
    assert status == 75, said
    assert not (tmp_path / "first" / "checkpoints").exists()
    assert listing(store, "bucket/lost") > {"run.json"}
    other = dwt("train", config, at, f"--workdir={tmp_path / 'x'}", "--config.seed=1", variables=store)
    assert other.returncode == 2
    assert "gs://bucket/lost: holds a run of another config" in other.stderr
    assert "seed is 0 there, 1 here" in other.stderr
    assert not (tmp_path / "x").exists()
    gone_on = dwt("train", config, at, f"--workdir={tmp_path / 'second'}", variables=store)
    assert gone_on.returncode == 0, gone_on.stderr
    assert "resumed at step" in gone_on.stderr
    assert (tmp_path / "second" / "model" / "model.safetensors").read_bytes() == whole
    kept = listing(store, "bucket/lost")  # three: at the end, at step 8 and where it was stopped
    assert kept > {"run.json", "8", "12"}
    assert len(kept) == 4


@pytest.mark.slow
def test_a_damaged_one_is_passed_over_and_kept_ones_are_exported(store, config, whole, tmp_path):
    at = "--config.train.checkpoint_path=gs://bucket/damaged"
    run = tmp_path / "run"
    assert dwt("train", config, at, f"--workdir={run}", variables=store).returncode == 0
    export = dwt("export", f"--model={run}", "--step=8", f"--out={tmp_path / 'out'}", variables=store)
    assert export.returncode == 0, export.stderr
    damage = (
        "import fsspec; fs = fsspec.filesystem('gs')\n"
        "for path in fs.find('bucket/damaged/12'):\n"
        "    if fs.size(path) > 5000: fs.pipe(path, fs.cat(path)[:-100])"
    )
    subprocess.run([sys.executable, "-c", damage], env={**os.environ, **store}, check=True)
    for name in ("summary.json", "model"):
        (run / name).rename(tmp_path / name)
    again = dwt("train", config, at, f"--workdir={run}", variables=store)
    assert again.returncode == 0, again.stderr
    assert "checkpoint 12 is damaged" in again.stderr
    assert (run / "model" / "model.safetensors").read_bytes() == whole
    assert listing(store, "bucket/damaged-damaged") == {"12"}


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_there(store, config, tmp_path):
    at = "--config.train.checkpoint_path=gs://bucket/two"
    command = ["-m", "dwt_jax", "train", config, at, f"--workdir={tmp_path / 'two'}"]
    for status, said in ended(start_several(command, 2, **store)):
        assert status == 0, said
    (tmp_path / "two" / "model").rename(tmp_path / "model")
    export = dwt(
        "export", f"--model={tmp_path / 'two'}", "--step=12", f"--out={tmp_path / 'out'}", variables=store
    )
    assert export.returncode == 0, export.stderr
    from safetensors.numpy import load_file

    found, expected = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "model"))
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_addresses_of_no_use_are_one_line(tmp_path, monkeypatch):
    config = Config(train=Train(steps=1, checkpoint_path="gs://bucket/x"))

    def fail(error):
        def raising(*_):
            raise error

        return raising

    from etils import epath

    for error, words in (
        (ImportError("No module named 'gcsfs'"), r"expected the package gcsfs installed \(No module"),
        (OSError("403\nForbidden"), r"gs://bucket/x cannot be used: 403 Forbidden"),
    ):
        kind = type(epath.Path("gs://bucket/x"))
        monkeypatch.setattr(kind, "exists", fail(error))
        with pytest.raises(UserError, match=words) as caught:
            run_dir.init_checkpoint_dir(tmp_path, config, {})
        assert "\n" not in str(caught.value)


def test_a_refused_run_claims_nothing(config, tmp_path):
    """Neither its work directory nor the other place, whichever of the two is another's."""
    base = ("train", config, "--config.train.steps=2")
    assert dwt(*base, f"--workdir={tmp_path / 'a'}").returncode == 0
    place = f"--config.train.checkpoint_path={tmp_path / 'place'}"
    found = dwt(*base, place, f"--workdir={tmp_path / 'a'}")
    assert found.returncode == 2
    assert "holds a run of another config" in found.stderr
    assert not (tmp_path / "place").exists()
    relative = dwt(*base, "--config.train.checkpoint_path=place", f"--workdir={tmp_path / 'b'}")
    assert relative.returncode == 2
    assert "expected an absolute path" in relative.stderr
    assert not (tmp_path / "b").exists()
    assert dwt(*base, place, f"--workdir={tmp_path / 'c'}").returncode == 0
    (tmp_path / "place" / "run.json").unlink()
    lost = dwt(*base, place, f"--workdir={tmp_path / 'c'}")
    assert lost.returncode == 2
    assert "has no files of the run in" in lost.stderr


def test_a_grown_run_wants_a_place_without_checkpoints(config, tmp_path):
    base = (config, "--config.train.steps=4", "--config.train.save_every=2")
    assert dwt("train", *base, f"--workdir={tmp_path / 'a'}").returncode == 0
    grow = ("remap-run", *base, f"--run={tmp_path / 'a'}", "--step=2", "--method=stack")
    place = f"--config.train.checkpoint_path={tmp_path / 'place'}"
    deeper = "--config.model.num_hidden_layers=3"
    first = dwt(*grow, place, deeper, "--carry", f"--out={tmp_path / 'grown'}")
    assert first.returncode == 0, first.stderr
    again = dwt(*grow, place, deeper, f"--out={tmp_path / 'again'}")
    assert again.returncode == 2
    assert "place holds [2], expected no checkpoints" in again.stderr
    assert not (tmp_path / "again").exists()


def test_a_directory_elsewhere(tmp_path):
    """Made and claimed; one with anything else in it is refused; `~` is a place too."""
    config = Config(train=Train(steps=1, checkpoint_path=str(tmp_path / "there")))
    run_dir.init_checkpoint_dir(tmp_path / "run", config, {"data_digest": "a"})
    run_dir.init_checkpoint_dir(tmp_path / "another", config, {"data_digest": "a"})
    for _ in range(2):  # though nothing was saved yet: that run may be running
        with pytest.raises(UserError, match=r"run\.data_digest is 'a' there, 'b' here"):
            run_dir.init_checkpoint_dir(tmp_path / "run", config, {"data_digest": "b"})
        (tmp_path / "there" / "4").mkdir(exist_ok=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "there" / "run.json").unlink()
    with pytest.raises(UserError, match=r"there: has no files of the run in .*run, expected"):
        run_dir.init_checkpoint_dir(tmp_path / "run", config, {"data_digest": "b"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    config = Config(train=Train(steps=1, checkpoint_path=str(tmp_path / "full")))
    with pytest.raises(UserError, match="full: holds files but no run"):
        run_dir.init_checkpoint_dir(tmp_path / "new", config, {})
    home = Config(train=Train(steps=1, checkpoint_path="~/x"))
    assert run_dir.checkpoint_dir(tmp_path, home) == type(tmp_path).home() / "x"
    assert run_dir.checkpoint_dir(tmp_path, Config()) == tmp_path / "checkpoints"
