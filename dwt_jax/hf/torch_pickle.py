"""Where the tensors of a `pytorch_model.bin` lie, in both formats of `torch.save`, without torch."""

import io
import math
import struct
import zipfile
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.hf.unpickler import Refused, Storage, View, kind_of, quoted, unpickled

LONGEST = 2**23  # bytes of pickle read at most: tens of thousands of tensors
REPEATED = 2**24  # bytes that a view which repeats its elements may have, however few are stored

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001


class Place(NamedTuple):
    """A tensor in a file; `offset` and `strides` in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def places(path: Path, data: mmap) -> dict[str, Place]:
    """The tensors by name in what `torch.save` wrote to `path`; `data` are its bytes.

    Both formats are read, the zip and that of torch before 1.6, but only of a dict of tensors by
    name. Checksums are not compared: torch can be told to leave them out, and ignores them too.

    Raises UserError for everything else, and for tensors that do not lie within their storage.
    """
    try:
        return _in_zip(path, data) if data[:4] == b"PK\3\4" else _in_sequence(data)
    except Refused as refused:
        raise UserError(f"{path}: {refused}") from None
    except (
        *(IndexError, KeyError, ValueError, EOFError, OSError, OverflowError, NotImplementedError),
        *(struct.error, zipfile.BadZipFile),
    ) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{path}: damaged or of another kind ({said}), expected a state dict that torch.save wrote"
        ) from None


def place(
    name: str, dtype: np.dtype, room: range, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Place:
    """The place of a tensor that starts `offset` elements into the bytes `room` of a file and steps
    by `strides` elements. Raises Refused if it is not wholly in there."""
    numbers = (offset, *shape, *strides)
    sane = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not sane or len(shape) != len(strides) or len(shape) > 64:
        raise Refused(f"holds {quoted(name)} with an impossible shape, expected a tensor")
    empty = 0 in shape
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not empty and (last + 1) * dtype.itemsize > len(room):
        raise Refused(f"holds {quoted(name)} outside of its {len(room)} bytes, expected it within them")
    # A stride of 0 repeats elements: a small file must not become any number of bytes elsewhere.
    size = math.prod(n or 1 for n in shape) * dtype.itemsize  # numpy too takes a length of 0 for 1
    if size > (2**63 - 1 if empty else max(len(room), REPEATED)):
        raise Refused(f"holds {quoted(name)} of {size} bytes, expected the {len(room)} that are stored")
    steps = (0 if empty or n == 1 else s * dtype.itemsize for n, s in zip(shape, strides, strict=True))
    return Place(dtype, shape, room.start + (0 if empty else offset * dtype.itemsize), tuple(steps))


def _in_zip(path: Path, data: mmap) -> dict[str, Place]:
    """The format since torch 1.6: a zip of data.pkl and one member a storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise Refused("holds two members of one name, expected each name once")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"a zip with {len(roots)} data.pkl, expected one that torch.save wrote")
    (root,) = roots
    if f"{root}byteorder" in members:
        order = _member(data, members[f"{root}byteorder"])
        if data[order.start : order.stop] != b"little":
            raise Refused("stored in big-endian order, expected little-endian")
    pickle = _member(data, members[f"{root}data.pkl"])
    if len(pickle) > LONGEST:
        raise Refused(f"holds a pickle of {len(pickle)} bytes, expected at most {LONGEST}")
    storages: dict[str, Storage] = {}
    views = _state(unpickled(io.BytesIO(data[pickle.start : pickle.stop]), storages))
    rooms = {}
    for key, storage in storages.items():
        name = f"{root}data/{key}"
        room = _member(data, members[name]) if name in members else range(0)
        size = storage.size * storage.dtype.itemsize
        if size > len(room):
            raise Refused(f"holds {len(room)} bytes as {quoted(name)}, expected {size}")
        rooms[key] = range(room.start, room.start + size)
    return _places(views, rooms)


def _member(data: mmap, info: zipfile.ZipInfo) -> range:
    """The bytes of a member. Only the header before them tells where they start: torch aligns them
    by a field there which the directory does not have."""
    name = quoted(info.filename)
    if info.flag_bits & 0x1:
        raise Refused(f"holds {name} encrypted, expected it as it is")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Refused(f"holds {name} compressed, expected it as it is, which is how torch.save stores it")
    head = data[info.header_offset : info.header_offset + 30] if info.header_offset >= 0 else b""
    if len(head) < 30 or head[:4] != b"PK\3\4":
        raise Refused(f"has no {name} where its directory says, expected a whole zip")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
    if start + info.file_size > len(data):
        raise Refused(f"ends within {name}, expected a whole zip")
    return range(start, start + info.file_size)


def _in_sequence(data: mmap) -> dict[str, Place]:
    """The format before torch 1.6: five pickles (a number, a version, the system, the state, the
    keys of the storages), then of each storage its length in eight bytes and its elements."""
    pickles = io.BytesIO(data[:LONGEST])
    if unpickled(pickles) != _MAGIC or unpickled(pickles) != _PROTOCOL:
        raise Refused("a pickle of another kind, expected a state dict that torch.save wrote")
    system = unpickled(pickles)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("stored in big-endian order, expected little-endian")
    storages: dict[str, Storage] = {}
    views = _state(unpickled(pickles, storages))
    keys = unpickled(pickles)
    names = type(keys) is list and all(type(key) is str for key in keys)
    if not names or sorted(keys) != sorted(storages):
        raise Refused("lists other storages than its tensors have, expected the same ones")
    rooms, start = {}, pickles.tell()
    for key in keys:
        storage = storages[key]
        (length,) = struct.unpack_from("<q", data, start)
        if length != storage.size:
            raise Refused(f"holds a storage of {length} elements, expected {storage.size}")
        rooms[key] = range(start + 8, start + 8 + storage.size * storage.dtype.itemsize)
        start = rooms[key].stop
        if start > len(data):
            raise Refused(f"ends at byte {len(data)}, expected a storage up to byte {start}")
    return _places(views, rooms)


def _state(value: Any) -> dict[str, View]:
    if type(value) is not dict:
        raise Refused(f"holds {kind_of(value)}, expected a state dict: tensors by name")
    for name, view in value.items():
        if type(view) is not View:
            raise Refused(
                f"holds {kind_of(view)} named {quoted(name)}, expected a state dict: tensors by name"
            )
    return value


def _places(views: dict[str, View], rooms: dict[str, range]) -> dict[str, Place]:
    return {
        name: place(name, view.dtype, rooms[view.storage.key], view.offset, view.shape, view.strides)
        for name, view in views.items()
    }
