"""Documents out of text files, JSON lines, TFDS and the corpus that comes with the package.

Everything streams: at most one document, and a read buffer, is in memory. Files are read in
the order of their sorted names, so that a source is the same sequence of documents everywhere.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dwt_jax.config import Source
from dwt_jax.errors import UserError, did_you_mean

BUILTIN = Path(__file__).parent / "builtin" / "sotu.jsonl.xz"
FINGERPRINT_BYTES = 32
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Seen = Callable[[int], None]  # told how many stored bytes were read since it was last told


def _untold(_: int) -> None:
    pass


def documents(source: Source, seen: Seen = _untold) -> Iterator[str]:
    """The documents of `source` that hold more than white space, in a fixed order.

    `seen` is called with the number of bytes, as they lie on disk, read since its last call;
    they add up to `stored_bytes(source)`. Raises UserError, naming file and line where there
    is one, for a glob that matches nothing, a missing field, invalid UTF-8 or JSON, a broken
    compressed file, and whatever TFDS cannot give.
    """
    reader = {"builtin": _json_lines, "text": _texts, "jsonl": _json_lines, "tfds": _tfds_texts}[source.kind]
    return (text for text in reader(source, seen) if text and not text.isspace())


def fingerprint(text: str) -> bytes:
    """BLAKE2b, 32 bytes, of a document's text: its identity wherever it is read from."""
    return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES).digest()


def digest(source: Source) -> str:
    """Hex SHA-256 over the documents' fingerprints in order; reads the whole source.

    `prepare` has the same number from its one pass and records it in index.json.
    """
    whole = hashlib.sha256()
    for text in documents(source):
        whole.update(fingerprint(text))
    return whole.hexdigest()


def stored_bytes(source: Source) -> int:
    """What `documents` will tell `seen` in all; 0 where that is not known beforehand."""
    if source.kind == "tfds":
        return open_tfds(source)[1]
    return sum(path.stat().st_size for path in files(source))


def files(source: Source) -> list[Path]:
    """The files of a source by name, sorted; none for TFDS. UserError if the glob matches none."""
    if source.kind == "builtin":
        return [BUILTIN]
    if source.kind == "tfds":
        return []
    pattern = str(Path(source.path).expanduser())
    found = [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()]
    if not found:
        hint = "; it is a directory: add /*" if Path(pattern).is_dir() else ""
        raise UserError(f"{source.path}: matches no file, expected at least one ({source.kind} source){hint}")
    return found


# Files


class _Zstd(io.RawIOBase):
    """Frames of zstd one after the other; unlike `stream_reader`, complains of a cut file."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._open = self._new(), False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._raw.read(1 << 16)
            if not packed:
                if self._open:
                    raise EOFError("ends in the middle of a zstd frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(packed))
            self._open = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _Zstd,
}


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the bytes of a file, unpacked by its ending; the file itself, for its position)."""
    try:
        with open(path, "rb") as raw:
            if path.suffix not in _UNPACK:
                yield raw, raw
                return
            unpack = _UNPACK[path.suffix]
            opened = unpack(fileobj=raw) if unpack is gzip.GzipFile else unpack(raw)
            with io.BufferedReader(opened, 1 << 20) as lines:
                yield lines, raw
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: {error}, expected a whole {path.suffix} file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a file that can be read") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its module is imported only where it is needed
            raise
        raise UserError(f"{path}: {error}, expected a whole {path.suffix} file") from None


def lines_of(path: Path, seen: Seen = _untold) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; a byte-order mark is dropped."""
    told = 0
    with _unpacked(path) as (lines, raw):
        for number, line in enumerate(lines, 1):
            text = _decode(line, f"{path}, line {number}")
            yield (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
            if number % 16 == 0:
                at = raw.tell()
                seen(at - told)
                told = at
    seen(path.stat().st_size - told)


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 1].hex()
        raise UserError(
            f"{where}: byte 0x{found} is not UTF-8 ({error.reason}), expected UTF-8 text"
        ) from None


# Kinds of sources

LARGEST_DOCUMENT = 4_000_000  # characters; a longer one is cut at the end of a line


def _texts(source: Source, seen: Seen) -> Iterator[str]:
    for path in files(source):
        lines = lines_of(path, seen)
        if source.documents == "lines":
            yield from lines
        else:
            blank_lines = source.blank_lines if source.documents == "blank_lines" else None
            yield from _blocks(lines, blank_lines)


def _blocks(lines: Iterator[str], blank_lines: int | None) -> Iterator[str]:
    """Lines joined up to each run of at least `blank_lines` empty ones (None: all of them), or
    up to LARGEST_DOCUMENT characters: memory stays flat for a book without an empty line."""
    block: list[str] = []
    blank = size = 0
    for line in lines:
        empty = not line or line.isspace()
        ended = blank_lines is not None and not empty and blank >= blank_lines
        if block and (ended or size + len(line) > LARGEST_DOCUMENT):
            yield "\n".join(block)
            block, size = [], 0
        blank = blank + 1 if empty else 0
        block.append(line)
        size += len(line) + 1
    yield "\n".join(block)


def _json_lines(source: Source, seen: Seen) -> Iterator[str]:
    field = "text" if source.kind == "builtin" else source.field
    for path in files(source):
        for number, line in enumerate(lines_of(path, seen), 1):
            if line and not line.isspace():
                yield _json_text(line, field, f"{path}, line {number}")


def _json_text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}, expected one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: found a JSON {type(record).__name__}, expected an object")
    if field not in record:
        raise UserError(f"{where}: no field '{field}'{did_you_mean(field, record)}")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' is a {type(text).__name__}, expected a string")
    # JSON may spell half of a surrogate pair, which no UTF-8 can hold. Crawled text has them.
    return _LONE_SURROGATE.sub("\ufffd", text) if "\\u" in line else text


def open_tfds(source: Source) -> tuple[Any, int]:
    """(random access to a split's examples, its bytes); TensorFlow is not needed."""
    import tensorflow_datasets as tfds

    try:
        if (Path(source.path).expanduser() / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(str(Path(source.path).expanduser()))
        else:
            _register(source.path)
            builder = tfds.builder(source.path, data_dir=source.data_dir or None)
        if not builder.data_path.exists():  # what TFDS says then is a list of guesses
            raise UserError(
                f"tfds '{source.path}', split '{source.split}': nothing in {builder.data_path}, expected a "
                "dataset there (or another data_dir), prepared with file_format='array_record'"
            )
        examples = builder.as_data_source(split=source.split)
        return examples, int(builder.info.splits[source.split].num_bytes or 0)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # TFDS raises its own kinds, and some of absl's
        reason = " ".join(str(error).split())
        raise UserError(
            f"tfds '{source.path}', split '{source.split}': {reason[:300]}; expected a dataset that was "
            "prepared with file_format='array_record'"
        ) from None


def _register(name: str) -> None:
    """Import the module that defines a text dataset: TFDS without TensorFlow knows few by itself."""
    import importlib

    group = name.split("/")[0].split(":")[0]
    if group.isidentifier():
        for module in (f"tensorflow_datasets.text.{group}", f"tensorflow_datasets.datasets.{group}"):
            try:
                importlib.import_module(module)
            except Exception:  # tfds.builder says what is wrong, if anything is
                continue


def _tfds_texts(source: Source, seen: Seen) -> Iterator[str]:
    examples, stored = open_tfds(source)
    share = stored / max(1, len(examples))
    for number in range(len(examples)):
        text = _nested(examples[number], source)
        yield text if isinstance(text, str) else _decode(text, f"tfds '{source.path}', example {number}")
        seen(int((number + 1) * share) - int(number * share))


def _nested(example: Any, source: Source) -> str | bytes:
    """A field by name; `a/b` is field b of the features in a."""
    where = f"tfds '{source.path}'"
    for key in source.field.split("/"):
        if not isinstance(example, dict) or key not in example:
            known = example if isinstance(example, dict) else ()
            raise UserError(f"{where}: no field '{source.field}'{did_you_mean(key, known)}")
        example = example[key]
    if not isinstance(example, str | bytes):
        raise UserError(f"{where}: field '{source.field}' is a {type(example).__name__}, expected text")
    return example
