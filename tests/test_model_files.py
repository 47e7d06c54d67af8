"""Model directories that are not trusted: links, pipes, sizes; and what is said of other directories."""

import json
import os
import shutil

import pytest

from dwt_jax.cli import main
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.hf.checkpoint import load_checkpoint
from dwt_jax.model_files import MAX_SETTINGS_BYTES, is_model_file
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from dwt_jax.runs.load import load_model
from helpers.torch_models import SMALL, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CARD = "---\nlicense: mit\n---\nA model.\n"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "README.md",
)


@pytest.fixture(scope="module")
def complete_model(tmp_path_factory):
    """A model directory with every file that is read."""
    path = tmp_path_factory.mktemp("complete") / "model"
    torch_model("BertForMaskedLM", SMALL).save_pretrained(path)
    vocab = [*WORDPIECE_TOKENS, *"abcdefghijklmnopqrstuvwxyz"]
    (path / "vocab.txt").write_text("\n".join(vocab))
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    (path / "vocab.txt").unlink(missing_ok=True)
    special = {"mask_token": "[MASK]"}
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    (path / "added_tokens.json").write_text("{}")
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture
def model(complete_model, tmp_path):
    return shutil.copytree(complete_model, tmp_path / "model")


def export(path, out, capsys):
    """(exit status, what was said) of an export."""
    capsys.readouterr()
    return main(["export", f"--model={path}", f"--out={out}"]), capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_link_that_leads_out_is_refused(name, model, tmp_path, capsys):
    (model / name).rename(tmp_path / "private")
    (model / name).symlink_to("../private")
    status, message = export(model, tmp_path / "out", capsys)
    assert status == 2
    assert message.count("\n") == 1
    assert f"{name}: a link to {tmp_path / 'private'}, expected a file inside of the directory" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FILES)
def test_fifo_is_refused(name, model, tmp_path, capsys):
    (model / name).unlink()
    os.mkfifo(model / name)
    status, message = export(model, tmp_path / "out", capsys)
    assert (status, message.count("\n")) == (2, 1)
    assert f"{name}: not a regular file" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in ("model.safetensors", "tokenizer.json")]
)
def test_file_of_gigabytes_is_refused(name, model, tmp_path, capsys):
    os.truncate(model / name, 2**33)  # sparse
    status, message = export(model, tmp_path / "out", capsys)
    assert (status, message.count("\n")) == (2, 1)
    assert f"{name}: {2**33} bytes, expected at most {MAX_SETTINGS_BYTES}" in message


def test_directory_that_is_a_link_and_links_within_are_read(model, tmp_path, capsys):
    (model / "files").mkdir()
    for name in FILES:
        (model / name).rename(model / "files" / name)
        (model / name).symlink_to(f"files/{name}")
    (tmp_path / "link").symlink_to(model)
    assert export(tmp_path / "link", tmp_path / "out", capsys)[0] == 0
    assert (tmp_path / "out" / "README.md").read_text() == CARD


def test_snapshot_of_hub_cache_is_read_and_links_out_of_the_cache_are_not(model, tmp_path, capsys):
    cache = tmp_path / "models--someone--bert"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, name in enumerate(FILES):
        (model / name).rename(cache / "blobs" / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert export(snapshot, tmp_path / "out", capsys)[0] == 0
    merged_files = {"special_tokens_map.json", "added_tokens.json"}  # into the written tokenizer.json
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(FILES) - merged_files
    (cache / "private").write_text("{}")
    (snapshot / "added_tokens.json").unlink()
    (snapshot / "added_tokens.json").symlink_to("../../private")
    assert export(snapshot, tmp_path / "again", capsys)[0] == 2


def test_model_folder_that_leads_out_is_refused(complete_model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(complete_model)
    with pytest.raises(UserError, match=r"model: a link to .*, expected a directory"):
        load_model(str(tmp_path / "run"))


def test_code_of_a_tokenizer_is_not_named_without_its_file(model, tmp_path, capsys):
    """transformers would ask for trust_remote_code, and then find no such file."""
    file = model / "tokenizer_config.json"
    own_code = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own_code}))
    (model / "own.py").write_text("raise SystemExit")
    assert export(model, tmp_path / "out", capsys)[0] == 0
    assert not (tmp_path / "out" / "own.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a b")["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["tf_model.h5"], "has tf_model.h5, weights of TensorFlow"),
        (["flax_model.msgpack"], "has flax_model.msgpack, weights of Flax"),
        (["bert_model.ckpt.index", "bert_config.json"], "has bert_model.ckpt.index, weights of TensorFlow"),
        (["model.fp16.safetensors"], r"a variant of the weights \(rename it to model.safetensors\)"),
        (["pytorch_model.fp16.bin"], r"a variant of the weights \(rename it to pytorch_model.bin\)"),
        (["model-00001-of-00002.safetensors"], "shards without model.safetensors.index.json"),
        (["adapter_model.safetensors"], "weights of an adapter alone"),
        (["onnx.d/x", "model.onnx"], "a graph of ONNX"),
        (["refs/main", "blobs/0", "snapshots/abc/config.json"], "the Hub's cache .* in .*/snapshots/abc"),
        (["models--a--b/refs/main"], "the Hub's cache of models.*models--a--b/snapshots/REVISION"),
        (["0_Transformer/model.safetensors"], "no weights except in its folder 0_Transformer"),
        ([], "neither weights nor a run's checkpoints"),
    ],
    ids=str,
)
def test_directory_of_another_kind_is_described(files, message, tmp_path):
    for file in ["config.json", *files]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"{message}.*expected a run directory or a model's") as error_info:
        load_model(str(tmp_path))
    assert len(str(error_info.value).splitlines()) == 1
    described = message if message.startswith("the Hub's cache") else "no tokenizer in it"
    with pytest.raises(UserError, match=f"{described}.*, expected a tokenizer"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints", r"the checkpoints of the run in .*/run, expected a run directory"),
        (
            "checkpoints/20",
            r"a checkpoint of the run in .*/run \(dwt export --model=.*/run --step=20 --out=DIR",
        ),
        ("other/20", "neither weights nor a run's checkpoints"),
    ],
)
def test_a_checkpoint_in_place_of_its_run_is_named(tmp_path, monkeypatch, name, message):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "run" / name))
    monkeypatch.chdir(tmp_path / "run" / name)
    with pytest.raises(UserError, match=message):
        load_model(".")


def test_config_under_its_old_name_is_named(model):
    (model / "config.json").rename(model / "bert_config.json")
    with pytest.raises(
        UserError, match=r"config\.json: no such file, expected bert_config\.json to be renamed"
    ):
        load_checkpoint(model)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2"])
def test_hub_name_is_told_from_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_vocabulary):
        with pytest.raises(UserError, match=f"no such .*: hf download {name} --local-dir DIR"):
            load(name)
    with pytest.raises(UserError, match=r"no such directory, expected"):
        load_model(f"./{name}")


def test_is_model_file_of_an_absent_file(tmp_path):
    assert not is_model_file(tmp_path / "config.json")
