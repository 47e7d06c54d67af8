"""The report of a study as one HTML file."""

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
    mean_score_curve,
    pareto_front,
)
from dwt_jax.study.sweep import FINAL_STEP


def write_study_report(workdir: Path, out: Path | None = None) -> Path:
    """Write report.html, report.md and report.csv of a study.

    Args:
        workdir: directory of the study.
        out: another path ending in .html, or a directory.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: as `collect_study_results` does.
    """
    target = report_path(workdir, out)
    return write_study_results(collect_study_results(workdir), target)


def write_study_results(results: StudyResults, target: Path) -> Path:
    """Write report.html, report.md and report.csv of collected results beside `target`, and return it."""
    renders = {".csv": sweep_tables.study_csv, ".md": sweep_tables.study_markdown, ".html": render_study_html}
    write_report_files(target, {suffix: render(results) for suffix, render in renders.items()})
    return target


def render_study_html(results: StudyResults) -> str:
    """Render the page of a study."""
    parts = [
        f"<h1>{escape(results.study.title)}</h1>",
        f"<p>{results.num_done} of {results.num_jobs} runs are finished.</p>",
        *(f"<p>{escape(line)}</p>" for line in sweep_tables.left_out_lines(results)),
        *(
            f"<p>{escape(sweep_tables.hypothesis_sentence(result, results))}</p>"
            for result in results.hypothesis_results
        ),
        *_curves(results),
        *_quality_figure(results),
        *_pair_figures(results),
        *_checkpoint_score_figures(results),
    ]
    for heading, table, caption in sweep_tables.study_tables(results):
        parts += [f"<h2>{escape(heading)}</h2>", report_html.html_table(table)]
        parts += [f'<p class="muted">{escape(caption)}</p>'] if caption else []
    return report_html.html_document(
        results.study.title, [*parts, f"<p>{escape(sweep_tables.METHOD_NOTE)}</p>"]
    )


def _curves(results: StudyResults) -> list[str]:
    """Plot held-out loss against steps and against FLOPs."""
    by_flops = _lines(results, lambda arm: mean_loss_curve(arm)[1:])
    if not by_flops:
        return []
    size, unit = charts.flop_unit(max(max(line.x) for line in by_flops))
    name = "held-out loss (nats), mean over seeds"
    return [
        "<h2>Held-out loss</h2>",
        report_html.html_figure(
            _lines(results, lambda arm: mean_loss_curve(arm)[::2]),
            ChartAxes("Held-out loss against steps", "steps", name, cut=True),
            "By steps, with the same data.",
        ),
        report_html.html_figure(
            by_flops,
            ChartAxes("Held-out loss against FLOPs", unit, name, x_scale=size, cut=True),
            f"By FLOPs ({unit}), the teacher's forward charged as long as it takes part: the lower and the "
            "further left, the better.",
        ),
    ]


def _quality_figure(results: StudyResults) -> list[str]:
    """Average score against FLOPs: a point an arm, teachers too: their own score can be had for less."""
    points, styles = arm_qualities(results.arms), _styles(results)
    if not points:
        return []
    lines = [
        ChartLine(
            sweep_tables.arm_label(results, point.arm),
            [point.flops],
            [100 * point.score],
            *styles[point.arm],
            spread=[100 * point.spread],
        )
        for point in points
    ]
    size, unit = charts.flop_unit(max(point.flops for point in points))
    axes = ChartAxes(
        "Average score against FLOPs",
        unit,
        sweep_tables.measure_label(AVERAGE_MEASURE),
        x_scale=size,
        decimals=2,
        step_line=tuple((point.flops, 100 * point.score) for point in pareto_front(points)),
    )
    caption = f"By FLOPs ({unit}); bars are the standard deviation over seeds, dashed is the Pareto front."
    return [
        "<h2>Average score</h2>",
        report_html.html_figure(lines, axes, f"{caption} {sweep_tables.PARETO_NOTE}"),
    ]


def _pair_figures(results: StudyResults) -> list[str]:
    """Plot the accuracy on each set of minimal pairs against FLOPs, teachers too."""
    parts = []
    for name in results.study.pairs.names():
        lines = []
        for arm, style in _styles(results).items():
            flops, accuracies = mean_score_curve(results.arms[arm], name)
            if flops:
                percentages = [100 * accuracy for accuracy in accuracies]
                lines.append(ChartLine(sweep_tables.arm_label(results, arm), flops, percentages, *style))
        if lines:
            size, unit = charts.flop_unit(max(max(line.x) for line in lines))
            axes = ChartAxes(
                f"Minimal pairs ({name}) against FLOPs", unit, "accuracy, %", x_scale=size, decimals=1
            )
            parts.append(report_html.html_figure(lines, axes, f"{name}, {unit}. {sweep_tables.PAIRS_NOTE}"))
    return ["<h2>Minimal pairs</h2>", *parts] if parts else []


def _checkpoint_score_figures(results: StudyResults) -> list[str]:
    """Plot scores of fine-tuned checkpoints, next to the paper's figure of the task if it has one."""
    parts = []
    for task in results.study.finetuning.tasks:
        lines = _lines(results, functools.partial(_scores, task))
        if not any(len(line.x) > 1 for line in lines):
            continue
        parts.append(
            report_html.html_figure(
                lines,
                ChartAxes(f"{task} against steps", "steps of pre-training", f"{task}, dev, %", decimals=1),
                f"{task}: fine-tuned checkpoints, mean over seeds.",
            )
        )
        parts += [_paper_curves(results, figure) for figure in PAPER_FIGURES if figure.task == task]
    return ["<h2>Scores by checkpoint</h2>", *parts] if parts else []


def _paper_curves(results: StudyResults, figure: PaperFigure) -> str:
    """Plot the lines of a paper's figure that arms reproduce, in the arms' colours; '' if there are none."""
    styles = _styles(results)
    style_by_paper_arm = {arm.arm.paper: styles[name] for name, arm in reversed([*results.arms.items()])}
    lines = [
        ChartLine(line.label, line.epochs, line.scores, *style_by_paper_arm[line.arm])
        for line in figure.lines
        if line.arm in style_by_paper_arm
    ]
    return report_html.html_figure(
        lines, ChartAxes(figure.source, "epoch", f"{figure.task}, dev", decimals=1), figure.source
    )


def _scores(task: str, arm_results: ArmResults) -> tuple[list[float], list[float]]:
    total_steps = next((run.summary["steps"] for run in arm_results.runs.values()), 0)
    steps, means = [], []
    for step in arm_results.steps(task):
        if values := sweep_tables.values_by_seed(arm_results, task, step):
            steps.append(float(total_steps if step == FINAL_STEP else step))
            means.append(100 * sum(values) / len(values))
    return steps, means


def _lines(
    results: StudyResults, points: Callable[[ArmResults], tuple[Sequence[float], ...]]
) -> list[ChartLine]:
    """Return a line for each student arm, the baseline first."""
    lines = []
    for name, style in _styles(results).items():
        arm = results.arms[name]
        if arm.arm.role == "student":
            x, y = points(arm)
            lines.append(ChartLine(sweep_tables.arm_label(results, name), x, y, *style))
    return [line for line in lines if len(line.x)]


def _styles(results: StudyResults) -> dict[str, tuple[int, int]]:
    """Return (colour, dash) by arm: colour 0 for the baseline, then the other students, then the teachers."""
    arms = [arm.arm for arm in results.arms.values()]
    arms.sort(key=lambda arm: (arm.name != results.study.baseline, arm.role == "teacher"))
    shift = 0 if arms and arms[0].name == results.study.baseline else 1
    colours = charts.COLOURS - 1
    return {
        arm.name: (0 if i == 0 else 1 + (i - 1) % colours, max(0, i - 1) // colours)
        for i, arm in enumerate(arms, start=shift)
    }
