"""Handmade and damaged pytorch_model.bin: refused in one line, whatever they contain."""

import collections
import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dwt_jax.hf import torch_pickle, unpickler
from dwt_jax.hf.tensor_files import open_weights
from helpers.foreign import assert_same, damage, refused, survives
from helpers.paths import PYTHONPATH

torch = pytest.importorskip("torch")

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SYSTEM = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
DATA = np.arange(6, dtype=np.float32).tobytes()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    """An integer of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def global_name(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(kind="Float", key="0", size=6, suffix=b""):
    kind = global_name("torch", f"{kind}Storage")
    return tuple_of(text("storage"), kind, text(key), text("cpu"), integer(size), suffix) + b"Q"


def tensor(
    storage_bytes=None, offset=0, shape=(2, 3), strides=(3, 1), function="_rebuild_tensor_v2", rest=b"\x89N"
):
    numbers = integer(offset), tuple_of(*map(integer, shape)), tuple_of(*map(integer, strides))
    return global_name("torch._utils", function) + tuple_of(storage_bytes or storage(), *numbers, rest) + b"R"


def state(x=None, more=b""):
    return b"\x80\x02}(" + text("x") + (x or tensor()) + more + b"u."


def zip_file(main, members=None, order=b"little", compressed=None):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in {
            **{"data.pkl": main, "byteorder": order, "version": b"3\n", "data/0": DATA},
            **(members or {}),
        }.items():
            if data is not None:
                kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
                archive.writestr(f"archive/{name}", data, kind)
    return out.getvalue()


def legacy_file(main, keys=("0",), storages=None, system=SYSTEM):
    if storages is None:
        storages = struct.pack("<q", 6) + DATA
    return MAGIC + system + main + pickle.dumps(list(keys), 2) + storages


LEGACY_STORAGE = storage(suffix=b"N")


def test_handmade_files_equal_torch(tmp_path):
    """The strides of an axis without a second element are ignored."""
    path = tmp_path / "pytorch_model.bin"
    views = {"x": ((2, 3), (3, 1)), "one": ((1, 6), (2**62, 1)), "none": ((0, 3), (2**62, 2**62))}
    for make, suffix in ((zip_file, b""), (legacy_file, b"N")):
        tensors = [text(name) + tensor(storage(suffix=suffix), 0, *view) for name, view in views.items()]
        path.write_bytes(make(b"\x80\x02}(" + b"".join(tensors) + b"u."))
        torch_tensors = torch.load(path)
        assert torch_tensors["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert_same(open_weights(tmp_path), torch_tensors)
        path.unlink()


def patch_record(file, at, form, value, signature=b"PK\1\2"):
    """The zip with one value of the last record of a kind changed, by default the entry of data/0 in
    the directory. Offsets: 8 flags, 10 method, 20 stored size, 24 size, 42 header offset."""
    file = bytearray(file)
    struct.pack_into(form, file, file.rfind(signature) + at, value)
    return bytes(file)


def shift_members(file):
    """The zip whose members start before the file: their offsets are correct if counted from its end."""
    end = file.rfind(b"PK\5\6")
    (at,) = struct.unpack_from("<I", file, end + 16)
    return patch_record(file, 16, "<I", at + len(file), signature=b"PK\5\6")


OBJECT = global_name("collections", "OrderedDict") + b")R"
DEEP = b"N" + b"\x85" * 200_000  # a tuple in a tuple in …

HOSTILE = {
    # what to allocate
    "long of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "string of 4 GiB": b"\x80\x02X\xff\xff\xff\xff.",
    "string of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "bytearray of 2**62": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".",
    "memo of 2**32": b"\x80\x02]r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff.",
    "frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"].",
    "decimals": b"I" + b"9" * 10**6 + b"\n.",
    "many dicts": b"\x80\x02" + b"}" * 7_000_000 + b".",
    "much memo": b"\x80\x04N" + b"\x94" * 7_000_000 + b".",
    "many marks": b"\x80\x02" + b"(" * 7_000_000 + b".",
    # what to nest
    "deep value": state(DEEP),
    "deep key": b"\x80\x02}" + DEEP + b"Ns.",
    "deep alone": b"\x80\x02" + DEEP + b".",
    "deep shape": state(
        global_name("torch._utils", "_rebuild_tensor_v2") + tuple_of(storage(), b"K\0", DEEP, DEEP) + b"R"
    ),
    "deep name": b"\x80\x04" + DEEP + text("x") + b"\x93.",
    "deep storage": b"\x80\x02" + DEEP + b"Q.",
    "deep attribute": b"\x80\x02" + OBJECT + DEEP + b"b0.",
    "itself": b"\x80\x02}q\0" + text("x") + b"h\0s.",
    "itself in a list": b"\x80\x02]q\0h\0a.",
    # instructions that torch does not write
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "INST": b"(" + text("touch trace") + b"iposix\nsystem\n.",
    "OBJ": b"(" + global_name("posix", "system") + text("touch trace") + b"o.",
    "NEWOBJ": b"\x80\x02" + global_name("collections", "OrderedDict") + b")\x81.",
    "NEWOBJ_EX": b"\x80\x04" + global_name("collections", "OrderedDict") + b")}\x92.",
    "PERSID": b"Ptouch trace\n.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "EMPTY_SET": b"\x80\x04\x8f.",
    "global without a name": b"\x80\x04NN\x93.",
    "global of a list": b"\x80\x04]]\x93.",
    "attribute of an attribute": b"\x80\x04" + text("collections") + text("OrderedDict.__init__") + b"\x93.",
    # what to call, and to change
    "call of a string": b"\x80\x02" + text("x") + b")R.",
    "call of a type": b"\x80\x02" + global_name("torch", "FloatStorage") + b")R.",
    "call of a tensor": b"\x80\x02" + tensor() + b")R.",
    "call without a tuple": b"\x80\x02" + global_name("collections", "OrderedDict") + b"NR.",
    "arguments that are none": b"\x80\x02" + global_name("torch._utils", "_rebuild_tensor_v2") + b")R.",
    "OrderedDict of a tensor": b"\x80\x02" + global_name("collections", "OrderedDict") + tensor() + b"\x85R.",
    "OrderedDict of odd pairs": b"\x80\x02"
    + global_name("collections", "OrderedDict")
    + b"]]Na"
    + b"a\x85R.",
    "attributes of a function": b"\x80\x02" + global_name("torch._utils", "_rebuild_tensor_v2") + b"}b.",
    "attributes of a type": b"\x80\x02" + global_name("torch", "FloatStorage") + b"}b.",
    "items of a function": b"\x80\x02"
    + global_name("torch._utils", "_rebuild_tensor_v2")
    + text("x")
    + b"Ns.",
    "items of a list": b"\x80\x02]" + text("x") + b"Ns.",
    "append to a dict": b"\x80\x02}Na.",
    "odd items": b"\x80\x02}(" + text("x") + b"u.",
    # what is not there
    "empty": b"",
    "only the end": b"\x80\x02.",
    "no end": b"\x80\x02}",
    "no mark": b"\x80\x02t.",
    "call of nothing": b"\x80\x02)R.",
    "items of nothing": b"\x80\x02s.",
    "tuple of nothing": b"\x80\x02N\x87.",
    "memo of nothing": b"\x80\x02h\x07.",
    "put of nothing": b"\x80\x02q\x07.",
    "unknown": b"\x80\x02\xff.",
    # tensors that are not within their storage
    "offset beyond": state(tensor(offset=1)),
    "far offset": state(tensor(offset=2**70)),
    "offset before": state(tensor(offset=-1)),
    "stride beyond": state(tensor(strides=(4, 1))),
    "far stride": state(tensor(strides=(2**62, 1))),
    "stride before": state(tensor(offset=5, strides=(-3, 1))),
    "shape beyond": state(tensor(shape=(3, 3))),
    "negative shape": state(tensor(shape=(-2, -3))),
    "huge shape": state(tensor(shape=(2**40, 2**40))),
    "overflowing shape": state(tensor(shape=(2**32, 2**32), strides=(0, 0))),
    "repeated to 8 GiB": state(tensor(shape=(2**31,), strides=(0,))),
    "huge and empty": state(tensor(shape=(0, 2**62), strides=(1, 1))),
    "fewer strides": state(tensor(strides=(1,))),
    "many axes": state(tensor(shape=(1,) * 65, strides=(0,) * 65)),
    "a shape of strings": state(tensor(rest=b"").replace(integer(3), text("3"))),
    "negated": state(tensor(rest=b"\x89N}" + text("neg") + b"\x88s")),
    "no tensor in a parameter": state(
        global_name("torch._utils", "_rebuild_parameter") + tuple_of(b"N", b"\x88", b"N") + b"R"
    ),
    "untyped without a type": state(tensor(function="_rebuild_tensor_v3")),
    # storages that are not there
    "larger than stored": state(tensor(storage(size=7))),
    "of 2**62 elements": state(tensor(storage(size=2**62), shape=(2**62,), strides=(1,))),
    "of -1 elements": state(tensor(storage(size=-1), shape=(0,), strides=(1,))),
    "of another name": state(tensor(storage(key="1"))),
    "of a name that leads out": state(tensor(storage(key="../../data/0"))),
    "of two types": state(more=text("y") + tensor(storage("Int"))),
    "of an unknown type": state(tensor(storage("Evil"))),
    "no tuple": b"\x80\x02" + text("0") + b"Q.",
    "a module": b"\x80\x02" + tuple_of(text("module"), b"N", b"N", b"N") + b"Q.",
}

HANDMADE_FILES = {
    **{f"{name}, zip": zip_file(main) for name, main in HOSTILE.items()},
    **{
        f"{name}, old": legacy_file(main.replace(storage()[:-2], LEGACY_STORAGE[:-2]))
        for name, main in HOSTILE.items()
        if len(main) < 10**6
    },
    "compressed": zip_file(state(), compressed="data.pkl"),
    "a bomb": zip_file(state(), {"data/0": bytes(2**24)}, compressed="data/0"),
    "two of a name": zip_file(state(), {"data/1": DATA}).replace(b"data/1", b"data/0"),
    "compressed to the same size": patch_record(zip_file(state()), 10, "<H", zipfile.ZIP_DEFLATED),
    "stored at another size": patch_record(zip_file(state()), 20, "<I", 23),
    "encrypted": patch_record(zip_file(state()), 8, "<H", 1),
    "beyond the end": patch_record(zip_file(state()), 20, "<Q", 2**31 * (2**32 + 1)),
    "before the start": shift_members(zip_file(state())),
    "header beyond the end": patch_record(zip_file(state()), 42, "<I", 2**31),
    "header that is none": patch_record(zip_file(state()), 0, "<I", 0, signature=b"PK\3\4"),
    "big-endian": zip_file(state(), order=b"big"),
    "no order": zip_file(state(), order=b"none"),
    "no pickle": zip_file(None),
    "two pickles": zip_file(state(), {"more/data.pkl": state()}),
    "long pickle": zip_file(state(more=text("y" * torch_pickle.MAX_PICKLE_BYTES) + tensor())),
    "no storage": zip_file(state(), {"data/0": None}),
    "short storage": zip_file(state(), {"data/0": DATA[:-1]}),
    "half a zip": zip_file(state())[:200],
    "no directory": zip_file(state())[:-30],
    "only PK": b"PK\3\4",
    "old, other magic": pickle.dumps(3, 2) + pickle.dumps(1001, 2),
    "old, other version": legacy_file(state(tensor(LEGACY_STORAGE))).replace(b"M\xe9\x03", b"M\xea\x03", 1),
    "old, big-endian": legacy_file(state(), system=pickle.dumps({"little_endian": False}, 2)),
    "old, no system": legacy_file(state(), system=pickle.dumps(3, 2)),
    "old, a key too few": legacy_file(state(tensor(LEGACY_STORAGE)), keys=()),
    "old, a key too many": legacy_file(state(tensor(LEGACY_STORAGE)), keys=("0", "1")),
    "old, a key twice": legacy_file(state(tensor(LEGACY_STORAGE)), keys=("0", "0")),
    "old, keys that are none": legacy_file(state(tensor(LEGACY_STORAGE)), keys=(0, DATA)),
    "old, cut short": legacy_file(state(tensor(LEGACY_STORAGE)))[:-1],
    "old, no storage": legacy_file(state(tensor(LEGACY_STORAGE)), storages=b""),
    "old, other length": legacy_file(state(tensor(LEGACY_STORAGE)), storages=struct.pack("<q", 5) + DATA),
    "old, negative length": legacy_file(state(tensor(LEGACY_STORAGE)), storages=struct.pack("<q", -6) + DATA),
    "old, a view of a storage": legacy_file(
        state(tensor(storage(suffix=tuple_of(text("1"), integer(0), integer(6)))))
    ),
    "web page": b"<!doctype html>",
    "tar": b"pickle".ljust(512, b"\0"),
}

# One process reads all files: a crash or a large allocation ends it.
READ_ALL = """
import pathlib, resource, sys
from dwt_jax.hf import tensor_files
from dwt_jax.errors import UserError
mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, mapped + 2**29))
for directory in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        tensors = tensor_files.open_weights(directory)
        print(directory.name, "|", sorted(tensors))
    except UserError as error:
        print(directory.name, "|", "refused", str(error).replace(str(directory), ""))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much is mapped is read from /proc")
def test_hostile_files_are_refused(tmp_path):
    for number, file in enumerate(HANDMADE_FILES.values()):
        directory = tmp_path / f"{number:03}"
        directory.mkdir()
        (directory / "pytorch_model.bin").write_bytes(file)
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # the directory of a trace file
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, (
        f"{list(HANDMADE_FILES)[len(lines)]}: {result.returncode} {result.stderr[-500:]}"
    )
    message_of = dict(zip(HANDMADE_FILES, (line.split(" | ", 1)[1] for line in lines), strict=True))
    for name, line in message_of.items():
        assert line.startswith("refused /pytorch_model.bin: "), f"{name}: {line}"
        assert ", expected " in line, name
    for name, part in {
        "EXT1, zip": "EXT1",
        "INST, old": "'posix system'",
        "OBJ, zip": "posix.system",
        "many dicts, zip": "instructions",
        "deep key, old": "tuple as a key",
        "of an unknown type, zip": "torch.EvilStorage",
        "compressed": "'archive/data.pkl' compressed",
        "a bomb": "'archive/data/0' compressed",
        "two of a name": "two members",
        "compressed to the same size": "'archive/data/0' compressed",
        "stored at another size": "'archive/data/0' compressed",
        "encrypted": "'archive/data/0' encrypted",
        "beyond the end": "ends within 'archive/data/0'",
        "before the start": "no 'archive/byteorder' where",
        "header beyond the end": "no 'archive/data/0' where",
        "header that is none": "no 'archive/data/0' where",
        "big-endian": "big-endian",
        "old, big-endian": "big-endian",
        "old, a key too few": "other storages",
        "old, a key twice": "other storages",
        "long pickle": "at most 8388608",
        "repeated to 8 GiB, zip": "8589934592 bytes",
    }.items():
        assert part in message_of[name], f"{name}: {message_of[name]}"
    assert not list(tmp_path.rglob("trace"))


def test_files_cannot_change_allowed_functions():
    """A pickle cannot modify the functions that it may name."""
    before = {name: dict(vars(value)) for name, value in unpickler._GLOBALS.items() if callable(value)}
    for main in HOSTILE.values():
        if len(main) < 10_000:
            with contextlib.suppress(unpickler.UnsupportedFile, ValueError, LookupError):
                torch_pickle._check_state_dict(unpickler.parse_pickle(io.BytesIO(main), {}))
    assert before == {
        name: dict(vars(value)) for name, value in unpickler._GLOBALS.items() if callable(value)
    }


def torch_bytes(state, zipped):
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


SMALL_STATE = collections.OrderedDict(
    a=torch.ones(2, 3).T, b=torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), c=torch.ones(4)[1:3]
)
SMALL_ZIP, SMALL_LEGACY = torch_bytes(SMALL_STATE, True), torch_bytes(SMALL_STATE, False)
PICKLE_AT = SMALL_ZIP.index(b"\x80\x02")
DIRECTORY_AT = SMALL_ZIP.index(b"PK\1\2")
PICKLE_END = SMALL_ZIP.index(b"u.", PICKLE_AT) + 2


@st.composite
def damaged_zip(draw):
    """Most of a zip is padding: damage the pickle without moving it, the directory, or any byte."""
    region = draw(st.sampled_from(["pickle", "directory", "anywhere"]))
    if region == "anywhere":
        return draw(damage(SMALL_ZIP))
    if region == "directory":
        return SMALL_ZIP[:DIRECTORY_AT] + draw(damage(SMALL_ZIP[DIRECTORY_AT:]))
    main = draw(damage(SMALL_ZIP[PICKLE_AT:PICKLE_END]))
    size = PICKLE_END - PICKLE_AT
    return SMALL_ZIP[:PICKLE_AT] + main[:size].ljust(size, b".") + SMALL_ZIP[PICKLE_END:]


@hypothesis.settings(max_examples=800)
@hypothesis.given(damaged_zip())
def test_damaged_zip_is_refused_or_read(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "pytorch_model.bin").write_bytes(data)
    survives(directory)


@hypothesis.settings(max_examples=800)
@hypothesis.given(damage(SMALL_LEGACY))
def test_damaged_legacy_file_is_refused_or_read(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "pytorch_model.bin").write_bytes(data)
    survives(directory)


def test_tensors_are_read_on_access(tmp_path):
    """A sparse file of 8 GiB with only its start written."""
    count = 2**31
    main = state(tensor(storage(size=count, suffix=b"N"), shape=(count,), strides=(1,)))
    head = legacy_file(main, storages=struct.pack("<q", count))
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + 4 * count)
    weights = open_weights(tmp_path)
    assert weights.shape("x") == (count,)
    assert "x" in weights
    with path.open("r+b") as file:
        file.truncate(len(head) + 4 * count - 1)
    refused(tmp_path, f"ends at byte {len(head) + 4 * count - 1}")
    path.unlink()
