"""Read documents from text files, JSON lines, CSV, Parquet, TFDS and the corpus that comes with the package.

Everything streams: at most one document and a read buffer are in memory. A long line of a text file is read
in pieces. Files are read in the order of their sorted names, so that a source is the same sequence of
documents on every machine.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dwt_jax.config import Source
from dwt_jax.data.file_patterns import matching_files
from dwt_jax.data.parquet import read_parquet_documents
from dwt_jax.data.sentence_splitter import cut_pieces, last_cut
from dwt_jax.data.text_format import binary_format, check_line_ends
from dwt_jax.data.tfds import get_nested_feature, open_tfds
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import LFS_POINTER_PREFIX, reject_lfs_pointer, user_path
from dwt_jax.logs import logger

BUILTIN_CORPUS = Path(__file__).parent / "builtin" / "sotu.jsonl.xz"
FINGERPRINT_BYTES = 32
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

OnBytesRead = Callable[[int], None]  # called with the number of bytes read from disk since the last call


def _ignore_bytes_read(_: int) -> None:
    pass


def iter_documents(source: Source, on_bytes_read: OnBytesRead = _ignore_bytes_read) -> Iterator[str]:
    """Yield the documents of `source` that hold more than white space, in a fixed order.

    Args:
        source: a section of `data.sources`.
        on_bytes_read: called with the number of bytes read from disk since the last call. All calls add up
            to `stored_bytes(source)`.

    Raises:
        UserError: for a glob without a match, a missing field, invalid UTF-8 or JSON, a damaged compressed
            file, and errors of TFDS. The message names the file, and the line if there is one.
    """
    reader = {
        "builtin": _read_json_documents,
        "text": _read_text_documents,
        "jsonl": _read_json_documents,
        "csv": _read_csv_column,
        "parquet": _read_parquet_column,
        "tfds": _read_tfds_documents,
    }[source.kind]
    for document in reader(source, on_bytes_read):
        for text in cut_pieces(document, MAX_DOCUMENT_CHARS):
            if text and not text.isspace():
                yield text


def document_fingerprint(text: str) -> bytes:
    """Return the BLAKE2b hash of a document's text, 32 bytes; it does not depend on the source."""
    return hashlib.blake2b(text.encode(), digest_size=FINGERPRINT_BYTES).digest()


def source_digest(source: Source) -> str:
    """Return the hex SHA-256 of the documents' fingerprints in order. Reads all documents.

    `dwt prepare` computes the same digest in its one pass and records it in index.json.
    """
    hasher = hashlib.sha256()
    for text in iter_documents(source):
        hasher.update(document_fingerprint(text))
    return hasher.hexdigest()


def stored_bytes(source: Source) -> int:
    """Return how many bytes `iter_documents` will read from disk; 0 if that is unknown."""
    if source.kind == "tfds":
        return open_tfds(source)[1]
    return sum(path.stat().st_size for path in source_files(source))


def source_files(source: Source) -> list[Path]:
    """Return the files of a source, sorted by name; none for TFDS.

    Raises:
        UserError: if the glob matches no file.
    """
    if source.kind == "builtin":
        return [BUILTIN_CORPUS]
    if source.kind == "tfds":
        return []
    pattern = str(user_path(source.path))
    paths = matching_files(pattern)
    if not paths:
        hint = "; it is a directory: add /*" if Path(pattern).is_dir() else ""
        raise UserError(f"{source.path}: matches no file, expected at least one ({source.kind} source){hint}")
    return paths


# Files


class _ZstdReader(io.RawIOBase):
    """Decompresses consecutive zstd frames; unlike `stream_reader`, raises for a truncated file."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw = raw
        self._new_decompressor = zstandard.ZstdDecompressor().decompressobj
        self._decompressor = self._new_decompressor()
        self._mid_frame = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            compressed_bytes = self._decompressor.unused_data if self._decompressor.eof else b""
            compressed_bytes = compressed_bytes or self._raw.read(1 << 16)
            if not compressed_bytes:
                if self._mid_frame:
                    raise EOFError("ends in the middle of a zstd frame")
                return 0
            if self._decompressor.eof:
                self._decompressor = self._new_decompressor()
            self._pending = memoryview(self._decompressor.decompress(compressed_bytes))
            self._mid_frame = not self._decompressor.eof
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _ZstdReader,
}


COMPRESSION_SUFFIXES = tuple(_DECOMPRESSORS)
"""Suffixes of the files that are decompressed when they are read."""


def _reject_other_formats(path: Path, stream: io.BufferedReader) -> None:
    """Raise UserError if a stream begins as a file of another format, whose headers would be read as text."""
    if name := binary_format(stream.peek(512)):
        remedy = "the files in it (unpack it)" if "archive" in name else "text (convert it)"
        if "Parquet" in name:
            remedy = "text (kind 'parquet' of the source reads it)"
        raise UserError(f"{path}: is {name}, expected {remedy}")


@contextmanager
def _open_decompressed(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the decompressed stream of a file, the file itself for its position)"""
    try:
        with open(path, "rb") as raw:
            reject_lfs_pointer(path, raw.peek(len(LFS_POINTER_PREFIX)))
            suffix = path.suffix.lower()
            if suffix not in _DECOMPRESSORS:
                _reject_other_formats(path, raw)
                yield raw, raw
                return
            decompressor = _DECOMPRESSORS[suffix]
            stream = decompressor(fileobj=raw) if decompressor is gzip.GzipFile else decompressor(raw)
            with io.BufferedReader(stream, 1 << 20) as decompressed:
                _reject_other_formats(path, decompressed)
                yield decompressed, raw
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: {error}, expected a complete {path.suffix} file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}, expected a file that can be read") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # by name, since zstandard is imported only if needed
            raise
        raise UserError(f"{path}: {error}, expected a complete {path.suffix} file") from None


def read_lines(
    path: Path, on_bytes_read: OnBytesRead = _ignore_bytes_read, max_bytes: int | None = None
) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without line ends and byte-order mark.

    Args:
        path: decompressed according to its suffix: .gz, .bz2, .xz or .zst.
        on_bytes_read: as for `iter_documents`.
        max_bytes: a longer line is divided into pieces of at most this many bytes.

    Raises:
        UserError: for invalid UTF-8 and for a damaged compressed file.
    """
    last_position = 0
    with _open_decompressed(path) as (stream, raw):
        for count, text in enumerate(_decode_lines(stream, path, max_bytes)):
            yield (text if count else text.removeprefix("\ufeff")).rstrip("\r\n")
            if count % 16 == 0 or len(text) > 1 << 16:
                position = raw.tell()
                on_bytes_read(position - last_position)
                last_position = position
    on_bytes_read(path.stat().st_size - last_position)


def read_stdin_lines() -> Iterator[str]:
    """Yield the lines of standard input, like `read_lines`."""
    if sys.stdin is None:
        raise UserError("standard input is closed, expected lines")
    if sys.stdin.isatty():
        logger.warning("reading lines from the terminal; press Ctrl-D to finish")
    for number, line in enumerate(sys.stdin.buffer, 1):
        if number == 1:
            check_line_ends(line, "standard input")
        text = _decode_utf8(line, f"standard input, line {number}")
        yield (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")


def _decode_lines(stream: BinaryIO, path: Path, max_bytes: int | None) -> Iterator[str]:
    """Lines, and pieces of those of more than `max_bytes`."""
    number, rest = 1, b""
    while line := rest + stream.readline(-1 if max_bytes is None else max_bytes - len(rest)):
        location = f"{path}, line {number}"
        if number == 1:
            check_line_ends(line, str(path))
        if max_bytes is None or line.endswith(b"\n") or len(line) < max_bytes:
            yield _decode_utf8(line, location)
            number, rest = number + 1, b""
            continue
        # The last character may be incomplete: without the bytes from its first on.
        end = max((i for i in range(len(line) - 4, len(line)) if line[i] & 0xC0 != 0x80), default=len(line))
        text = _decode_utf8(line[:end], location)
        piece = text[: last_cut(text, len(text))]
        yield piece
        rest = line[len(piece.encode()) :]


def _decode_utf8(line: bytes, location: str) -> str:
    if b"\0" in line:  # no text has one; UTF-16 and most other formats do
        raise UserError(f"{location}: byte 0x00, expected UTF-8 text (not UTF-16 or a binary file)")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = line[error.start : error.start + 1].hex()
        raise UserError(
            f"{location}: byte 0x{byte} is not UTF-8 ({error.reason}), expected UTF-8 text"
        ) from None


# Kinds of sources

MAX_DOCUMENT_CHARS = 4_000_000  # a longer document is cut between lines, sentences or words


def _read_text_documents(source: Source, on_bytes_read: OnBytesRead) -> Iterator[str]:
    for path in source_files(source):
        lines = _reject_json_lines(path, read_lines(path, on_bytes_read, MAX_DOCUMENT_CHARS))
        if source.documents == "lines":
            yield from lines
        else:
            blank_lines = source.blank_lines if source.documents == "blank_lines" else None
            yield from _join_lines(lines, blank_lines)


def _reject_json_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a text file, and raise UserError if the first is a JSON object."""
    for first in lines:
        if first.startswith("{") and first.rstrip().endswith("}"):
            with suppress(ValueError, RecursionError):
                if isinstance(json.loads(first), dict):
                    raise UserError(
                        f"{path}: is JSON lines, expected text (kind 'jsonl' of the source reads them)"
                    )
        yield first
        yield from lines  # nothing is added to the time of the others


def _join_lines(lines: Iterator[str], blank_lines: int | None) -> Iterator[str]:
    """Join lines into documents, divided by runs of at least `blank_lines` empty ones (None: not divided).

    A document also ends before a line that would take it beyond MAX_DOCUMENT_CHARS, so that memory stays
    flat for a book without empty lines.
    """
    document_lines: list[str] = []
    num_blank = size = 0
    for line in lines:
        is_blank = not line or line.isspace()
        at_boundary = blank_lines is not None and not is_blank and num_blank >= blank_lines
        if document_lines and (at_boundary or size + len(line) > MAX_DOCUMENT_CHARS):
            yield "\n".join(document_lines)
            document_lines, size = [], 0
        num_blank = num_blank + 1 if is_blank else 0
        document_lines.append(line)
        size += len(line) + 1
    yield "\n".join(document_lines)


def _read_json_documents(source: Source, on_bytes_read: OnBytesRead) -> Iterator[str]:
    field = "text" if source.kind == "builtin" else source.field
    for path in source_files(source):
        for number, line in enumerate(read_lines(path, on_bytes_read), 1):
            if line and not line.isspace():
                yield _parse_json_document(line, field, f"{path}, line {number}")


def _parse_json_document(line: str, field: str, location: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: {error}, expected one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: found a JSON {type(record).__name__}, expected an object")
    text: Any = record
    for key in [field] if field in record else field.split("."):
        if not isinstance(text, dict) or key not in text:
            keys = text if isinstance(text, dict) else ()
            raise UserError(f"{location}: no field '{field}'{did_you_mean(key, keys)}")
        text = text[key]
    if not isinstance(text, str):
        raise UserError(f"{location}: field '{field}' is a {type(text).__name__}, expected a string")
    # JSON may escape half of a surrogate pair, which UTF-8 cannot encode. Crawled text has such escapes.
    return _LONE_SURROGATE.sub("\ufffd", text) if "\\u" in line else text


def _read_csv_column(source: Source, on_bytes_read: OnBytesRead) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # else 131,072 characters
    for path in source_files(source):
        suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in COMPRESSION_SUFFIXES]
        is_tsv = suffixes[-1:] == [".tsv"]  # which has no quotes, as those that `dwt finetune` reads
        lines = (f"{line}\n" for line in read_lines(path, on_bytes_read))
        rows = csv.reader(lines, csv.excel_tab, quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(lines)
        header = next(rows, [])
        if header.count(source.field) != 1:
            problem = "several columns" if source.field in header else "no column"
            raise UserError(f"{path}: {problem} '{source.field}'{did_you_mean(source.field, header)}")
        column = header.index(source.field)
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} cells, expected {len(header)} as in the header"
                )
            yield row[column] if row else ""


def _read_parquet_column(source: Source, on_bytes_read: OnBytesRead) -> Iterator[str]:
    for path in source_files(source):
        for text, location in read_parquet_documents(path, source.field, on_bytes_read):
            yield text if isinstance(text, str) else _decode_utf8(text, location)


def _read_tfds_documents(source: Source, on_bytes_read: OnBytesRead) -> Iterator[str]:
    examples, num_bytes = open_tfds(source)
    bytes_per_example = num_bytes / max(1, len(examples))
    for number in range(len(examples)):
        text = get_nested_feature(examples[number], source)
        yield text if isinstance(text, str) else _decode_utf8(text, f"tfds '{source.path}', example {number}")
        on_bytes_read(int((number + 1) * bytes_per_example) - int(number * bytes_per_example))
