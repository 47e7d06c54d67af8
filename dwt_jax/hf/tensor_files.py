"""Read the tensors of a Hugging Face model directory by name, from any format of its weight files.

A tensor is read when it is accessed. The files are not trusted: every name, size and
offset is checked before it is used, and no code in them is run.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import LFS_POINTER_PREFIX, reject_lfs_pointer
from dwt_jax.hf.torch_pickle import TensorSpan, make_tensor_span, tensor_spans
from dwt_jax.hf.unpickler import UnsupportedFile, short_repr
from dwt_jax.model_files import describe_weights, is_model_file

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files in the order in which they are looked up, as in transformers."""

MAX_INDEX_BYTES = 2**24
"""Size limit of the index of shards: enough for a hundred thousand tensors."""

_DTYPES: dict[str, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in {
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
        **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
        **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_},
    }.items()
}

_Tensors = dict[str, tuple[mmap.mmap, TensorSpan]]


def has_weights(directory: Path) -> bool:
    """Return whether a directory has a weight file or a broken link to one."""
    return any(os.path.lexists(directory / name) for name in WEIGHT_FILES)


class Weights(Mapping[str, np.ndarray]):
    """Tensors by name, as read-only views of memory-mapped files.

    Attributes:
        path: the weight file, or the index of its shards.
    """

    def __init__(self, path: Path, tensors: _Tensors) -> None:
        self.path = path
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        data, span = self._tensors[name]
        array = np.ndarray(span.shape, span.dtype, data, span.offset, span.strides)
        return np.require(array, requirements="A")  # a copy if the file does not align the elements

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:  # Mapping's implementation would read the tensor
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._tensors[name][1].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._tensors[name][1].dtype


def open_weights(directory: Path) -> Weights:
    """Open the tensors of a Hugging Face model directory, memory-mapped.

    Tensors have the dtype they are stored in (float32, float16, ml_dtypes.bfloat16, …). Of several files
    the first in `WEIGHT_FILES` is used, as in transformers.

    Raises:
        UserError: no weight file, a damaged or missing one, or one with anything but tensors of the
            supported dtypes.
    """
    for name in WEIGHT_FILES:
        path = directory / name
        if os.path.lexists(path):  # a broken link is an interrupted download, not an absent file
            read_file = _read_safetensors if ".safetensors" in name else _read_pickle
            return Weights(path, _read_shards(path, read_file) if name.endswith(".json") else read_file(path))
    contents = describe_weights(directory) or "no weights"
    raise UserError(f"{directory}: {contents}, expected {' or '.join(WEIGHT_FILES)}")


def _map_file(path: Path, max_bytes: float = math.inf) -> mmap.mmap:
    if not is_model_file(path, max_bytes):
        raise UserError(f"{path}: no such file, expected a file of weights")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise UserError(f"{path}: {error}, expected a file of weights") from None
    reject_lfs_pointer(path, data[: len(LFS_POINTER_PREFIX)])
    return data


def _read_pickle(path: Path) -> _Tensors:
    data = _map_file(path)
    return {name: (data, span) for name, span in tensor_spans(path, data).items()}


def _read_safetensors(path: Path) -> _Tensors:
    """safetensors checks the header against the file. Its arrays are not used: they are copies."""
    from safetensors import SafetensorError, safe_open

    data = _map_file(path)
    try:
        with safe_open(path, "np"):  # sizes, offsets, gaps, overlaps, the end of the file
            start = 8 + int.from_bytes(data[:8], "little")
        header = _parse_json_object(data[8:start])
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}, expected a safetensors file") from None
    header.pop("__metadata__", None)
    unsupported = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
    if unsupported:
        raise UserError(f"{path}: holds tensors of {', '.join(unsupported)}, expected {', '.join(_DTYPES)}")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        byte_range = range(start + begin, start + end)
        try:
            span = make_tensor_span(name, _DTYPES[entry["dtype"]], byte_range, 0, shape, strides)
        except UnsupportedFile as error:
            raise UserError(f"{path}: {error}") from None
        tensors[name] = (data, span)
    return tensors


def _read_shards(index: Path, read_file: Callable[[Path], _Tensors]) -> _Tensors:
    """Every tensor of every shard that the index names, listed or not, as in transformers, which reads only
    the names of the shards from the index."""
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not os.path.lexists(index.parent / file)]
    if missing:
        raise UserError(f"{index}: no {', '.join(map(short_repr, missing))} beside it, expected every shard")
    shards = {file: read_file(index.parent / file) for file in files}
    absent = [
        f"{short_repr(name)} in {short_repr(file)}"
        for name, file in weight_map.items()
        if name not in shards[file]
    ]
    if absent:
        raise UserError(f"{index}: found no {', '.join(absent)}, expected what the index lists")
    tensors: _Tensors = {}
    for file, shard in shards.items():
        duplicates = sorted(tensors.keys() & shard.keys())
        if duplicates:
            raise UserError(
                f"{index}: {', '.join(map(short_repr, duplicates))} in {short_repr(file)} and in a shard "
                "before it, expected each tensor once"
            )
        tensors |= shard
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Read the index: the file name of the shard of each tensor."""
    try:
        record = _parse_json_object(_map_file(index, MAX_INDEX_BYTES)[:])
    except ValueError as error:
        raise UserError(f"{index}: {error}, expected the index of a sharded model") from None
    weight_map = record.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map, expected a map from tensors to files")
    for name, file in weight_map.items():
        # Only the name is checked: in the hub's cache the files are links to another directory.
        if not isinstance(file, str) or file in ("", ".", "..") or any(char in file for char in "/\\\0"):
            raise UserError(
                f"{index}: {short_repr(name)} is in {short_repr(file)}, expected the name of a file beside "
                "the index"
            )
    return weight_map


def _parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for anything else and for a duplicate key."""

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            raise ValueError(f"a key twice in {short_repr([key for key, _ in pairs])}")
        return record

    try:
        record = json.loads(text.decode(), object_pairs_hook=reject_duplicates)
    except RecursionError:
        raise ValueError("JSON too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}")
    return record
