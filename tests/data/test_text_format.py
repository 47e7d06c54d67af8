"""What is no plain text is recognised, and plain text is not taken for anything else."""

import json

import pytest

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.sources import iter_documents
from dwt_jax.data.text_format import recognise_format
from dwt_jax.data.tokenizer_training import take_megabytes
from helpers.paths import ROOT

ROWS = [(f"The cat, no. {i}, sat; it was\tgrey" + i % 3 * ", or so;\t" + ".", "neutral") for i in range(40)]
HTML = "".join(f"<p class='x'>{text}</p>\n" for text, _ in ROWS)


def table(separator):
    cells = (f'{i}{separator}"{text}"{separator}{label}' for i, (text, label) in enumerate(ROWS))
    return "\n".join([f"index{separator}sentence{separator}label", *cells])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (table(","), "100% of its lines have 3 cells between commas"),
        (table(";"), "100% of its lines have 3 cells between semicolons"),
        (table("\t"), "100% of its lines have 3 cells between tabs"),
        (table("|"), "100% of its lines have 3 cells between bars"),
        (
            f"<!DOCTYPE html>\n<html><body>{HTML}</body></html>",
            "% of its characters are tags such as \"<p class='x'>\"",
        ),
        (
            f"<?xml version='1.0'?>\n<doc:set>{HTML.replace('p', 'd:p')}</doc:set>",
            "% of its characters are tags such as \"<d:p class='x'>\"",
        ),
        (
            json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=1),
            "% of its lines are of JSON",
        ),
        (json.dumps([text for text, _ in ROWS], indent=1), "% of its lines are of JSON"),
    ],
    ids=range(8),
)
def test_other_formats_are_recognised(text, found):
    assert found in recognise_format(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n".join(text for text, _ in ROWS[:5]),
        "\n".join(f"He said: 5 < 6 and 7 > {i}; if a<b then c>d." + i % 3 * "so;" for i in range(40)),
        "\n".join(f"Line {i} of a poem, with one comma" if i % 4 else "and one without" for i in range(40)),
        "\n".join(f'"Is it {i}?" she asked.\n"No."' for i in range(40)),
        "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))),
        '"' + "x" * 200_000,
    ],
    ids=range(7),
)
def test_plain_text_is_nothing_else(text):
    assert recognise_format(text) == ""


def test_the_built_in_corpus_is_plain_text():
    text = "\n".join(take_megabytes(iter_documents(Source(kind="builtin")), 1))
    assert recognise_format(text) == ""


def test_prepare_prints_what_it_found(tmp_path, log_lines):
    (tmp_path / "page.html").write_text(HTML)
    source = Source(kind="text", path=str(tmp_path / "page.html"), documents="log_lines")
    data = Data(
        sources=(source,), tokenizer=Tokenizer(vocab_size=200), sequence_length=32, validation_fraction=0.2
    )
    prepare_data(data, tmp_path / "rows", workers=1)
    (warning,) = (line for line in log_lines if "are tags" in line)
    assert warning.startswith("prepare: source 0 (text): warning: ")
    assert warning.endswith("of its characters are tags such as \"<p class='x'>\"; it is read as plain text")
