"""Read files of examples with named columns: TSV, CSV or JSON lines, according to their suffix."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from dwt_jax.data.sources import COMPRESSION_SUFFIXES, read_lines, read_stdin_lines
from dwt_jax.data.text_format import SEPARATOR_NAMES
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.logs import logger

RowIterator = Iterator[tuple[str, dict[str, Any]]]
"""(file and line, columns) of each example."""

FileFormat = Literal["tsv", "csv", "jsonl"]
_FORMATS: Mapping[str, FileFormat] = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}

STDIN = Path("-")
"""Standard input in place of a file."""

_QUOTED_CELL = re.compile(r'"(?:[^"]|"")*"')
_MAX_CELL = 2**31 - 1  # characters; the csv module's own limit is that of a text of 131,072


def file_format(path: Path) -> FileFormat | None:
    """Return the format from a file's suffix, before that of a compression; None if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffixes = [suffix for suffix in suffixes if suffix not in COMPRESSION_SUFFIXES]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def read_example_rows(path: Path, is_test: bool, kind: FileFormat | None = None) -> RowIterator:
    """Yield the rows of a file.

    Args:
        path: the file, or STDIN.
        is_test: whether every line needs a prediction, see `_read_table`.
        kind: format of the file. None: from its suffix, or tsv if that is unknown.

    Raises:
        UserError: the message names the file and the line.
    """
    kind = kind or file_format(path) or "tsv"
    if kind == "jsonl":
        return _read_json_lines(path)
    return _read_csv(path, is_test) if kind == "csv" else _read_own_tsv(path, is_test)


def iter_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, or of standard input for STDIN."""
    return read_stdin_lines() if path == STDIN else read_lines(path)


def display_name(path: Path) -> str:
    """Return the name of a file for messages."""
    return "standard input" if path == STDIN else str(path)


def _read_json_lines(path: Path) -> RowIterator:
    for line_number, line in enumerate(iter_lines(path), 1):
        if not line.strip():
            continue
        location = f"{display_name(path)}, line {line_number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: {error}, expected a JSON object in each line") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{location}: a JSON {type(row).__name__}, expected an object, and one in each line"
            )
        yield location, row


def _read_csv(path: Path, is_test: bool) -> RowIterator:
    """Yield the rows of a comma-separated file with a header, with quotes as spreadsheets write them.

    Raises:
        UserError: a quote is malformed, or a row has more cells than the header (a comma without quotes
            would shift the cells after it).
    """
    name = display_name(path)
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader((line + "\n" for line in iter_lines(path)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        width = 0
        try:
            for cells in reader:
                width = width or len(cells)
                if len(cells) > width:
                    raise UserError(
                        f"{name}, line {reader.line_num}: {len(cells)} cells, expected {width} as in the "
                        "first line (a text with a comma needs quotes)"
                    )
                yield reader.line_num, cells
        except csv.Error as error:
            raise UserError(
                f"{name}, line {reader.line_num}: {error}, expected comma-separated values"
            ) from None

    return _read_table(path, rows(), is_test)


def _read_own_tsv(path: Path, is_test: bool) -> RowIterator:
    """Yield the rows of a TSV file with a header, as `read_tsv`; it is not GLUE's, whose lines may be longer.

    Cells with quotes around them and doubled ones inside, as pandas writes them, are counted on stderr.

    Raises:
        UserError: for a row with more cells than the header: a tab in a text would shift what follows.
    """
    name = display_name(path)
    num_quoted = 0

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal num_quoted
        width = 0
        for number, cells in _split_at_tabs(path):
            width = width or len(cells)
            if any(cells[width:]):  # empty ones are tabs at the end of a line
                raise UserError(
                    f"{name}, line {number}: {len(cells)} cells, expected {width} as in the first line "
                    "(a text with a tab needs a .csv or .jsonl file)"
                )
            num_quoted += sum('""' in cell and _QUOTED_CELL.fullmatch(cell) is not None for cell in cells)
            yield number, cells

    yield from _read_table(path, rows(), is_test)
    if num_quoted:
        logger.warning(
            f"{name}: warning: {num_quoted} cells are quoted as in a CSV file, expected none: a TSV file is "
            "read without quoting, quotes and all (write a .csv or .jsonl file)"
        )


def _split_at_tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t") if line else []) for number, line in enumerate(iter_lines(path), 1))


def read_tsv(path: Path, is_test: bool, columns: Mapping[str, int] | None = None) -> RowIterator:
    """Yield the rows of a TSV file in GLUE's format: split at tabs, without quoting.

    Args:
        path: the file, or STDIN.
        is_test: whether every line needs a prediction, see `_read_table`.
        columns: {name: index} for a file without a header.
    """
    return _read_table(path, _split_at_tabs(path), is_test, columns)


def _read_table(
    path: Path,
    rows: Iterable[tuple[int, list[str]]],
    is_test: bool,
    columns: Mapping[str, int] | None = None,
) -> RowIterator:
    """Yield the rows of a table as {column: text}.

    A few lines of QQP lack columns. They are skipped, as is usual, and counted on stderr. In a test
    file every line needs a prediction: missing columns are empty texts, and so is an empty line if
    there is only one column.

    Args:
        path: the file.
        rows: number and cells of each line; no cells for an empty line.
        is_test: whether it is a test file.
        columns: {name: index} for a file without a header.

    Raises:
        UserError: for a header with a repeated name, which is ambiguous.
    """
    name, num_short, header = display_name(path), 0, columns
    for line_number, cells in rows:
        if header is None:
            header = {column: index for index, column in enumerate(cells or [""])}
            if duplicate := next((column for column in header if column and cells.count(column) > 1), ""):
                raise UserError(
                    f"{name}: column '{duplicate}' twice in its first line, expected each name once"
                )
        elif cells or (is_test and len(header) == 1):
            row = {column: cells[index] for column, index in header.items() if index < len(cells)}
            num_short += len(row) < len(header)
            if is_test:
                row = {column: row.get(column, "") for column in header}
            if len(row) == len(header):
                yield f"{name}, line {line_number}", row
    if num_short:
        handling = "missing texts are empty" if is_test else "skipped"
        logger.warning(f"{name}: {num_short} lines with too few columns, {handling}")


def get_column(row: Mapping[str, Any], name: str, location: str) -> Any:
    """Return a cell. Raises UserError if the row has no such column."""
    if name in row:
        return row[name]
    if len(row) == 1:
        only_column = str(next(iter(row)))
        for separator, separator_name in SEPARATOR_NAMES.items():
            if name in [cell.strip(" \"'") for cell in only_column.split(separator)]:
                raise UserError(
                    f"{location}: no column '{name}': the first line is separated by {separator_name}, "
                    "expected tabs in a file named .tsv, commas in one named .csv"
                )
    raise UserError(f"{location}: no column '{name}'{did_you_mean(name, map(str, row))}")


def get_text(row: Mapping[str, Any], name: str, location: str) -> str:
    """Return a text cell. Raises UserError if the cell is not a text."""
    value = get_column(row, name, location)
    if not isinstance(value, str):
        raise UserError(f"{location}: column '{name}' is {value!r}, expected text")
    # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
