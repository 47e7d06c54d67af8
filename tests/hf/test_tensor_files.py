"""Weight files of other libraries: every tensor bit for bit, and no value trusted."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc

import hypothesis
import pytest

from dwt_jax.errors import UserError
from dwt_jax.hf.tensor_files import WEIGHT_FILES, open_weights
from helpers.foreign import assert_same, bits, damage, refused, survives, zoo
from helpers.paths import PYTHONPATH

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForMaskedLM(config)


def test_safetensors_of_every_dtype(tmp_path):
    tensors = zoo()
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = open_weights(tmp_path)
    assert_same(weights, tensors)
    assert weights.path == tmp_path / "model.safetensors"
    assert "absent" not in weights
    with pytest.raises(KeyError):
        weights["absent"]


@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_files_saved_by_transformers(tmp_path, bert, shard):
    bert.save_pretrained(tmp_path, max_shard_size=shard)
    is_single_file = shard == "10GB"
    assert (tmp_path / "model.safetensors").exists() == is_single_file
    weights = open_weights(tmp_path)
    assert weights.path == tmp_path / WEIGHT_FILES[0 if is_single_file else 1]
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    expected = {name: tensor for name, tensor in bert.state_dict().items() if name not in tied}
    assert_same(weights, expected)


def test_tensors_not_in_index_are_read_as_in_transformers(tmp_path, bert):
    """transformers reads complete shards, so it has weights that the index does not list."""
    bert.save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    unlisted = "bert.encoder.layer.1.output.dense.bias"
    del listed["weight_map"][unlisted]
    index.write_text(json.dumps(listed))
    torch_tensor = transformers.BertForMaskedLM.from_pretrained(tmp_path).state_dict()[unlisted]
    assert (
        open_weights(tmp_path)[unlisted].tobytes() == bits(torch_tensor) == bits(bert.state_dict()[unlisted])
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_shards_saved_by_torch(tmp_path, bert, zipped):
    state = bert.state_dict()
    files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in state.items() if files[name] == file}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=zipped)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(open_weights(tmp_path), state)


def test_first_of_several_files_is_used(tmp_path):
    """In the order of transformers."""
    index = {"weight_map": {"x": "x.safetensors"}}
    for number, name in reversed(list(enumerate(WEIGHT_FILES))):
        tensors = {"x": torch.full((1,), float(number))}
        if name == "model.safetensors":
            safetensors_torch.save_file(tensors, tmp_path / name)
        elif name == "pytorch_model.bin":
            torch.save(tensors, tmp_path / name)
        else:
            shard = f"{number}.{name.split('.')[1]}"
            save = safetensors_torch.save_file if shard.endswith("safetensors") else torch.save
            save(tensors, tmp_path / shard)
            index["weight_map"]["x"] = shard
            (tmp_path / name).write_text(json.dumps(index))
        weights = open_weights(tmp_path)
        assert weights["x"] == number
        assert weights.path.name == name


def test_no_weights_raises(tmp_path):
    refused(tmp_path, "no weights", *WEIGHT_FILES)
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    refused(tmp_path, "has flax_model.msgpack, weights of Flax", *WEIGHT_FILES)
    with pytest.raises(UserError, match="no weights"):
        open_weights(tmp_path / "absent")


def test_links_of_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors_torch.save_file({"x": torch.ones(2)}, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert_same(open_weights(snapshot), {"x": torch.ones(2)})
    (snapshot / "model.safetensors").rename(snapshot / "a.safetensors")
    (blobs / "5678").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/5678")
    assert_same(open_weights(snapshot), {"x": torch.ones(2)})
    (blobs / "1234").unlink()  # an interrupted download
    refused(snapshot, "a.safetensors", "a broken symbolic link")
    torch.save({"x": torch.zeros(2)}, snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    refused(snapshot, "model.safetensors", "a broken symbolic link")


def test_tensors_are_read_on_access(tmp_path):
    """A sparse file of 8 GiB."""
    count = 2**31
    header = {"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(header))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * count)
    tracemalloc.start()
    try:
        weights = open_weights(tmp_path)
        assert weights.shape("x") == (count,)
        assert weights["x"][-1] == 0
        with pytest.raises(ValueError, match="read-only"):
            weights["x"][0] = 1
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
        path.unlink()


def test_torch_is_not_imported(tmp_path):
    safetensors_torch.save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"x": torch.ones(2)}, tmp_path / "b.bin")
    torch.save({"x": torch.ones(2)}, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    program = f"""
import pathlib, sys
from dwt_jax.hf import tensor_files
path = pathlib.Path({str(tmp_path)!r})
for read, name in ((tensor_files._read_safetensors, "a.safetensors"), (tensor_files._read_pickle, "b.bin"),
                   (tensor_files._read_pickle, "c.bin")):
    assert tensor_files.Weights(path, read(path / name))["x"].tolist() == [1, 1]
assert not {{"torch", "jax", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH})


# Invalid files.


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library does, so that elements are aligned
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


INVALID_FILES = {
    "no header": b"",
    "half a length": b"\x10\0\0",
    "a length of 2**60": safetensors_file({}, length=2**60),
    "a length of 2**64 - 1": safetensors_file({}, length=2**64 - 1),
    "a length beyond the end": safetensors_file({"x": entry([1], 0, 4)}, bytes(4), 200),
    "no JSON": safetensors_file(b"{'x': 1}"),
    "no UTF-8": safetensors_file(b'{"\xff": 1}'),
    "no object": safetensors_file([1]),
    "deep JSON": safetensors_file(b'{"x":' + b"[" * 10**5),
    "cut short": safetensors_file({"x": entry([4], 0, 16)}, bytes(15)),
    "too long": safetensors_file({"x": entry([4], 0, 16)}, bytes(17)),
    "overlap": safetensors_file({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, bytes(12)),
    "gap": safetensors_file({"x": entry([2], 0, 8), "y": entry([2], 12, 20)}, bytes(20)),
    "backwards": safetensors_file({"x": entry([2], 8, 0)}, bytes(8)),
    "negative offset": safetensors_file({"x": entry([2], -8, 0)}, bytes(8)),
    "negative shape": safetensors_file({"x": entry([-1, -2], 0, 8)}, bytes(8)),
    "other size": safetensors_file({"x": entry([3], 0, 8)}, bytes(8)),
    "huge shape": safetensors_file({"x": entry([2**40, 2**40], 0, 8)}, bytes(8)),
    "empty but huge": safetensors_file({"x": entry([0, 2**62], 0, 0)}),
    "no number": safetensors_file({"x": entry(["2"], 0, 8)}, bytes(8)),
    "many axes": safetensors_file({"x": entry([1] * 65, 0, 4)}, bytes(4)),
    "twice": safetensors_file(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
}


@pytest.mark.parametrize("case", INVALID_FILES)
def test_invalid_safetensors_raise(tmp_path, case):
    (tmp_path / "model.safetensors").write_bytes(INVALID_FILES[case])
    tracemalloc.start()
    try:
        refused(tmp_path, "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 2), ("F8_E5M2", 2), ("C64", 16), ("F4", 1), ("F0", 1)]
)
def test_unsupported_dtypes_are_named(tmp_path, dtype, size):
    data = safetensors_file({"x": entry([2], 0, size, dtype)}, bytes(size))
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, dtype)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_git_lfs_pointer_raises(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    refused(tmp_path, name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_files_of_other_formats_raise(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, name)
    (tmp_path / name).write_bytes(b"<html>404</html>")
    refused(tmp_path, name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, name, "not a regular file")


INDEXES = {
    "no JSON": ("{", ()),
    "no UTF-8": (b"\xff", ("utf-8",)),
    "no object": ("[]", ("list",)),
    "deep JSON": ("[" * 10**5, ()),
    "no map": ({"metadata": {}}, ("weight_map",)),
    "a list for a map": ({"weight_map": ["a.safetensors"]}, ("weight_map",)),
    "no name": ({"weight_map": {"x": 3}}, ("'x'", "3")),
    "empty name": ({"weight_map": {"x": ""}}, ("'x'",)),
    "above": ({"weight_map": {"x": "../a.safetensors"}}, ("'../a.safetensors'",)),
    "dots": ({"weight_map": {"x": ".."}}, ("'..'",)),
    "absolute": ({"weight_map": {"x": "/etc/passwd"}}, ("'/etc/passwd'",)),
    "subfolder": ({"weight_map": {"x": "sub/a.safetensors"}}, ("'sub/a.safetensors'",)),
    "Windows": ({"weight_map": {"x": "..\\a.safetensors"}}, ("a.safetensors",)),
    "zero": ({"weight_map": {"x": "a\0.safetensors"}}, ("\\x00",)),
    "half a character": ({"weight_map": {"x": "\ud800.safetensors"}}, ("\\ud800",)),
    "long": ({"weight_map": {"x": "a" * 5000}}, ("aaaa",)),
    "shards missing": (
        {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}},
        ("'b.safetensors'", "'c.safetensors'"),
    ),
    "tensors missing": (
        {"weight_map": {"x": "a.safetensors", "y\n": "a.safetensors", "z": "a.safetensors"}},
        (r"'y\n' in 'a.safetensors'", "'z' in 'a.safetensors'"),
    ),
    "two of a name": ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', ("'x'", "twice")),
    "in two shards": (
        {"weight_map": {"x": "a.safetensors", "v": "other.safetensors"}},
        ("'x'", "other.safetensors"),
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_invalid_index_raises(tmp_path, case):
    content, parts = INDEXES[case]
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for path in (directory / "a", tmp_path / "a", directory / "sub" / "a"):
        safetensors_torch.save_file({"x": torch.ones(1)}, path.with_name("a.safetensors"))
    safetensors_torch.save_file({"x": torch.ones(1), "v": torch.ones(1)}, directory / "other.safetensors")
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    (directory / "model.safetensors.index.json").write_bytes(content)
    refused(directory, "model.safetensors.index.json", *parts)


def test_damaged_shard_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(INVALID_FILES["cut short"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    refused(tmp_path, f"{tmp_path / 'a.safetensors'}: ")


SMALL = safetensors_torch.save(
    {"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(())}, {"format": "pt"}
)
SMALL_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "s", "b": "s", "c": "s"}}).encode()


@hypothesis.settings(max_examples=400)
@hypothesis.given(damage(SMALL))
def test_damaged_safetensors_are_refused_or_read(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "model.safetensors").write_bytes(data)
    survives(directory)


@hypothesis.settings(max_examples=200)
@hypothesis.given(damage(SMALL_INDEX))
def test_damaged_index_is_refused_or_read(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "s").write_bytes(SMALL)
    (directory / "model.safetensors.index.json").write_bytes(data)
    survives(directory)
