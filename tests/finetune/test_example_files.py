"""Files of examples with named columns, by their names."""

import csv
import io
import json
import types

import pytest

from dwt_jax.errors import UserError
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.datasets import read_examples
from dwt_jax.finetune.example_files import STDIN, file_format, read_example_rows

TEXTS = ["plain", 'he said "no", twice', "two\nlines", "a\ttab", " spaces ", "é, ü; 雨", "x" * 200_000]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)


def test_csv_gives_what_was_written(tmp_path):
    """Quotes, commas and line breaks in cells, CRLF, a byte-order mark, a cell above the module's limit."""
    path = tmp_path / "a.csv"
    write_csv(path, [["text", "label"], *([text, str(i)] for i, text in enumerate(TEXTS))])
    rows = [row for _, row in read_example_rows(path, is_test=False)]
    assert rows == [{"text": text, "label": str(i)} for i, text in enumerate(TEXTS)]


def test_all_formats_give_the_same_rows(tmp_path, monkeypatch):
    expected = [{"text": "a b", "label": "x"}, {"text": "c, d", "label": "y"}]
    contents = {
        "tsv": "text\tlabel\na b\tx\nc, d\ty\n",
        "csv": 'text,label\na b,x\n"c, d",y\n',
        "jsonl": "".join(json.dumps(row) + "\n" for row in expected),
    }
    for kind, content in contents.items():
        (tmp_path / f"rows.{kind}").write_text(content)
        assert [row for _, row in read_example_rows(tmp_path / f"rows.{kind}", is_test=False)] == expected
        monkeypatch.setattr(
            "sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content.encode()), isatty=bool)
        )
        located = list(read_example_rows(STDIN, is_test=False, kind=kind))
        assert [row for _, row in located] == expected
        assert all(location.startswith("standard input, line ") for location, _ in located)


def test_file_format_is_that_of_the_name(tmp_path):
    names = {"a.csv": "csv", "b.v2.tsv.gz": "tsv", "c.jsonl.zst": "jsonl", "d.txt": None, "e": None}
    names |= {"F.CSV": "csv", "g.Tsv.GZ": "tsv"}
    assert {name: file_format(tmp_path / name) for name in names} == names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.tsv",
            "sentence,label\nx,yes\n",
            "no column 'label': the first line is separated by commas, expected",
        ),
        ("a.csv", "sentence;label\nx;yes\n", "the first line is separated by semicolons, expected"),
        ("a.csv", "sentence\tlabel\nx\tyes\n", "the first line is separated by tabs, expected"),
        ("a.csv", "sentence,label\nriver, stone,yes\n", "line 2: 3 cells, expected 2 as in the first line"),
        ("a.tsv", "label\tsentence\nyes\triver\tstone\n", "line 2: 3 cells, expected 2 as in the"),
        ("a.csv", 'sentence,label\n"river,yes\nstone,no\n', "line 3: unexpected end of data, expected"),
        ("a.csv", "sentence,label\rx,yes\ry,no\r", "its lines end with CR alone, expected LF or CR LF"),
        ("a.tsv", "sentence\tlabel\rx\tyes\ry\tno", "its lines end with CR alone, expected LF or CR LF"),
        ("a.csv", "sentence,sentence,label\nx,y,yes\n", "column 'sentence' twice"),
        ("a.csv", "text,label\nx,yes\ny,no\n", "line 2: no column 'sentence'; known: label, text"),
        ("a.jsonl", '[{"sentence": "x", "label": "yes"}]\n', "a JSON list, expected an object"),
    ],
)
def test_another_separator_or_shape_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    path = str(tmp_path / name)
    with pytest.raises(UserError) as caught:
        read_examples(Examples(kind="files", task="own", train=path, dev=path))
    assert message in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_short_rows_of_a_csv_are_counted_as_those_of_a_tsv(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("sentence,label\nx,yes\ny\n\nz,no\n")
    assert [row["label"] for _, row in read_example_rows(tmp_path / "a.csv", is_test=False)] == ["yes", "no"]
    assert "1 lines with too few columns, skipped" in capsys.readouterr().err
    test_rows = [row for _, row in read_example_rows(tmp_path / "a.csv", is_test=True)]
    assert [row["label"] for row in test_rows] == ["yes", "", "no"]


def test_an_own_task_in_csv(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, [["sentence", "label"], ["river, stone", "no"], ["a window", "yes"]])
    data = read_examples(Examples(kind="files", task="own", train=str(path), dev=str(path)))
    assert data.labels == ("no", "yes")
    assert data.splits["dev"].texts == ["river, stone", "a window"]


def test_empty_cells_behind_the_last_column_of_a_tsv_are_none(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nx\tyes\t\ny\tno\t\t\n")
    assert [row for _, row in read_example_rows(tmp_path / "a.tsv", is_test=False)] == [
        {"sentence": "x", "label": "yes"},
        {"sentence": "y", "label": "no"},
    ]


def test_quoted_cells_of_a_tsv_are_counted(tmp_path, capsys):
    """As pandas writes them: to_csv(sep="\\t") quotes a text with quotes. They are read as they are."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(
        [["sentence", "label"], ['he said "no"', "x"], ["plain", "y"]]
    )
    (tmp_path / "a.tsv").write_text(buffer.getvalue())
    rows = [row["sentence"] for _, row in read_example_rows(tmp_path / "a.tsv", is_test=False)]
    assert rows == ['"he said ""no"""', "plain"]
    assert "a.tsv: warning: 1 cells are quoted as in a CSV file, expected none" in capsys.readouterr().err
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"yes" or "no"\tx\n"well"\ty\n""wow""\tx\n')
    assert len([*read_example_rows(tmp_path / "a.tsv", is_test=False)]) == 3
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_numbers_with_fractions_are_no_classes(tmp_path, name):
    """transformers' run_glue takes them for a regression; here each would be a class of its own."""
    separator = "\t" if name == "a.tsv" else ","
    path = tmp_path / name

    def read_labels(column, **options):
        rows = [["sentence", "label"], *([f"text {i}", label] for i, label in enumerate(column))]
        path.write_text("".join(separator.join(row) + "\n" for row in rows))
        return read_examples(Examples(kind="files", task="own", train=str(path), dev=str(path), **options))

    with pytest.raises(UserError, match=r"'label' are numbers with fractions, such as 0\.5, expected names"):
        read_labels(["1", "0.5", "2.0"])
    assert read_labels(["1.0", "0.0"]).labels == ("0.0", "1.0")  # as pandas writes 1 and 0 beside a gap
    assert read_labels(["1.5", "2.x"]).labels == ("1.5", "2.x")
    assert read_labels(["1.1", "1.2"], labels=("1.1", "1.2")).labels == ("1.1", "1.2")
    assert read_labels(["1.1", "1.2"], regression=True).labels == ()
