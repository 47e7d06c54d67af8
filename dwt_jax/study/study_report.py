"""The report on a study: its sentences and charts, as files and for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from dwt_jax.study.charts import Chart, ChartLine, finite_charts, flop_chart, line_styles
from dwt_jax.study.curves import curve_records, loss_charts
from dwt_jax.study.paper_results import PAPER_FIGURES, PaperFigure
from dwt_jax.study.report import Items, Record, Remark, Report, Section
from dwt_jax.study.results import (
    AVERAGE_MEASURE,
    ArmResults,
    HypothesisResult,
    StudyResults,
    arm_qualities,
    mean_evaluations,
    mean_score_curve,
    pareto_front,
)
from dwt_jax.study.study_tables import (
    PARETO_NOTE,
    arm_label,
    arm_results_table,
    format_guesses,
    format_interval,
    measure_label,
    study_tables,
)
from dwt_jax.study.sweep import FINAL_STEP
from dwt_jax.text_format import format_table

METHOD_NOTE = (
    "± is the standard deviation over seeds. Intervals are 95 % confidence intervals of the difference to "
    "the given arm, paired by seed: first a percentile bootstrap over seeds and, within them, held-out "
    "documents, fine-tuning seeds or paradigms of minimal pairs (2000 replicates; documents and paradigms "
    "are the same for all seeds), then Student's t over the seeds' means. A hypothesis is confirmed or "
    "contradicted only if both are on one side of 0. The intervals do not cover other corpora or sizes, nor, "
    "if all seeds of a student have the same teacher, other teachers. Scores of tasks are those of the last "
    "epoch on the dev sets; no epoch was chosen on them. With many comparisons some intervals exclude 0 by "
    "chance: one in twenty for Student's t, more for the bootstrap, which is too narrow with few seeds."
)
PAIRS_NOTE = (
    "Accuracy without fine-tuning, a mean over paradigms; chance is 50 %. FLOPs include the teacher's "
    "forward pass while it is used. Better is higher and further left."
)


def study_report(results: StudyResults) -> Report:
    """Build the report on a study."""
    sentences = [hypothesis_sentence(result, results) for result in results.hypothesis_results]
    progress = f"{results.num_done} of {results.num_jobs} runs are finished."
    charts = {
        "Held-out loss": _loss_charts(results),
        "Average score": _quality_charts(results),
        "Minimal pairs": _pair_charts(results),
        "Scores by checkpoint": _checkpoint_charts(results),
    }
    tables = [
        Section(heading, [table, *([Remark(caption)] if caption else [])])
        for heading, table, caption in study_tables(results)
    ]
    sections = [
        Section("", [progress, *map(Items, filter(None, (left_out_lines(results), sentences)))]),
        *(Section(heading, finite_charts(drawings)) for heading, drawings in charts.items()),
        *tables,
        Section("", [METHOD_NOTE]),
    ]
    return Report(results.study.title, "", sections, list(_records(results)))


def hypothesis_sentence(result: HypothesisResult, results: StudyResults) -> str:
    """Describe the verdict on a hypothesis in a sentence."""
    hypothesis = result.hypothesis
    paper = f" (paper: {hypothesis.paper})" if hypothesis.paper else ""
    if result.interval is None:
        return f"{hypothesis.text}{paper}: not run at this scale, or without comparable runs."
    against = arm_label(results, hypothesis.against or results.study.baseline)
    seeds = f"{result.interval.seeds} seed{'s' * (result.interval.seeds > 1)}"
    at = "" if hypothesis.at == 1 else f" after {hypothesis.at:.0%} of the steps"
    return (
        f"{hypothesis.text}{paper}: {result.verdict} at this scale. "
        f"{arm_label(results, hypothesis.arm)} vs. {against}, {measure_label(hypothesis.measure)}{at}: "
        f"{format_interval(result.interval, hypothesis.measure)}, {seeds}."
    )


def _styles(results: StudyResults) -> dict[str, tuple[int, int]]:
    """Return (colour, dash) by arm, the baseline first, then the other students, then the teachers."""
    arms = sorted((arm.arm for arm in results.arms.values()), key=lambda arm: arm.role == "teacher")
    baseline = results.study.baseline if results.study.baseline in results.arms else None
    return line_styles(baseline, [arm.name for arm in arms if arm.name != baseline])


def _lines(
    results: StudyResults,
    points: Callable[[ArmResults], tuple[Sequence[float], Sequence[float]]],
    roles: Sequence[str] = ("student",),
) -> list[ChartLine]:
    """Return a line for each arm that has points, the baseline first."""
    lines = [
        ChartLine(arm_label(results, name), *points(results.arms[name]), *style)
        for name, style in _styles(results).items()
        if results.arms[name].arm.role in roles
    ]
    return [line for line in lines if line.x]


def _loss_charts(results: StudyResults) -> list[Chart]:
    """Plot the held-out loss of the students."""
    captions = (
        "By steps, with the same data.",
        "By FLOPs (UNIT), including the teacher's forward pass while it is used. Better is lower and further "
        "left.",
    )
    curves = [
        (arm_label(results, name), mean_evaluations(results.arms[name]), style)
        for name, style in _styles(results).items()
        if results.arms[name].arm.role == "student"
    ]
    return loss_charts(curves, "held-out loss (nats), mean over seeds", captions)


def _quality_charts(results: StudyResults) -> list[Chart]:
    """Plot the average score against FLOPs, one point per arm."""
    points, styles = arm_qualities(results.arms), _styles(results)
    lines = []
    for point in points:
        x, y, spread = [point.flops], [100 * point.score], [100 * point.spread]
        lines.append(ChartLine(arm_label(results, point.arm), x, y, *styles[point.arm], spread=spread))
    front = [(point.flops, 100 * point.score) for point in pareto_front(points)]
    caption = (
        "By FLOPs (UNIT). Bars are the standard deviation over seeds; the dashed line is the Pareto front."
    )
    title, measure = "Average score against FLOPs", measure_label(AVERAGE_MEASURE)
    return [flop_chart(title, lines, measure, f"{caption} {PARETO_NOTE}", decimals=2, step_line=front)]


def _pair_charts(results: StudyResults) -> list[Chart]:
    """Plot the accuracy on each set of minimal pairs against FLOPs, teachers too."""
    charts = []
    for name in results.study.pairs.names():

        def points(arm: ArmResults, name: str = name) -> tuple[list[float], list[float]]:
            flops, accuracies = mean_score_curve(arm, name)
            return flops, [100 * accuracy for accuracy in accuracies]

        lines = _lines(results, points, roles=("student", "teacher"))
        title, caption = f"Minimal pairs ({name}) against FLOPs", f"{name}, UNIT. {PAIRS_NOTE}"
        charts.append(flop_chart(title, lines, "accuracy, %", caption, decimals=1))
    return charts


def _checkpoint_charts(results: StudyResults) -> list[Chart]:
    """Plot scores of fine-tuned checkpoints, next to the paper's figures of the task if it has any."""
    charts = []
    for task in results.study.finetuning.tasks:

        def points(arm: ArmResults, task: str = task) -> tuple[list[float], list[float]]:
            end = next((run.summary["steps"] for run in arm.runs.values()), 0)
            means = {step: [row.mean for row in arm.at(task, step).values()] for step in arm.steps(task)}
            steps = [float(end if step == FINAL_STEP else step) for step in means]
            return steps, [100 * sum(values) / len(values) for values in means.values()]

        lines = _lines(results, points)
        if any(len(line.x) > 1 for line in lines):
            caption = f"{task}: fine-tuned checkpoints, mean over seeds."
            labels = ("steps of pre-training", f"{task}, dev, %", caption)
            charts.append(Chart(f"{task} against steps", lines, *labels, decimals=1))
            charts += [_paper_chart(results, figure) for figure in PAPER_FIGURES if figure.task == task]
    return charts


def _paper_chart(results: StudyResults, figure: PaperFigure) -> Chart:
    """Plot the lines of a paper's figure that arms reproduce, in the arms' colours."""
    styles = _styles(results)
    style_by_paper_arm = {arm.arm.paper: styles[name] for name, arm in reversed([*results.arms.items()])}
    lines = [
        ChartLine(line.label, line.epochs, line.scores, *style_by_paper_arm[line.arm])
        for line in figure.lines
        if line.arm in style_by_paper_arm
    ]
    title = f"{figure.source}: {figure.task}"
    return Chart(title, lines, "epoch", f"{figure.task}, dev", figure.source, decimals=1)


def _records(results: StudyResults) -> Iterator[Record]:
    """Yield the tidy table: the curves of the losses, final losses and scores.

    Of a set of minimal pairs there is the mean over paradigms.
    """
    for name, arm in results.arms.items():
        for seed, run in arm.runs.items():
            yield from curve_records(name, seed, run.evaluations)
            yield Record(name, seed, "end", "total_flops", "", run.summary["flops"]["total"])
        for row in arm.measurements:
            step = "end" if row.step == FINAL_STEP else row.step
            if row.is_by_paradigm or row.documents is not None:
                yield Record(name, row.seed, step, row.measure, "", row.mean)
            else:
                for i, score in enumerate(row.scores):
                    yield Record(name, row.seed, step, row.measure, i, score)


def left_out_lines(results: StudyResults) -> list[str]:
    """Return a line for each job that failed, depends on a failed job, or has unreadable files."""
    return [f"{name} is left out: {reason}" for name, reason in results.left_out.items()]


def study_lines(results: StudyResults) -> list[str]:
    """Return the results as lines for a terminal."""
    table = arm_results_table(results)
    lines = [*format_table([table.header, *table.rows]), *left_out_lines(results)]
    return [*lines, *masked_words_lines(results)]


def masked_words_lines(results: StudyResults) -> list[str]:
    """Return masked words and the predictions of some arms as lines for a terminal."""
    lines = []
    for record in results.masked_words:
        lines += ["", f"… {record['text']} …   ({record['word']})"]
        guesses = [
            (f"  {arm_label(results, name)}", format_guesses(guesses))
            for name, guesses in record["guesses"].items()
        ]
        lines += format_table(guesses)
    return lines
