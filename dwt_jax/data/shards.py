"""Rows on disk: numbered .npy files beside an index.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.data.packing import Frame, Packed, Sentences, join, no_sentences, pack
from dwt_jax.errors import UserError

FORMAT = 1  # of index.json and of what the rows mean; part of every digest
SHARD_BYTES = 32 << 20  # of tokens
SPLITS = ("train", "held_out")
PARTS = ("tokens", "segments", "documents")


class Stream:
    """The rows of one source in one split, packed and written as sentences come."""

    def __init__(self, directory: Path, source: int, frame: Frame, shard_bytes: int):
        self._directory, self._source, self._frame = directory, source, frame
        self._shard_rows = max(1, shard_bytes // (frame.length * frame.dtype.itemsize))
        self._left = no_sentences(frame.dtype)
        self._buffer: Packed | None = None
        self._filled = 0
        self._shards: list[dict[str, Any]] = []
        self._documents = self._tokens = 0

    def add(self, sentences: Sentences) -> None:
        """Sentences whose documents are numbered from 0 and are not those added before."""
        if len(sentences.lengths):
            documents = sentences.documents + self._documents
            self._documents = int(documents[-1]) + 1
            self._pack(join(self._left, sentences._replace(documents=documents)), last=False)

    def finish(self) -> dict[str, Any]:
        """Write what is left; what index.json says about the source in this split."""
        self._pack(self._left, last=True)
        self._flush()
        rows = sum(shard["rows"] for shard in self._shards)
        return {"rows": rows, "tokens": self._tokens, "documents": self._documents, "shards": self._shards}

    def _pack(self, sentences: Sentences, last: bool) -> None:
        packed, self._left = pack(sentences, self._frame, last)
        self._tokens += int(np.count_nonzero(packed.segments))
        at, total = 0, len(packed.documents)
        while at < total:
            count = min(total - at, self._shard_rows - self._filled)
            if self._buffer is None:
                self._buffer = Packed(
                    *(np.empty((self._shard_rows, *part.shape[1:]), part.dtype) for part in packed)
                )
            for whole, part in zip(self._buffer, packed, strict=True):
                whole[self._filled : self._filled + count] = part[at : at + count]
            self._filled, at = self._filled + count, at + count
            if self._filled == self._shard_rows:
                self._flush()

    def _flush(self) -> None:
        if self._buffer is None or not self._filled:
            return
        name = f"{self._source:03d}-{len(self._shards):05d}"
        for part, whole in zip(PARTS, self._buffer, strict=True):
            np.save(self._directory / f"{name}.{part}.npy", whole[: self._filled])
        self._shards.append({"name": name, "rows": self._filled})
        self._filled = 0


def read_index(directory: Path) -> dict[str, Any] | None:
    """index.json of a prepared directory; None where there is none. UserError if it is broken
    or of another format."""
    path = directory / "index.json"
    try:
        index = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}, expected an index that dwt prepare wrote") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else None
        raise UserError(f"{path}: format {found}, expected {FORMAT}; run dwt prepare again")
    return index
