"""A report on runs or on a study: its parts, and its HTML, Markdown and CSV files.

run_report.py and study_report.py fill it in; the page is templates/report.html.j2.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write
from dwt_jax.study.charts import (
    INK,
    LINE_COLOURS,
    MUTED,
    RULE,
    Chart,
    chart_svg,
    file_names,
    write_chart_files,
)
from dwt_jax.study.statistics import Verdict


class Record(NamedTuple):
    """A row of the tidy table of results: a measure of a run at a step."""

    arm: str  # of a study, or the name of a run
    seed: int
    step: int | str  # or 'end'
    measure: str
    finetuning_seed: int | str  # or ''
    value: float


class Table(NamedTuple):
    """A table of strings."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1  # the first columns that are text; the others are numbers
    highlight: str | None = None  # first cell of the row to emphasize


class Finding(NamedTuple):
    """The verdict on a run."""

    label: str
    verdict: Verdict
    text: Sequence[str]  # sentences
    colour: int  # of the run's curves


class Items(NamedTuple):
    """A list of sentences, one item each."""

    texts: Sequence[str]


class Remark(NamedTuple):
    """A remark on the part above it."""

    text: str


class Details(NamedTuple):
    """A long text that opens on a click. Only the HTML page has it."""

    summary: str
    text: str


Part = str | Table | Finding | Items | Remark | Details | Chart


class Section(NamedTuple):
    """A heading ('' for none) and the parts below it. A section without parts is not shown."""

    heading: str
    parts: Sequence[Part]
    level: int = 2


class Report(NamedTuple):
    """The content of a report."""

    title: str
    headline: str  # '' for none
    sections: Sequence[Section]
    records: Sequence[Record]


def report_path(workdir: Path, out: Path | None) -> Path:
    """Return the path of the HTML file. Raises UserError for another suffix."""
    target = workdir / "report.html" if out is None else out
    if target.is_dir():
        target = target / "report.html"
    if target.suffix != ".html":
        raise UserError(f"--out: {target}, expected a name that ends in .html, or a directory")
    return target


def write_report(report: Report, target: Path, chart_files: bool = True) -> Path:
    """Write a report and replace an earlier one.

    Args:
        report: its contents.
        target: path of the HTML file; NAME.md and NAME.csv are written beside it.
        chart_files: write each chart as PDF and PNG too, in charts/ beside report.html, and in NAME-charts/
            beside another NAME.html. This takes a third of a second per chart.

    Returns:
        `target`.
    """
    directory = target.with_name("charts" if target.stem == "report" else f"{target.stem}-charts")
    target.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        ".csv": records_csv(report.records),
        ".md": report_markdown(report, directory.name if chart_files else ""),
        ".html": report_html(report),
    }
    for suffix, text in texts.items():
        with atomic_write(target.with_suffix(suffix)) as partial:
            partial.write_text(text, encoding="utf-8")
    if chart_files:
        write_chart_files(_charts(report), directory)
    return target


def _charts(report: Report) -> list[Chart]:
    return [part for section in report.sections for part in section.parts if isinstance(part, Chart)]


def report_html(report: Report) -> str:
    """Render a report as one page without scripts or external resources. Text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dwt_jax.study"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    for part_type in (Table, Finding, Items, Remark, Details, Chart):
        environment.tests[part_type.__name__] = lambda part, part_type=part_type: isinstance(part, part_type)
    environment.filters["svg"] = lambda chart, small: Markup(chart_svg(chart, small))
    colours = {"muted": MUTED, "rule": RULE, "ink": INK}
    colours |= {f"c{i}": colour for i, colour in enumerate(LINE_COLOURS)}
    return environment.get_template("report.html.j2").render(
        report=report, colours=colours, verdicts=list(Verdict)
    )


def report_markdown(report: Report, chart_directory: str = "") -> str:
    """Render a report as Markdown, with its charts if they are in `chart_directory`."""
    blocks = [f"# {escape_markdown(report.title)}", escape_markdown(report.headline)]
    chart_names = iter(file_names(_charts(report)))
    for section in report.sections:
        has_heading = section.heading and section.parts
        blocks.append(f"{'#' * section.level} {escape_markdown(section.heading)}" if has_heading else "")
        for part in section.parts:
            match part:
                case Table():
                    blocks.append(markdown_table(part))
                case Finding(label, verdict, sentences):
                    text = escape_markdown(" ".join(sentences))
                    blocks.append(f"* **{escape_markdown(label)}: {verdict}.** {text}")
                case Items(texts):
                    blocks.append("\n".join(f"* {escape_markdown(text)}" for text in texts))
                case Chart() if chart_directory:
                    link = quote(f"{chart_directory}/{next(chart_names)}.png")
                    blocks += [f"![{escape_markdown(part.title)}]({link})", escape_markdown(part.caption)]
                case str() | Remark():
                    blocks.append(escape_markdown(part if isinstance(part, str) else part.text))
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape_markdown(text: str) -> str:
    """Escape Markdown, HTML and the ends of table cells in a text."""
    text = "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(table: Table) -> str:
    """Render a table as Markdown."""
    rules = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    rows = [map(escape_markdown, table.header), rules, *(map(escape_markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def records_csv(records: Sequence[Record]) -> str:
    """Render the tidy table as CSV: unrounded, in FLOPs, nats and shares from 0 to 1."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Record._fields, *records])
    return text.getvalue()
