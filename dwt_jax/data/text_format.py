"""Recognise text that is not plain: markup, tables and JSON, binary formats, old line ends."""

import csv
import re
from collections import Counter
from collections.abc import Sequence

from dwt_jax.errors import UserError

_MIN_LINES = 10  # of a table or of JSON: fewer look like one by chance
_MIN_SHARE = 0.9  # of the lines
_MAX_MARKUP = 0.05  # of the characters
_TAG = re.compile(
    r"</?[A-Za-z][\w:.-]*(?:\s+[\w:.-]+\s*=[^<>]{0,1000})?\s*/?>|<(?:\?xml|!--|!DOCTYPE)[^<>]{0,1000}>"
)
_JSON_LINE = re.compile(r'\s*(?:"[^"]*"(?:\s*:.*|,?)|[][{}]+,?)\s*')
SEPARATOR_NAMES = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}

_NOT_TEXT = (  # name, and the position and value of bytes at the beginning
    ("a tar archive", 257, b"ustar"),
    ("a zip archive", 0, b"PK\x03\x04"),
    ("an ar archive", 0, b"!<arch>\n"),
    ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    ("a PDF document", 0, b"%PDF-"),
    ("a Parquet file", 0, b"PAR1"),
    ("an Arrow file", 0, b"ARROW1"),
)


def recognise_format(text: str) -> str:
    """Describe how much of a text is markup, table rows or JSON; '' for plain text.

    Args:
        text: the beginning of a corpus.
    """
    tags = [match[0] for match in _TAG.finditer(text)]
    markup = sum(map(len, tags)) / max(1, len(text))
    if markup > _MAX_MARKUP:
        return f"{markup:.0%} of its characters are tags such as {Counter(tags).most_common(1)[0][0][:40]!r}"
    lines = [line for line in text.splitlines() if line and not line.isspace()]
    if len(lines) < _MIN_LINES:
        return ""
    json_share = sum(_JSON_LINE.fullmatch(line) is not None for line in lines) / len(lines)
    if json_share > _MIN_SHARE:
        return f"{json_share:.0%} of its lines are of JSON"
    tables = [(*_most_common_cells(lines, separator), name) for separator, name in SEPARATOR_NAMES.items()]
    cells, share, name = max((table for table in tables if table[1] > _MIN_SHARE), default=(1, 0.0, ""))
    return f"{share:.0%} of its lines have {cells} cells between {name}" if cells > 1 else ""


def _most_common_cells(lines: Sequence[str], separator: str) -> tuple[int, float]:
    """Return the most frequent number of cells in the rows of a table, and the share of rows that have it."""
    try:
        counts = Counter(len(row) for row in csv.reader(lines, delimiter=separator))
    except csv.Error:
        return 0, 0.0
    cells, count = counts.most_common(1)[0]
    return cells, count / counts.total()


def binary_format(head: bytes) -> str:
    """Return the name of a binary format from a file's first 512 bytes; '' if they may be text."""
    return next((name for name, start, magic in _NOT_TEXT if head[start:].startswith(magic)), "")


def check_line_ends(first_line: bytes, name: str) -> None:
    """Check that a text does not have CR line ends (classic Mac OS), with which all of it is one line.

    Args:
        first_line: the text up to its first LF, with it.
        name: of the file, for the error message.

    Raises:
        UserError: its lines end with CR alone.
    """
    if not first_line.endswith(b"\n") and b"\r" in first_line.rstrip(b"\r"):
        raise UserError(f"{name}: its lines end with CR alone, expected LF or CR LF (tr '\\r' '\\n')")
