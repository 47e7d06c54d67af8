"""Shards of rows on disk: numbered .npy files, described by an index.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.data.packing import (
    PackedRows,
    RowFormat,
    Spans,
    concat_spans,
    empty_spans,
    pack_spans,
)
from dwt_jax.errors import UserError
from dwt_jax.renamed_keys import RENAMED_KEYS

FORMAT_VERSION = 1  # of index.json and the rows; part of every digest
SHARD_BYTES = 32 << 20  # of tokens
SPLITS = ("train", "held_out")
ARRAY_NAMES = ("tokens", "segments", "documents")


class ShardWriter:
    """Packs and writes the rows of one source in one split, as spans arrive."""

    def __init__(self, directory: Path, source: int, row_format: RowFormat, shard_bytes: int):
        """Initialise the writer; no file is opened yet.

        Args:
            directory: of the split.
            source: number of the source.
            row_format: layout of a row.
            shard_bytes: size of the tokens in one shard.
        """
        self._directory, self._source, self._row_format = directory, source, row_format
        self._shard_rows = max(1, shard_bytes // (row_format.length * row_format.dtype.itemsize))
        self._pending = empty_spans(row_format.dtype)
        self._buffer: PackedRows | None = None
        self._num_buffered = 0
        self._shards: list[dict[str, Any]] = []
        self._num_documents = self._num_tokens = 0

    def add(self, spans: Spans) -> None:
        """Add the spans of further documents, numbered from 0."""
        if len(spans.lengths):
            documents = spans.documents + self._num_documents
            self._num_documents = int(documents[-1]) + 1
            self._pack(concat_spans(self._pending, spans._replace(documents=documents)), last=False)

    def finish(self) -> dict[str, Any]:
        """Write the remaining rows.

        Returns:
            The entry of index.json about the source in this split.
        """
        self._pack(self._pending, last=True)
        self._flush()
        return {
            "rows": sum(shard["rows"] for shard in self._shards),
            "tokens": self._num_tokens,
            "documents": self._num_documents,
            "shards": self._shards,
        }

    def _pack(self, spans: Spans, last: bool) -> None:
        packed_rows, self._pending = pack_spans(spans, self._row_format, last)
        self._num_tokens += int(np.count_nonzero(packed_rows.segments))
        start, total = 0, len(packed_rows.documents)
        while start < total:
            count = min(total - start, self._shard_rows - self._num_buffered)
            if self._buffer is None:
                self._buffer = PackedRows(
                    *(np.empty((self._shard_rows, *array.shape[1:]), array.dtype) for array in packed_rows)
                )
            for buffer, array in zip(self._buffer, packed_rows, strict=True):
                buffer[self._num_buffered : self._num_buffered + count] = array[start : start + count]
            self._num_buffered, start = self._num_buffered + count, start + count
            if self._num_buffered == self._shard_rows:
                self._flush()

    def _flush(self) -> None:
        if self._buffer is None or not self._num_buffered:
            return
        name = f"{self._source:03d}-{len(self._shards):05d}"
        for array_name, buffer in zip(ARRAY_NAMES, self._buffer, strict=True):
            np.save(self._directory / f"{name}.{array_name}.npy", buffer[: self._num_buffered])
        self._shards.append({"name": name, "rows": self._num_buffered})
        self._num_buffered = 0


def read_dataset_index(directory: Path) -> dict[str, Any] | None:
    """Read the index.json of a prepared directory.

    Keys with names of earlier versions are renamed.

    Returns:
        The index; None if there is no index.json.

    Raises:
        UserError: the index is damaged or has another format version.
    """
    path = directory / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}, expected an index that dwt prepare wrote") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT_VERSION:
        version = index.get("format") if isinstance(index, dict) else None
        raise UserError(f"{path}: format {version}, expected {FORMAT_VERSION}; run dwt prepare again")
    index = {_current_key(key): value for key, value in index.items()}
    if isinstance(index.get("data"), dict):
        index["data"] = {_current_key(key): value for key, value in index["data"].items()}
    return index


def _current_key(key: str) -> str:
    return RENAMED_KEYS.get(f"data.{key}", key).removeprefix("data.")
