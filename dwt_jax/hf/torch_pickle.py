"""Locate the tensors of a `pytorch_model.bin`, in both formats of `torch.save`, without torch."""

import io
import math
import struct
import zipfile
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.hf.unpickler import Storage, TensorView, UnsupportedFile, parse_pickle, short_repr, type_name

MAX_PICKLE_BYTES = 2**23
"""Size limit of a pickle: enough for tens of thousands of tensors."""

MAX_VIEW_BYTES = 2**24
"""Size limit of a view that repeats its elements, independent of how few are stored."""

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001


class TensorSpan(NamedTuple):
    """A tensor in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...]  # bytes


def tensor_spans(path: Path, data: mmap) -> dict[str, TensorSpan]:
    """Return the tensors, by name, of a state dict that `torch.save` wrote.

    Both formats are read, the zip and that of torch before 1.6, but only dicts of tensors by
    name. Checksums are not compared: torch can omit them, and ignores them too.

    Args:
        path: the file, for messages.
        data: its bytes.

    Raises:
        UserError: the file is not a dict of tensors, or a tensor is outside of its storage.
    """
    try:
        return _read_zip(path, data) if data[:4] == b"PK\3\4" else _read_legacy(data)
    except UnsupportedFile as error:
        raise UserError(f"{path}: {error}") from None
    except (
        *(IndexError, KeyError, ValueError, EOFError, OSError, OverflowError, NotImplementedError),
        *(struct.error, zipfile.BadZipFile),
    ) as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{path}: damaged or not a state dict ({detail}), expected a state dict that torch.save wrote"
        ) from None


def make_tensor_span(
    name: str,
    dtype: np.dtype,
    byte_range: range,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> TensorSpan:
    """Return the span of a tensor.

    Args:
        name: the tensor's name, for messages.
        dtype: dtype of its elements.
        byte_range: bytes of the file that hold its storage.
        offset: first element, counted in elements from the start of the storage.
        shape: its shape.
        strides: its strides in elements.

    Raises:
        UnsupportedFile: the tensor is not entirely inside `byte_range`.
    """
    values = (offset, *shape, *strides)
    is_valid = all(type(n) is int and 0 <= n < 2**63 for n in values)
    if not is_valid or len(shape) != len(strides) or len(shape) > 64:
        raise UnsupportedFile(f"holds {short_repr(name)} with an impossible shape, expected a tensor")
    is_empty = 0 in shape
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not is_empty and (last + 1) * dtype.itemsize > len(byte_range):
        raise UnsupportedFile(
            f"holds {short_repr(name)} outside of its {len(byte_range)} bytes, expected it within them"
        )
    # A stride of 0 repeats elements: without a limit, a copy of a small file's tensor could have any size.
    size = math.prod(n or 1 for n in shape) * dtype.itemsize  # numpy counts a length of 0 as 1 too
    if size > (2**63 - 1 if is_empty else max(len(byte_range), MAX_VIEW_BYTES)):
        raise UnsupportedFile(
            f"holds {short_repr(name)} of {size} bytes, expected the {len(byte_range)} that are stored"
        )
    steps = (0 if is_empty or n == 1 else s * dtype.itemsize for n, s in zip(shape, strides, strict=True))
    return TensorSpan(
        dtype, shape, byte_range.start + (0 if is_empty else offset * dtype.itemsize), tuple(steps)
    )


def _read_zip(path: Path, data: mmap) -> dict[str, TensorSpan]:
    """The format since torch 1.6: a zip with data.pkl and one member per storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise UnsupportedFile("holds two members of one name, expected each name once")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UnsupportedFile(f"a zip with {len(roots)} data.pkl, expected one that torch.save wrote")
    (root,) = roots
    if f"{root}byteorder" in members:
        order = _member_range(data, members[f"{root}byteorder"])
        if data[order.start : order.stop] != b"little":
            raise UnsupportedFile("stored in big-endian order, expected little-endian")
    pickle = _member_range(data, members[f"{root}data.pkl"])
    if len(pickle) > MAX_PICKLE_BYTES:
        raise UnsupportedFile(f"holds a pickle of {len(pickle)} bytes, expected at most {MAX_PICKLE_BYTES}")
    storages: dict[str, Storage] = {}
    views = _check_state_dict(parse_pickle(io.BytesIO(data[pickle.start : pickle.stop]), storages))
    byte_ranges = {}
    for key, storage in storages.items():
        name = f"{root}data/{key}"
        byte_range = _member_range(data, members[name]) if name in members else range(0)
        size = storage.size * storage.dtype.itemsize
        if size > len(byte_range):
            raise UnsupportedFile(f"holds {len(byte_range)} bytes as {short_repr(name)}, expected {size}")
        byte_ranges[key] = range(byte_range.start, byte_range.start + size)
    return _spans_of_views(views, byte_ranges)


def _member_range(data: mmap, info: zipfile.ZipInfo) -> range:
    """The bytes of a member. Their start is known only from the header before them: torch aligns them
    with a field of the header that the zip's directory does not have."""
    name = short_repr(info.filename)
    if info.flag_bits & 0x1:
        raise UnsupportedFile(f"holds {name} encrypted, expected it as it is")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise UnsupportedFile(
            f"holds {name} compressed, expected it as it is, which is how torch.save stores it"
        )
    header = data[info.header_offset : info.header_offset + 30] if info.header_offset >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise UnsupportedFile(f"has no {name} where its directory says, expected a complete zip")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.file_size > len(data):
        raise UnsupportedFile(f"ends within {name}, expected a complete zip")
    return range(start, start + info.file_size)


def _read_legacy(data: mmap) -> dict[str, TensorSpan]:
    """The format before torch 1.6: five pickles (a magic number, a version, the system, the state dict, the
    keys of the storages), then for each storage its length in eight bytes and its elements."""
    pickles = io.BytesIO(data[:MAX_PICKLE_BYTES])
    if parse_pickle(pickles) != _MAGIC or parse_pickle(pickles) != _PROTOCOL:
        raise UnsupportedFile("a pickle of another kind, expected a state dict that torch.save wrote")
    system = parse_pickle(pickles)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise UnsupportedFile("stored in big-endian order, expected little-endian")
    storages: dict[str, Storage] = {}
    views = _check_state_dict(parse_pickle(pickles, storages))
    keys = parse_pickle(pickles)
    keys_valid = type(keys) is list and all(type(key) is str for key in keys)
    if not keys_valid or sorted(keys) != sorted(storages):
        raise UnsupportedFile("lists other storages than its tensors have, expected the same ones")
    byte_ranges, start = {}, pickles.tell()
    for key in keys:
        storage = storages[key]
        (length,) = struct.unpack_from("<q", data, start)
        if length != storage.size:
            raise UnsupportedFile(f"holds a storage of {length} elements, expected {storage.size}")
        byte_ranges[key] = range(start + 8, start + 8 + storage.size * storage.dtype.itemsize)
        start = byte_ranges[key].stop
        if start > len(data):
            raise UnsupportedFile(f"ends at byte {len(data)}, expected a storage up to byte {start}")
    return _spans_of_views(views, byte_ranges)


def _check_state_dict(value: Any) -> dict[str, TensorView]:
    if type(value) is not dict:
        raise UnsupportedFile(f"holds {type_name(value)}, expected a state dict: tensors by name")
    for name, view in value.items():
        if type(view) is not TensorView:
            raise UnsupportedFile(
                f"holds {type_name(view)} named {short_repr(name)}, expected a state dict: tensors by name"
            )
    return value


def _spans_of_views(views: dict[str, TensorView], byte_ranges: dict[str, range]) -> dict[str, TensorSpan]:
    return {
        name: make_tensor_span(
            name, view.dtype, byte_ranges[view.storage.key], view.offset, view.shape, view.strides
        )
        for name, view in views.items()
    }
