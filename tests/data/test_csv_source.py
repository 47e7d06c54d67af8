"""Documents of CSV and TSV files, and nested fields of JSON lines."""

import csv
import gzip
from pathlib import Path

import pytest

from dwt_jax.config import Source
from dwt_jax.data import sources
from dwt_jax.data.sources import iter_documents
from dwt_jax.errors import UserError

TEXTS = ["plain", 'with "quotes", a comma', "two\nlines, ünï", "x" * 200_000, "tab\tin it"]


def read(path: Path, kind: str = "csv", **options) -> list[str]:
    return list(iter_documents(Source(kind=kind, path=str(path), **options)))


def write_csv(path: Path, texts: list[str]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))
    return path


def test_cells_are_those_of_the_csv_module(tmp_path):
    path = write_csv(tmp_path / "a.csv", TEXTS)
    assert read(path) == TEXTS
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))  # with a byte-order mark, of Excel
    assert read(packed) == TEXTS
    assert read(path, field="id") == ["0", "1", "2", "3", "4"]


def test_a_tsv_file_has_no_quotes(tmp_path):
    (tmp_path / "a.tsv").write_text("id\ttext\n1\t\"open, never closed\n\n2\t \n3\tit's\r\n")
    assert read(tmp_path / "a.tsv") == ['"open, never closed', "it's"]


def test_bytes_read_add_up_to_the_size_of_the_file(tmp_path):
    source, parts = Source(kind="csv", path=str(write_csv(tmp_path / "a.csv", TEXTS * 50))), []
    assert len(list(iter_documents(source, parts.append))) == 50 * len(TEXTS)
    assert sum(parts) == sources.stored_bytes(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,txt\n1,x\n", "no column 'text'; did you mean 'txt'"),
        ("a.csv", "", "no column 'text'"),
        ("a.csv", "text,id,text\nx,1,y\n", "several columns 'text'"),
        ("a.csv", 'id,text\n1,"x\ny"\n2,x,y\n', r"a\.csv, line 4: 3 cells, expected 2 as in the header"),
        ("a.tsv", "id\ttext\n1\n", r"a\.tsv, line 2: 1 cells, expected 2 as in the header"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv, line 2: byte 0xff is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_nested_field_of_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "one"}, "a.b": "two"}\n{"a": {"b": "three"}}\n')
    assert read(tmp_path / "a.jsonl", "jsonl", field="a.b") == ["two", "three"]
    with pytest.raises(UserError, match=r"line 1: no field 'a\.c'; known: b"):
        read(tmp_path / "a.jsonl", "jsonl", field="a.c")
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "one"}}\n')
    with pytest.raises(UserError, match=r"line 1: no field 'a\.b\.c'"):
        read(tmp_path / "a.jsonl", "jsonl", field="a.b.c")
