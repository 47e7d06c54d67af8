"""The outcome of a study as one HTML file, and its files written."""

import functools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from dwt_jax.study import charts, report_html, sweep_tables
from dwt_jax.study.charts import Axes, Line
from dwt_jax.study.paper_results import FIGURES, PaperFigure
from dwt_jax.study.report import place, write_all
from dwt_jax.study.results import AVERAGE, Measured, Outcome, curve, front, gather, quality
from dwt_jax.study.sweep import END


def write(workdir: Path, out: Path | None = None) -> Path:
    """report.html, or `out`, and the same as .md and .csv beside it. → the path of the HTML file

    Raises UserError as `gather` does.
    """
    target, outcome = place(workdir, out), gather(workdir)
    renders = {".csv": sweep_tables.csv_text, ".md": sweep_tables.markdown, ".html": html}
    write_all(target, {suffix: render(outcome) for suffix, render in renders.items()})
    return target


def html(outcome: Outcome) -> str:
    found = [
        f"<h1>{escape(outcome.grid.title)}</h1>",
        f"<p>{outcome.done} of {outcome.jobs} runs are done.</p>",
        *(f"<p>{escape(sweep_tables.sentence(judged, outcome))}</p>" for judged in outcome.judged),
        *_curves(outcome),
        *_quality(outcome),
        *_along(outcome),
    ]
    for heading, table, note in sweep_tables.tables(outcome):
        found += [f"<h2>{escape(heading)}</h2>", report_html.table_of(table)]
        found += [f'<p class="muted">{escape(note)}</p>'] if note else []
    return report_html.document(outcome.grid.title, [*found, f"<p>{escape(sweep_tables.METHOD)}</p>"])


def _curves(outcome: Outcome) -> list[str]:
    """Held-out loss against steps and, which is quality against cost, against FLOPs."""
    by_flops = _lines(outcome, lambda arm: curve(arm)[1:])
    if not by_flops:
        return []
    size, unit = charts.flop_unit(max(max(line.x) for line in by_flops))
    name = "held-out loss (nats), mean over seeds"
    return [
        "<h2>Held-out loss</h2>",
        report_html.figure(
            _lines(outcome, lambda arm: curve(arm)[::2]),
            Axes("Held-out loss against steps", "steps", name, cut=True),
            "By steps: the same data seen.",
        ),
        report_html.figure(
            by_flops,
            Axes("Held-out loss against FLOPs", unit, name, x_scale=size, cut=True),
            f"By FLOPs ({unit}), the teacher's forward charged as long as it takes part: the lower and the "
            "further left, the better.",
        ),
    ]


def _quality(outcome: Outcome) -> list[str]:
    """Average score against FLOPs: a point an arm, teachers too: their own score can be had for less."""
    points, styles = quality(outcome.arms), _styles(outcome)
    if not points:
        return []
    lines = [
        Line(
            sweep_tables.label(outcome, one.arm),
            [one.flops],
            [100 * one.score],
            *styles[one.arm],
            spread=[100 * one.spread],
        )
        for one in points
    ]
    size, unit = charts.flop_unit(max(one.flops for one in points))
    axes = Axes(
        "Average score against FLOPs",
        unit,
        sweep_tables.measure_words(AVERAGE),
        x_scale=size,
        decimals=2,
        stairs=tuple((one.flops, 100 * one.score) for one in front(points)),
    )
    caption = f"By FLOPs ({unit}); bars are the standard deviation over seeds, dashed is the Pareto front."
    return ["<h2>Average score</h2>", report_html.figure(lines, axes, f"{caption} {sweep_tables.PRICED}")]


def _along(outcome: Outcome) -> list[str]:
    """Scores of fine-tuned checkpoints, the paper's own figure beside ours where it has one."""
    parts = []
    for task in outcome.grid.finetuning.tasks:
        lines = _lines(outcome, functools.partial(_scores, task))
        if not any(len(line.x) > 1 for line in lines):
            continue
        parts.append(
            report_html.figure(
                lines,
                Axes(
                    f"{task} against steps", "steps of pre-training", f"{task}, dev, hundredths", decimals=1
                ),
                f"{task}: checkpoints fine-tuned, mean over seeds.",
            )
        )
        parts += [_theirs(outcome, figure) for figure in FIGURES if figure.task == task]
    return ["<h2>Fine-tuned along the way</h2>", *parts] if parts else []


def _theirs(outcome: Outcome, figure: PaperFigure) -> str:
    """Of the paper's figure the lines that arms of the study repeat, in the colours of these; '' for none."""
    styles = _styles(outcome)
    mine = {arm.arm.paper: styles[name] for name, arm in reversed([*outcome.arms.items()])}
    lines = [Line(x.label, x.epochs, x.scores, *mine[x.arm]) for x in figure.lines if x.arm in mine]
    return report_html.figure(
        lines, Axes(figure.source, "epoch", f"{figure.task}, dev", decimals=1), figure.source
    )


def _scores(task: str, measured: Measured) -> tuple[list[float], list[float]]:
    total = next((run.summary["steps"] for run in measured.runs.values()), 0)
    kept = [(s, sweep_tables.values(measured, task, s)) for s in measured.steps()]
    points = [(total if s == END else s, 100 * sum(found) / len(found)) for s, found in kept if found]
    return [float(x) for x, _ in points], [y for _, y in points]


def _lines(outcome: Outcome, points: Callable[[Measured], tuple[Sequence[float], ...]]) -> list[Line]:
    """One an arm of students, the baseline first."""
    lines = []
    for name, style in _styles(outcome).items():
        arm = outcome.arms[name]
        if arm.arm.role == "student":
            x, y = points(arm)
            lines.append(Line(sweep_tables.label(outcome, name), x, y, *style))
    return [line for line in lines if len(line.x)]


def _styles(outcome: Outcome) -> dict[str, tuple[int, int]]:
    """(colour, dash) by arm: the baseline in ink, then the other students, then the teachers."""
    arms = [arm.arm for arm in outcome.arms.values()]
    arms.sort(key=lambda arm: (arm.name != outcome.grid.baseline, arm.role == "teacher"))
    shift = 0 if arms and arms[0].name == outcome.grid.baseline else 1
    colours = charts.COLOURS - 1
    return {
        arm.name: (0 if i == 0 else 1 + (i - 1) % colours, max(0, i - 1) // colours)
        for i, arm in enumerate(arms, start=shift)
    }
