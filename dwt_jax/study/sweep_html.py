"""The outcome of a study as one HTML file, and its files written."""

import functools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from dwt_jax.study import charts, report_html, sweep_tables
from dwt_jax.study.charts import ChartAxes, ChartLine
from dwt_jax.study.paper_results import PAPER_FIGURES, PaperFigure
from dwt_jax.study.report import report_path, write_report_files
from dwt_jax.study.results import (
    AVERAGE_MEASURE,
    ArmResults,
    StudyResults,
    arm_qualities,
    collect_study_results,
    mean_loss_curve,
    pareto_front,
)
from dwt_jax.study.sweep import FINAL_STEP


def write_study_report(workdir: Path, out: Path | None = None) -> Path:
    """report.html, or `out`, and the same as .md and .csv beside it. → the path of the HTML file

    Raises UserError as `gather` does.
    """
    target, outcome = report_path(workdir, out), collect_study_results(workdir)
    renders = {".csv": sweep_tables.study_csv, ".md": sweep_tables.study_markdown, ".html": render_study_html}
    write_report_files(target, {suffix: render(outcome) for suffix, render in renders.items()})
    return target


def render_study_html(outcome: StudyResults) -> str:
    found = [
        f"<h1>{escape(outcome.grid.title)}</h1>",
        f"<p>{outcome.done} of {outcome.jobs} runs are done.</p>",
        *(
            f"<p>{escape(sweep_tables.hypothesis_sentence(judged, outcome))}</p>"
            for judged in outcome.hypothesis_results
        ),
        *_curves(outcome),
        *_quality_figure(outcome),
        *_checkpoint_score_figures(outcome),
    ]
    for heading, table, note in sweep_tables.study_tables(outcome):
        found += [f"<h2>{escape(heading)}</h2>", report_html.html_table(table)]
        found += [f'<p class="muted">{escape(note)}</p>'] if note else []
    return report_html.html_document(
        outcome.grid.title, [*found, f"<p>{escape(sweep_tables.METHOD_NOTE)}</p>"]
    )


def _curves(outcome: StudyResults) -> list[str]:
    """Held-out loss against steps and, which is quality against cost, against FLOPs."""
    by_flops = _lines(outcome, lambda arm: mean_loss_curve(arm)[1:])
    if not by_flops:
        return []
    size, unit = charts.flop_unit(max(max(line.x) for line in by_flops))
    name = "held-out loss (nats), mean over seeds"
    return [
        "<h2>Held-out loss</h2>",
        report_html.html_figure(
            _lines(outcome, lambda arm: mean_loss_curve(arm)[::2]),
            ChartAxes("Held-out loss against steps", "steps", name, cut=True),
            "By steps: the same data seen.",
        ),
        report_html.html_figure(
            by_flops,
            ChartAxes("Held-out loss against FLOPs", unit, name, x_scale=size, cut=True),
            f"By FLOPs ({unit}), the teacher's forward charged as long as it takes part: the lower and the "
            "further left, the better.",
        ),
    ]


def _quality_figure(outcome: StudyResults) -> list[str]:
    """Average score against FLOPs: a point an arm, teachers too: their own score can be had for less."""
    points, styles = arm_qualities(outcome.arms), _styles(outcome)
    if not points:
        return []
    lines = [
        ChartLine(
            sweep_tables.arm_label(outcome, one.arm),
            [one.flops],
            [100 * one.score],
            *styles[one.arm],
            spread=[100 * one.spread],
        )
        for one in points
    ]
    size, unit = charts.flop_unit(max(one.flops for one in points))
    axes = ChartAxes(
        "Average score against FLOPs",
        unit,
        sweep_tables.measure_label(AVERAGE_MEASURE),
        x_scale=size,
        decimals=2,
        step_line=tuple((one.flops, 100 * one.score) for one in pareto_front(points)),
    )
    caption = f"By FLOPs ({unit}); bars are the standard deviation over seeds, dashed is the Pareto front."
    return [
        "<h2>Average score</h2>",
        report_html.html_figure(lines, axes, f"{caption} {sweep_tables.PARETO_NOTE}"),
    ]


def _checkpoint_score_figures(outcome: StudyResults) -> list[str]:
    """Scores of fine-tuned checkpoints, the paper's own figure beside ours where it has one."""
    parts = []
    for task in outcome.grid.finetuning.tasks:
        lines = _lines(outcome, functools.partial(_scores, task))
        if not any(len(line.x) > 1 for line in lines):
            continue
        parts.append(
            report_html.html_figure(
                lines,
                ChartAxes(
                    f"{task} against steps", "steps of pre-training", f"{task}, dev, hundredths", decimals=1
                ),
                f"{task}: checkpoints fine-tuned, mean over seeds.",
            )
        )
        parts += [_paper_curves(outcome, figure) for figure in PAPER_FIGURES if figure.task == task]
    return ["<h2>Fine-tuned along the way</h2>", *parts] if parts else []


def _paper_curves(outcome: StudyResults, figure: PaperFigure) -> str:
    """Of the paper's figure the lines that arms of the study repeat, in the colours of these; '' for none."""
    styles = _styles(outcome)
    mine = {arm.arm.paper: styles[name] for name, arm in reversed([*outcome.arms.items()])}
    lines = [ChartLine(x.label, x.epochs, x.scores, *mine[x.arm]) for x in figure.lines if x.arm in mine]
    return report_html.html_figure(
        lines, ChartAxes(figure.source, "epoch", f"{figure.task}, dev", decimals=1), figure.source
    )


def _scores(task: str, measured: ArmResults) -> tuple[list[float], list[float]]:
    total = next((run.summary["steps"] for run in measured.runs.values()), 0)
    kept = [(s, sweep_tables.values_by_seed(measured, task, s)) for s in measured.steps()]
    points = [(total if s == FINAL_STEP else s, 100 * sum(found) / len(found)) for s, found in kept if found]
    return [float(x) for x, _ in points], [y for _, y in points]


def _lines(
    outcome: StudyResults, points: Callable[[ArmResults], tuple[Sequence[float], ...]]
) -> list[ChartLine]:
    """One an arm of students, the baseline first."""
    lines = []
    for name, style in _styles(outcome).items():
        arm = outcome.arms[name]
        if arm.arm.role == "student":
            x, y = points(arm)
            lines.append(ChartLine(sweep_tables.arm_label(outcome, name), x, y, *style))
    return [line for line in lines if len(line.x)]


def _styles(outcome: StudyResults) -> dict[str, tuple[int, int]]:
    """(colour, dash) by arm: the baseline in ink, then the other students, then the teachers."""
    arms = [arm.arm for arm in outcome.arms.values()]
    arms.sort(key=lambda arm: (arm.name != outcome.grid.baseline, arm.role == "teacher"))
    shift = 0 if arms and arms[0].name == outcome.grid.baseline else 1
    colours = charts.COLOURS - 1
    return {
        arm.name: (0 if i == 0 else 1 + (i - 1) % colours, max(0, i - 1) // colours)
        for i, arm in enumerate(arms, start=shift)
    }
