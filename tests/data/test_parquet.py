"""Documents of Parquet files: the same as those of JSON lines, in every type and layout that holds text."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dwt_jax.config import Source
from dwt_jax.data import sources
from dwt_jax.data.sources import iter_documents
from dwt_jax.errors import UserError

TEXTS = [f"Document {i}.\nIts second line — ünï 日本語 {i}." for i in range(1000)]


def write(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(path: Path | str, field: str = "text") -> list[str]:
    return list(iter_documents(Source(kind="parquet", path=str(path), field=field)))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_documents_are_those_of_json_lines(tmp_path, compression):
    """Two files of several row groups in nested folders, as FineWeb has them."""
    columns = {"id": list(range(600)), "text": TEXTS[:600]}
    write(tmp_path / "data" / "a" / "000.parquet", columns, row_group_size=250, compression=compression)
    write(tmp_path / "data" / "b" / "000.parquet", {"text": TEXTS[600:]}, compression=compression)
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read(f"{tmp_path}/data/**/*.parquet") == TEXTS
    parquet = Source(kind="parquet", path=f"{tmp_path}/data/**/*.parquet")
    json_lines = Source(kind="jsonl", path=str(lines))
    assert sources.source_digest(parquet) == sources.source_digest(json_lines)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS, pa.string_view()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array([text.encode() for text in TEXTS], pa.binary()),
        pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text(tmp_path, column):
    assert read(write(tmp_path / "a.parquet", {"text": column})) == TEXTS


def test_a_member_of_structs_and_a_name_with_a_dot(tmp_path):
    records = [
        {"body": {"raw": "one"}, "n": 1},
        None,
        {"body": None, "n": 2},
        {"body": {"raw": "two"}, "n": 3},
    ]
    path = write(tmp_path / "a.parquet", {"page": records, "page.title": ["a", "b", "c", "d"]})
    assert read(path, "page.body.raw") == ["one", "two"]
    assert read(path, "page.title") == ["a", "b", "c", "d"]


def test_nulls_and_white_space_are_no_documents(tmp_path):
    assert read(write(tmp_path / "a.parquet", {"text": ["one", None, " \n", "", "two"]})) == ["one", "two"]
    assert read(write(tmp_path / "b.parquet", {"text": pa.array([], pa.string())})) == []


def test_bytes_read_add_up_to_the_size_of_the_files(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", {"text": TEXTS}, row_group_size=300)
    source, parts = Source(kind="parquet", path=f"{tmp_path}/*.parquet"), []
    assert len(list(iter_documents(source, parts.append))) == 2 * len(TEXTS)
    assert sum(parts) == sources.stored_bytes(source) > 0
    assert len(parts) > 6


def damaged(path: Path) -> Path:
    """The first page of data is overwritten; footer and header of the page are intact."""
    write(path, {"text": TEXTS}, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[2000:2400] = bytes(400)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (
            lambda path: write(path, {"content": ["x"]}),
            "contend",
            "no column 'contend'; did you mean 'content'",
        ),
        (lambda path: write(path, {"text": ["x"]}), "text.raw", r"no column 'text\.raw'"),
        (
            lambda path: write(path, {"text": [1]}),
            "text",
            "column 'text' is int64, expected a column of strings",
        ),
        (lambda path: write(path, {"text": [["x"]]}), "text", "column 'text' is list<.*>, expected a column"),
        (lambda path: write(path, {"text": [b"ok", b"\xff"]}), "text", "row 2: byte 0xff is not UTF-8"),
        (lambda path: path.write_text("text"), "text", "expected a Parquet file that can be read"),
        (lambda path: path.write_bytes(b""), "text", "expected a Parquet file that can be read"),
        (damaged, "text", "expected a Parquet file that can be read"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "text",
            "Git LFS",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, make, field, message):
    path = tmp_path / "a.parquet"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        read(path, field)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_of_text_names_the_kind(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["x"]})
    with pytest.raises(UserError, match="is a Parquet file, expected text \\(kind 'parquet' of the source"):
        list(iter_documents(Source(kind="text", path=str(path))))


@pytest.mark.parametrize("names", [["a", "a.b"], ["a.b", "a"]])
def test_a_name_with_a_dot_is_found_beside_structs_in_any_order(tmp_path, names):
    columns = {"a": pa.array([{"b": "of the struct"}]), "a.b": pa.array(["of the column"])}
    path = write(tmp_path / "a.parquet", {name: columns[name] for name in names})
    assert read(path, "a.b") == ["of the column"]


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array([1])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'text', expected one"):
        read(tmp_path / "a.parquet")
