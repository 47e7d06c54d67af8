"""The tables of the report on a study."""

import math
from collections.abc import Sequence

import numpy as np

from dwt_jax.study.curves import TargetCrossing
from dwt_jax.study.paper_results import PAPER_TABLE_1
from dwt_jax.study.report import Table
from dwt_jax.study.results import (
    AVERAGE_MEASURE,
    LOSS_MEASURE,
    LOSS_MEASURES,
    OUT_OF_DOMAIN_MEASURE,
    ArmResults,
    StudyResults,
    arm_qualities,
    flops_to_target,
    paired_difference,
    paired_measurements,
    pareto_front,
)
from dwt_jax.study.statistics import Interval
from dwt_jax.study.sweep import FINAL_STEP
from dwt_jax.text_format import format_float

PAPER_NOTE = (
    "The last two columns are the paper's table 1 (Lee et al. 2023, arXiv 2305.18239), not our results: "
    "one run per arm, average over nine GLUE tasks, hidden size 768, 30M sentences, 20 epochs. For other "
    "tasks or another scale, order and sign of the changes are comparable, absolute scores are not."
)
PARETO_NOTE = (
    "Means over seeds at the end of pre-training. FLOPs include the student and the teacher's forward pass, "
    "but not the teacher's training. An arm is on the Pareto front if no other arm has a mean score at least "
    "as high for fewer FLOPs, or a higher one for as many; seed variance is not considered."
)
BAG_OF_WORDS_LABEL = "no model: logistic regression on bags of words"
MASKED_WORDS_NOTE = "The three most probable tokens where one word was masked, by the runs of the first seed."


def measure_label(measure: str) -> str:
    """Return the name and unit of a measure."""
    return {
        LOSS_MEASURE: "held-out loss (nats)",
        OUT_OF_DOMAIN_MEASURE: "out-of-domain loss (nats)",
        AVERAGE_MEASURE: "average over tasks (%)",
    }.get(measure, f"{measure} (%)")


def format_interval(interval: Interval, measure: str) -> str:
    """Format an interval: '−0.0123 [−0.02, −0.01; t −0.03, +0.01]'."""
    unit, digits = (1.0, 4) if measure in LOSS_MEASURES else (100.0, 2)

    def format_value(value: float) -> str:  # not finite for a diverged run
        return format_float(value * unit, digits, signed=True) if np.isfinite(value) else "nan"

    mean, low, high, t_low, t_high = map(format_value, interval[:5])
    t_interval = f"; t {t_low}, {t_high}" if interval.seeds > 1 else "; one seed"
    return f"{mean} [{low}, {high}{t_interval}]"


def arm_label(results: StudyResults, name: str) -> str:
    """Return the label of an arm, its name by default."""
    return results.arms[name].arm.label or name


def arm_results_table(results: StudyResults) -> Table:
    """Tabulate final losses and scores, a row per arm, with the differences to the baseline."""
    measures = [LOSS_MEASURE, *_measures(results)]
    compared = (*LOSS_MEASURES, AVERAGE_MEASURE, *results.study.pairs.names())
    header = ["arm", "seeds"]
    for measure in measures:
        header += [measure_label(measure), "vs. baseline"] if measure in compared else [measure]
    rows = []
    for name, arm_results in results.arms.items():
        row = [arm_label(results, name), str(len(arm_results.runs))]
        for measure in measures:
            row.append(_mean(_values(arm_results, measure), measure))
            if measure in compared:
                row.append(_vs_baseline(results, name, measure))
        rows.append(row)
    if any(task in results.bag_of_words for task in measures):
        cells = {task: f"{100 * score:.2f}" for task, score in results.bag_of_words.items()}
        row = [BAG_OF_WORDS_LABEL, "–"]
        for measure in measures:
            row += [cells.get(measure, "–")] + ["–"] * (measure in compared)
        rows.append(row)
    return Table(header, rows)


def masked_words_table(results: StudyResults) -> Table:
    """Tabulate masked words and the guesses of some arms."""
    names = list(results.masked_words[0]["guesses"]) if results.masked_words else []
    rows = [
        [record["text"], record["word"], *(format_guesses(record["guesses"][name]) for name in names)]
        for record in results.masked_words
    ]
    header = ["held-out text", "word", *(arm_label(results, name) for name in names)]
    return Table(header, rows, text_columns=len(header))


def format_guesses(guesses: Sequence[tuple[str, float]]) -> str:
    """Format guesses as 'people 41 %, citizens 12 %', a dash if there are none."""
    if not guesses:
        return "–"
    return ", ".join(f"{word} {probability:.0%}".replace("%", " %") for word, probability in guesses)


def scores_by_checkpoint(results: StudyResults, measure: str) -> Table:
    """Tabulate scores by checkpoint (the paper's figures 3 and 4); no rows if only the last has one."""
    steps = sorted({step for arm in results.arms.values() for step in arm.steps(measure)} - {FINAL_STEP})
    rows = []
    for name, arm_results in results.arms.items():
        if steps and arm_results.steps(measure):
            cells = [_mean(_values(arm_results, measure, step), measure) for step in (*steps, FINAL_STEP)]
            rows.append([arm_label(results, name), *cells])
    return Table([measure_label(measure), *(f"step {step:,}" for step in steps), "end"], rows)


def flops_to_target_table(results: StudyResults) -> Table:
    """Tabulate the FLOPs to the final loss of the baseline; no rows without a finished baseline."""
    baseline = results.arms.get(results.study.baseline)
    if baseline is None or not baseline.runs:
        return Table((), ())
    target = float(np.mean(_values(baseline, LOSS_MEASURE)))
    baseline_crossing = flops_to_target(baseline, target, False)
    rows = []
    for name, arm_results in results.arms.items():
        if arm_results.arm.role != "student" or not arm_results.runs:
            continue
        cells = ["different held-out text"] * 2
        if name == results.study.baseline or paired_measurements(arm_results, baseline, LOSS_MEASURE)[0]:
            crossings = [flops_to_target(arm_results, target, charged) for charged in (False, True)]
            cells = [_format_target_flops(crossing, baseline_crossing) for crossing in crossings]
        rows.append([arm_label(results, name), *cells])
    header = [f"to {target:.4f} nats", "student and teacher's forward", "with the teacher's training"]
    return Table(header, rows)


def quality_table(results: StudyResults) -> Table:
    """Tabulate the average over tasks and FLOPs."""
    points = arm_qualities(results.arms)
    front = pareto_front(points)
    rows = []
    for point in points:
        score, is_optimal = _mean(point.scores, AVERAGE_MEASURE), "yes" if point in front else "–"
        rows.append([arm_label(results, point.arm), f"{point.flops:.3g}", score, is_optimal])
    average = measure_label(AVERAGE_MEASURE)
    return Table(["arm", "FLOPs, student and teacher's forward", average, "Pareto-optimal"], rows)


def paper_table(results: StudyResults) -> Table:
    """Tabulate our averages and the paper's, for arms that reproduce a row of its table 1."""
    rows = []
    for name, arm_results in results.arms.items():
        paper_score = PAPER_TABLE_1.get(arm_results.arm.paper)
        if paper_score and (scores := _values(arm_results, AVERAGE_MEASURE)):
            row = [arm_label(results, name), paper_score.label, _mean(scores, AVERAGE_MEASURE)]
            row += [_vs_baseline(results, name, AVERAGE_MEASURE), f"{paper_score.average:.2f}"]
            change = math.nan if paper_score.change is None else paper_score.change
            rows.append([*row, format_float(change, 2, signed=True)])
    tasks = len(results.study.finetuning.tasks)
    header = ["arm", "paper's arm", f"ours: average over {tasks} task{'s' * (tasks > 1)} (%)"]
    header += ["ours: vs. baseline", "paper: average over 9 tasks", "paper: vs. baseline"]
    return Table(header, rows, text_columns=2)


def _values(arm_results: ArmResults, measure: str, step: int = FINAL_STEP) -> list[float]:
    """Return the values of a measure by pre-training seed."""
    return [row.mean for row in arm_results.at(measure, step).values()]


def _measures(results: StudyResults) -> list[str]:
    """Return the measures of which there are results, without the held-out loss."""
    tasks = results.study.finetuning.tasks
    measures = [OUT_OF_DOMAIN_MEASURE, *tasks, *([AVERAGE_MEASURE] if len(tasks) > 1 else [])]
    measures += results.study.pairs.names()
    return [measure for measure in measures if any(arm.steps(measure) for arm in results.arms.values())]


def _mean(values: Sequence[float], measure: str) -> str:
    if not values:
        return "–"
    unit, digits = (1.0, 4) if measure in LOSS_MEASURES else (100.0, 2)
    spread = f" ± {unit * float(np.std(values, ddof=1)):.{digits}f}" if len(values) > 1 else ""
    return f"{unit * float(np.mean(values)):.{digits}f}{spread}"


def _vs_baseline(results: StudyResults, name: str, measure: str) -> str:
    baseline = results.arms.get(results.study.baseline)
    if baseline is None or name == results.study.baseline or results.arms[name].arm.role == "teacher":
        return "–"
    interval = paired_difference(results.arms[name], baseline, measure)
    if interval is None:
        return "–"
    is_partial = interval.seeds < max(len(results.arms[name].runs), len(baseline.runs))
    return format_interval(interval, measure) + f" ({interval.seeds} of the seeds)" * is_partial


def _format_target_flops(crossing: TargetCrossing | None, baseline: TargetCrossing | None) -> str:
    if crossing is None:
        return "never, or unknown"
    share = f" ({crossing.flops / baseline.flops:.0%})" if baseline else ""
    return f"{'≤ ' * crossing.is_upper_bound}{crossing.flops:.3g}{share}"


def study_tables(results: StudyResults) -> list[tuple[str, Table, str]]:
    """Return (heading, table, caption or '') of every table of the report."""
    by_checkpoint = [
        (f"Scores by checkpoint: {measure}", scores_by_checkpoint(results, measure), "")
        for measure in _measures(results)
    ]
    tables = [
        ("Results", arm_results_table(results), ""),
        ("Comparison with the paper's table 1", paper_table(results), PAPER_NOTE),
        *by_checkpoint,
        ("Average score against FLOPs", quality_table(results), PARETO_NOTE),
        ("FLOPs to the baseline's loss", flops_to_target_table(results), ""),
        ("Masked words", masked_words_table(results), MASKED_WORDS_NOTE),
    ]
    return [(heading, table, caption) for heading, table, caption in tables if table.rows]
