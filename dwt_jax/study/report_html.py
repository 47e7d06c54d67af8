"""A report as one HTML file, without scripts or external resources. Text from the runs is escaped."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from dwt_jax.runs.metrics_file import total_flops
from dwt_jax.study import charts, tables
from dwt_jax.study.charts import ChartAxes, ChartLine
from dwt_jax.study.run_records import RunRecord
from dwt_jax.study.tables import ReportTable
from dwt_jax.text_format import format_duration

if TYPE_CHECKING:  # report.py calls this file
    from dwt_jax.study.report import RunComparisonStudy

WIDE, SMALL, PANEL = (1000, 400), (360, 300), (340, 240)  # width and height of the charts in pixels

_LIGHT = """--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--muted:#59636e;--rule:#dfe3e8;
--c0:#1b1f24;--c1:#0b62a4;--c2:#b84a00;--c3:#00795a;--c4:#a3447f;--c5:#2b7fae;--c6:#8a6800;--good:#00694e;--bad:#b03a00"""
_DARK = """--paper:#14171b;--card:#1d2126;--ink:#e8eaed;--muted:#9aa4af;--rule:#333a42;
--c0:#e8eaed;--c1:#6bb6f0;--c2:#ff9a57;--c3:#4fd1a5;--c4:#ee9fcb;--c5:#9be2f0;--c6:#e8c95a;--good:#4fd1a5;--bad:#ff9a57"""
_CSS = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}
@media print{{:root{{color-scheme:light;{_LIGHT}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:1080px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);
overflow-wrap:break-word;
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}}
h1{{font-size:15px;font-weight:600;color:var(--muted);margin:0}}
h2{{font-size:20px;margin:44px 0 10px;line-height:1.3}}h3{{font-size:15px;margin:24px 0 4px}}
p{{margin:8px 0;max-width:80ch}}.headline{{font-size:28px;line-height:1.25;font-weight:700;margin:4px 0 18px}}
.muted,figcaption{{color:var(--muted)}}figcaption{{font-size:13.5px;max-width:90ch;margin-bottom:8px}}
.card{{background:var(--card);border:1px solid var(--rule);border-left:5px solid var(--c);border-radius:6px;
padding:12px 16px;margin:12px 0;break-inside:avoid}}
.card h3{{margin:0 0 2px}}.card p{{margin:4px 0;max-width:none}}
.verdict{{font-weight:700;white-space:nowrap}}.helped{{color:var(--good)}}.harmed{{color:var(--bad)}}
.badge{{font-size:12.5px;border:1px solid currentColor;border-radius:99px;padding:1px 9px;margin-left:6px}}
.undecided,.not{{color:var(--muted)}}
.scroll{{overflow-x:auto;margin:10px 0;border:1px solid var(--rule);border-radius:6px}}
table{{border-collapse:collapse;font-size:13px;width:100%}}
th,td{{padding:6px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
tr:last-child td,tr:last-child th{{border-bottom:0}}
thead th{{color:var(--muted);font-weight:600;vertical-align:bottom}}
tbody th{{font-weight:600;position:sticky;left:0;background:var(--paper);min-width:130px}}
.n{{text-align:right;font-variant-numeric:tabular-nums}}td.n{{white-space:nowrap}}
.base td,.base th{{background:var(--card)!important}}
figure{{margin:20px 0;break-inside:avoid}}.both .small,.both .legend{{display:none}}
.panels{{display:grid;grid-template-columns:repeat(3,1fr);gap:18px}}.panels figure{{margin:6px 0;min-width:0}}
.panels figcaption{{font-weight:600;color:var(--ink);margin-bottom:2px}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;padding:0;margin:8px 0;font-size:13.5px}}
.legend svg{{margin-right:7px;vertical-align:0}}
details{{border:1px solid var(--rule);border-radius:6px;padding:8px 14px;margin:10px 0}}
summary{{cursor:pointer}}
code,pre{{font:12.5px/1.45 ui-monospace,"Liberation Mono",monospace}}pre{{overflow-x:auto;max-height:420px}}
@media screen and (max-width:760px){{
body{{padding:18px 14px 40px}}.headline{{font-size:23px}}tbody th{{max-width:38vw;min-width:30vw}}
.both .wide{{display:none}}.both .small{{display:block}}.both .legend{{display:flex}}
.panels{{grid-template-columns:1fr}}.chart.small{{max-width:560px}}}}
@media print{{
body{{max-width:none;padding:0;font-size:11pt}}h2,h3,figcaption{{break-after:avoid}}tr{{break-inside:avoid}}
.scroll{{overflow:visible;border:0}}table{{font-size:7.5pt}}th,td{{padding:2px 4px}}
tbody th{{position:static;min-width:0}}td.n{{white-space:normal}}
pre{{max-height:none;white-space:pre-wrap}}}}
"""


def render_report_html(study: "RunComparisonStudy") -> str:
    """Render the page of a report on runs."""
    body = [_top(study), _curves(study), _training(study), _tables(study), _downstream(study)]
    body += [_controlled_settings(study), _configs(study)]
    return html_document(study.title, body)


def html_document(title: str, body: Sequence[str]) -> str:
    """Return an HTML document with the given title and parts of the body."""
    # With this policy the browser blocks external resources.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}{charts.CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _top(study: "RunComparisonStudy") -> str:
    parts = [
        f"<h1>{escape(study.title)}</h1>",
        f'<p class="headline">{escape(tables.report_headline(study))}</p>',
    ]
    styles = _styles(study)
    for comparison in study.comparisons:
        findings = "".join(f"<p>{escape(text)}</p>" for text in tables.comparison_findings(comparison, study))
        verdict = comparison.verdict
        parts.append(
            f'<section class="card c{styles[comparison.run.name][0]}"><h3>{escape(comparison.run.label)} '
            f'<span class="badge verdict {verdict}">{verdict}</span></h3>{findings}</section>'
        )
    if study.baseline is None:
        parts.append("<p>No finished run without a teacher to compare with.</p>")
    if study.comparisons:
        parts.append(f"<p>{escape(tables.describe_noise(study))}</p>")
    if study.unfinished or study.left_out:
        items = "; ".join(escape(text) for text in tables.describe_unfinished(study))
        parts.append(f"<p><b>Unfinished or unreadable</b> and not in this report: {items}.</p>")
    return "\n".join(parts)


def _styles(study: "RunComparisonStudy") -> dict[str, tuple[int, int]]:
    """Return (colour, dash) of each student.

    Students without a teacher have colour 0, the baseline solid. Distilled students have the other
    colours, with other dashes once the colours are used up.
    """
    students = [run for run in study.runs if run.role == "student"]
    distilled = [run.name for run in students if run.is_distilled]
    without_teacher = [run.name for run in students if not run.is_distilled and run is not study.baseline]
    colours, dashes = charts.COLOURS - 1, len(charts.DASHES) - 1
    styles = {study.baseline.name: (0, 0)} if study.baseline else {}
    styles |= {name: (1 + i % colours, i // colours) for i, name in enumerate(distilled)}
    styles |= {name: (0, 1 + i % dashes) for i, name in enumerate(without_teacher)}
    return styles


def _lines(
    study: "RunComparisonStudy", points: Callable[[RunRecord], tuple[Sequence[float], Sequence[float]]]
) -> list[ChartLine]:
    """Return a line for each student that has points, the baseline first (drawn on top)."""
    styles = _styles(study)
    students = [run for run in study.runs if run.role == "student"]
    students.sort(key=lambda run: run is not study.baseline)
    lines = [ChartLine(run.label, *points(run), *styles[run.name]) for run in students]
    return [line for line in lines if line.x]


def html_figure(lines: list[ChartLine], axes: ChartAxes, caption: str) -> str:
    """Return a figure with labels at the curves or, on a small screen, a legend."""
    if not lines:
        return ""
    wide, small = charts.svg_chart(lines, axes, *WIDE), charts.svg_chart(lines, axes, *SMALL, direct=False)
    return (
        f'<figure class="both"><figcaption>{escape(caption)}</figcaption>{charts.svg_legend(lines)}'
        f"{wide}{small}</figure>"
    )


def _teacher_losses(study: "RunComparisonStudy") -> tuple[tuple[str, float], ...]:
    """Return reference lines of the teachers' losses, if measured on the same predictions."""
    baseline = study.baseline or next((run for run in study.runs if run.role == "student"), study.runs[0])
    prefixes = ("mlm.", "run.data_digest", "held-out predictions")

    def eval_settings(run: RunRecord) -> dict[str, Any]:
        return {key: value for key, value in run.settings().items() if key.startswith(prefixes)}

    teachers = [
        run for run in study.runs if run.role == "teacher" and eval_settings(run) == eval_settings(baseline)
    ]
    return tuple((f"{run.loss:.3f} {run.label}", run.loss) for run in teachers if math.isfinite(run.loss))


def _curves(study: "RunComparisonStudy") -> str:
    def loss(run: RunRecord) -> list[float]:
        return [record["held_out_loss"] for record in run.evaluations]

    def flops(run: RunRecord) -> list[float]:
        return [total_flops(record) for record in run.evaluations]

    by_steps = _lines(study, lambda run: ([record["step"] for record in run.evaluations], loss(run)))
    by_flops = _lines(study, lambda run: (flops(run), loss(run)))
    size, unit = charts.flop_unit(max((max(line.x) for line in by_flops), default=1.0))
    name, teacher_losses = "held-out loss (nats)", _teacher_losses(study)
    dashed = " The dashed line is the teacher's loss." if teacher_losses else ""
    parts = [
        "<h2>Held-out loss</h2>",
        html_figure(
            by_steps,
            ChartAxes("Held-out loss against steps", "steps", name, reference_lines=teacher_losses, cut=True),
            f"By steps, with the same data.{dashed} The learning rate decays until the last step, so the "
            "end of one curve and the middle of another are not comparable.",
        ),
        _baseline_difference(study),
        html_figure(
            by_flops,
            ChartAxes(
                "Held-out loss against FLOPs",
                unit,
                name,
                x_scale=size,
                reference_lines=teacher_losses,
                cut=True,
            ),
            f"By FLOPs ({unit}): forward and backward pass of the student, and the teacher's forward pass "
            "while it is used. The table of costs includes the training of the teacher.",
        ),
    ]
    return "\n".join(parts)


def _baseline_difference(study: "RunComparisonStudy") -> str:
    if study.baseline is None:
        return ""
    baseline_losses = {record["step"]: record["held_out_loss"] for record in study.baseline.evaluations}

    def difference(run: RunRecord) -> tuple[list[float], list[float]]:
        if run is study.baseline:
            return [], []
        common = [record for record in run.evaluations if record["step"] in baseline_losses]
        steps = [record["step"] for record in common]
        return steps, [record["held_out_loss"] - baseline_losses[record["step"]] for record in common]

    lines = [line for line in _lines(study, difference) if len(line.x) > 1]
    band = study.noise.value if study.noise else 0.0
    axes = ChartAxes(
        "Difference to the baseline against steps",
        "steps",
        "minus the baseline",
        reference_lines=((f"{study.baseline.label}", 0.0),),
        band=band,
        cut=True,
        signed=True,
        decimals=4,
    )
    band_caption = " The grey band is the seed noise at the end of training." if band else ""
    return html_figure(
        lines,
        axes,
        f"The same as the difference to the baseline: below the dashed line is better.{band_caption}",
    )


def _training(study: "RunComparisonStudy") -> str:
    """Small charts of the training losses."""

    def series(key: str, with_teacher: bool) -> Callable[[RunRecord], tuple[list[float], list[float]]]:
        def points(run: RunRecord) -> tuple[list[float], list[float]]:
            records = [
                record
                for record in run.metrics
                if record.get(key) is not None and (not with_teacher or record.get("teacher_hard_loss"))
            ]
            return charts.downsample([r["step"] for r in records], [r[key] for r in records])

        return points

    def weights(run: RunRecord) -> tuple[list[float], list[float]]:
        records = run.metrics if run.is_distilled else []
        return [r["step"] for r in records], [r["alpha_soft"] for r in records]

    panels = (
        ("Hard loss", "nats", _lines(study, series("hard_loss", False)), True),
        ("Soft loss at temperature 1", "nats", _lines(study, series("soft_loss_at_1", True)), True),
        ("Weight of the soft loss, α soft", "", _lines(study, weights), False),
    )
    figures = []
    for title, unit, lines, cut in panels:
        axes = ChartAxes(f"{title} against steps", "steps", unit, cut=cut, from_zero=not cut)
        svg = charts.svg_chart(lines, axes, *PANEL, direct=False)
        if svg:
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>")
    if not figures:
        return ""
    legend_lines = _lines(study, lambda run: ([1.0], [1.0]) if run.metrics else ([], []))
    return (
        "<h2>Training losses</h2><p>Averages of neighbouring logged steps. Hard loss: cross-entropy of the "
        "predicted tokens; soft loss: divergence from the teacher, while the teacher is used.</p>"
        f'{charts.svg_legend(legend_lines)}<div class="panels">{"".join(figures)}</div>'
    )


def html_table(table: ReportTable, highlight: str | None = None) -> str:
    """Render a table. `highlight`: first cell of the row to emphasize."""

    def cell(i: int, text: str) -> str:
        verdict = f"verdict {text}" if text in tables.VERDICTS else ""
        name = " ".join(filter(None, (verdict, "n" if i >= table.text_columns else "")))
        tag = "th" if i == 0 else "td"
        return f'<{tag} class="{name}">{escape(text)}</{tag}>' if name else f"<{tag}>{escape(text)}</{tag}>"

    head = "".join(
        f'<th scope="col"{" class=n" if i >= table.text_columns else ""}>{escape(text)}</th>'
        for i, text in enumerate(table.header)
    )
    rows = "".join(
        f"<tr{' class=base' if row[0] == highlight else ''}>{''.join(map(cell, itertools.count(), row))}</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _tables(study: "RunComparisonStudy") -> str:
    highlight = study.baseline.label if study.baseline else None
    return (
        f"<h2>Results</h2>{html_table(tables.run_results_table(study), highlight)}"
        '<p class="muted">Losses in nats per predicted token of the held-out documents, the same tokens '
        "for every run; s.e.: standard error over documents. vs. baseline: below 0 is better.</p>"
        f"<h2>Costs</h2>{html_table(tables.costs_table(study), highlight)}"
        '<p class="muted">FLOPs are computed from the shapes, matrix products only. The training of the '
        "teacher counts once for any number of students, and not at all if the teacher exists already. "
        "Seconds are those of the process that finished the run; tokens/s is the median over the logged "
        "steps.</p>"
    )


def _downstream(study: "RunComparisonStudy") -> str:
    if not study.downstream:
        return ""
    highlight = study.baseline.label if study.baseline else None
    return (
        f"<h2>Fine-tuning</h2>{html_table(tables.downstream_table(study), highlight)}"
        f'<p class="muted">{tables.DOWNSTREAM_NOTE}</p>'
    )


def _controlled_settings(study: "RunComparisonStudy") -> str:
    parts = ["<h2>Controlled settings</h2>"]
    if any(run.role == "student" for run in study.runs):
        parts.append(html_table(tables.controlled_settings_table(study)))
    parts.append(
        "<p>Runs with equal seeds have the same data order and predicted tokens and, unless they are grown "
        "from another model, the same initial parameters, so that they differ only in the objective. "
        "The paired standard error covers the choice of held-out documents, the noise the choice of seeds; "
        "neither covers other sizes, data or lengths of training. Held-out loss is not the quality after "
        "fine-tuning.</p>"
    )
    rows = [
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in _environment(study).items()
    ]
    parts.append(
        f'<h2>Environment</h2><div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return "\n".join(parts)


def _environment(study: "RunComparisonStudy") -> dict[str, str]:
    def values_of(get_value: Callable[[RunRecord], str]) -> str:
        labels_by_value: dict[str, list[str]] = {}
        for run in study.runs:
            labels_by_value.setdefault(get_value(run), []).append(run.label)
        if len(labels_by_value) == 1:
            return next(iter(labels_by_value))
        return "; ".join(f"{value} ({', '.join(labels)})" for value, labels in labels_by_value.items())

    duration = format_duration(study.seconds) if study.seconds else ""
    environment = {"command": study.command, "total time": duration}
    environment["device"] = values_of(lambda run: run.summary.get("device", "unknown"))
    environment["versions"] = values_of(
        lambda run: ", ".join(f"{k} {v}" for k, v in run.summary.get("versions", {}).items())
    )
    environment["data digest"] = values_of(lambda run: run.identity.get("data_digest", "unknown"))
    return {name: value for name, value in environment.items() if value}


def _configs(study: "RunComparisonStudy") -> str:
    parts = ["<h2>Configs</h2>"]
    for run in study.runs:
        kind = "baseline" if run is study.baseline else run.role
        parts.append(
            f'<h3>{escape(run.label)}</h3><p class="muted"><code>{escape(run.name)}</code>: {kind}</p>'
        )
        if study.baseline and run is not study.baseline:
            table = tables.differences_table(run, study.baseline)
            parts.append(html_table(table) if table.rows else "<p>Same config as the baseline.</p>")
        config = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>Resolved config</summary><pre>{config}</pre></details>")
    return "\n".join(parts)
