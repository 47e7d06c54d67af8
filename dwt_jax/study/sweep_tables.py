"""The outcome of a study in words and tables: Markdown and CSV; grid_page.py makes HTML of the same."""

import csv
import io
from collections.abc import Iterator, Sequence

import numpy as np

from dwt_jax.study.paper_results import PAPER_TABLE_1
from dwt_jax.study.report import TargetCrossing
from dwt_jax.study.results import (
    AVERAGE_MEASURE,
    LOSS_MEASURE,
    LOSS_MEASURES,
    OUT_OF_DOMAIN_MEASURE,
    ArmResults,
    HypothesisResult,
    StudyResults,
    arm_qualities,
    document_losses_by_seed,
    flops_to_target,
    paired_difference,
    pareto_front,
)
from dwt_jax.study.statistics import Interval
from dwt_jax.study.sweep import FINAL_STEP
from dwt_jax.study.tables import ReportTable, escape_markdown, markdown_table
from dwt_jax.text_format import format_float

METHOD_NOTE = (
    "± is the standard deviation over seeds. Intervals are of the difference to the arm that is named, "
    "run by run of the same seed, 95 %: first a percentile bootstrap over seeds and, within them, held-out "
    "documents or fine-tuning seeds (2000 replicates), then Student's t over the seeds' means. A finding is "
    "confirmed or contradicted only where both lie on one side of 0. Neither speaks of other corpora or "
    "sizes, nor, where one teacher serves all seeds of a student, of other teachers; scores are of the last "
    "epoch on the dev sets, so nothing was chosen on them. Many comparisons are made: of twenty without any "
    "effect, Student's t is expected to exclude 0 in one, the bootstrap, which is too narrow with few seeds, "
    "in more."
)

PAPER_NOTE = (
    "The last two columns are the paper's table 1 (Lee et al. 2023, arXiv 2305.18239), not measured here: "
    "one run an arm, average over nine GLUE tasks, hidden size 768, 30M sentences, 20 epochs. Of other tasks "
    "or another scale, order and sign of the changes can be compared, levels cannot."
)
PARETO_NOTE = (
    "At the end of pre-training, means over seeds; student's FLOPs and the teacher's forward, not the "
    "teacher's own training. On the Pareto front is whom no other arm matches for fewer FLOPs or betters for "
    "as many, by the means alone: it says nothing of whether the seeds tell two arms apart."
)


def hypothesis_sentence(judged: HypothesisResult, outcome: StudyResults) -> str:
    """One finding, held to our runs."""
    claim = judged.claim
    paper = f" (paper: {claim.paper})" if claim.paper else ""
    if judged.interval is None:
        return f"{claim.text}{paper}: not run at this scale, or not with what can be paired."
    against = arm_label(outcome, claim.against or outcome.grid.baseline)
    seeds = f"{judged.interval.seeds} seed{'s' * (judged.interval.seeds > 1)}"
    return (
        f"{claim.text}{paper}: {judged.verdict} at this scale. "
        f"{arm_label(outcome, claim.arm)} against {against}, {measure_label(claim.measure)}: "
        f"{format_interval(judged.interval, claim.measure)}, {seeds}."
    )


def measure_label(measure: str) -> str:
    return {
        LOSS_MEASURE: "held-out loss (nats)",
        OUT_OF_DOMAIN_MEASURE: "loss on other text (nats)",
        AVERAGE_MEASURE: "average over tasks (hundredths)",
    }.get(measure, f"{measure} (hundredths)")


def format_interval(found: Interval, measure: str) -> str:
    """'−0.0123 [−0.02, −0.01; t −0.03, +0.01]'"""
    unit, digits = (1.0, 4) if measure in LOSS_MEASURES else (100.0, 2)

    def shown(value: float) -> str:
        return (
            format_float(value * unit, digits, signed=True) if np.isfinite(value) else "nan"
        )  # a run that failed

    t = f"; t {shown(found.t_low)}, {shown(found.t_high)}" if found.seeds > 1 else "; one seed"
    return f"{shown(found.mean)} [{shown(found.low)}, {shown(found.high)}{t}]"


def arm_label(outcome: StudyResults, name: str) -> str:
    return outcome.arms[name].arm.label or name


def arm_results_table(outcome: StudyResults) -> ReportTable:
    """A row an arm: losses and scores at the end, each against the baseline."""
    measures = [LOSS_MEASURE, *_measure_if_present(outcome, OUT_OF_DOMAIN_MEASURE), *_tasks(outcome)]
    header = ["arm", "seeds"]
    for measure in measures:
        header += (
            [measure_label(measure), "against alone"]
            if measure in (*LOSS_MEASURES, AVERAGE_MEASURE)
            else [measure]
        )
    rows = []
    for name, measured in outcome.arms.items():
        row = [arm_label(outcome, name), str(len(measured.runs))]
        for measure in measures:
            row.append(_mean(values_by_seed(measured, measure), measure))
            if measure in (*LOSS_MEASURES, AVERAGE_MEASURE):
                row.append(_vs_baseline(outcome, name, measure))
        rows.append(row)
    return ReportTable(header, rows)


def scores_by_checkpoint(outcome: StudyResults, measure: str) -> ReportTable | None:
    """Scores at every fine-tuned checkpoint (the paper's figures 3 and 4); None where there is but one."""
    steps = sorted({step for arm in outcome.arms.values() for step in arm.steps() if step != FINAL_STEP})
    if not steps:
        return None
    rows = []
    for name, measured in outcome.arms.items():
        if measured.scores:
            cells = [_mean(values_by_seed(measured, measure, step), measure) for step in (*steps, FINAL_STEP)]
            rows.append([arm_label(outcome, name), *cells])
    return ReportTable([measure_label(measure), *(f"step {step:,}" for step in steps), "end"], rows)


def flops_to_target_table(outcome: StudyResults) -> ReportTable | None:
    """FLOPs to the loss that the student alone ends with."""
    base = outcome.arms.get(outcome.grid.baseline)
    if base is None or not base.runs:
        return None
    target = float(np.mean(values_by_seed(base, LOSS_MEASURE)))
    alone = flops_to_target(base, target, False)
    rows = []
    for name, measured in outcome.arms.items():
        if measured.arm.role != "student" or not measured.runs:
            continue
        if name != outcome.grid.baseline and paired_difference(measured, base, LOSS_MEASURE) is None:
            rows.append([arm_label(outcome, name), *2 * ["other held-out text"]])
        else:
            cells = [
                _format_target_flops(flops_to_target(measured, target, too), alone) for too in (False, True)
            ]
            rows.append([arm_label(outcome, name), *cells])
    header = [f"to {target:.4f} nats", "student and the teacher's forward", "and the teacher's own training"]
    return ReportTable(header, rows)


def quality_table(outcome: StudyResults) -> ReportTable | None:
    """The average over tasks against FLOPs, in numbers; None where there are no scores."""
    points = arm_qualities(outcome.arms)
    best = {one.arm for one in pareto_front(points)}
    rows = [
        [
            arm_label(outcome, one.arm),
            f"{one.flops:.3g}",
            _mean(one.scores, AVERAGE_MEASURE),
            "yes" if one.arm in best else "–",
        ]
        for one in points
    ]
    header = [
        "arm",
        "FLOPs, student and the teacher's forward",
        measure_label(AVERAGE_MEASURE),
        "on the front",
    ]
    return ReportTable(header, rows) if rows else None


def paper_table(outcome: StudyResults) -> ReportTable | None:
    """Our averages beside the paper's, of the arms that repeat a row of its table 1; None where there are
    none."""
    rows = []
    for name, measured in outcome.arms.items():
        theirs, ours = PAPER_TABLE_1.get(measured.arm.paper), values_by_seed(measured, AVERAGE_MEASURE)
        if theirs and ours:
            change = "–" if theirs.change is None else format_float(theirs.change, 2, signed=True)
            row = [
                arm_label(outcome, name),
                theirs.label,
                _mean(ours, AVERAGE_MEASURE),
                _vs_baseline(outcome, name, AVERAGE_MEASURE),
            ]
            rows.append([*row, f"{theirs.average:.2f}", change])
    tasks = len(outcome.grid.finetuning.tasks)
    header = ["arm", "the paper's arm", f"ours: average over {tasks} task{'s' * (tasks > 1)} (hundredths)"]
    header += ["ours: against alone", "paper: average over 9 tasks", "paper: against alone"]
    return ReportTable(header, rows, words=2) if rows else None


def values_by_seed(measured: ArmResults, measure: str, step: int = FINAL_STEP) -> list[float]:
    """By pre-training seed."""
    if measure in LOSS_MEASURES:
        found = document_losses_by_seed(measured, measure)
        return [float(found[seed].loss.sum() / found[seed].predictions.sum()) for seed in sorted(found)]
    kept = [scores for key, scores in sorted(measured.scores.items()) if key[1] == step]
    return [float(np.mean(one[measure])) for one in kept if measure in one]


def _tasks(outcome: StudyResults) -> list[str]:
    tasks = [
        *outcome.grid.finetuning.tasks,
        *([AVERAGE_MEASURE] if len(outcome.grid.finetuning.tasks) > 1 else []),
    ]
    return tasks if any(arm.scores for arm in outcome.arms.values()) else []


def _measure_if_present(outcome: StudyResults, measure: str) -> list[str]:
    return [measure] if any(document_losses_by_seed(arm, measure) for arm in outcome.arms.values()) else []


def _mean(found: Sequence[float], measure: str) -> str:
    if not found:
        return "–"
    unit, digits = (1.0, 4) if measure in LOSS_MEASURES else (100.0, 2)
    spread = f" ± {unit * float(np.std(found, ddof=1)):.{digits}f}" if len(found) > 1 else ""
    return f"{unit * float(np.mean(found)):.{digits}f}{spread}"


def _vs_baseline(outcome: StudyResults, name: str, measure: str) -> str:
    base = outcome.arms.get(outcome.grid.baseline)
    if base is None or name == outcome.grid.baseline or outcome.arms[name].arm.role == "teacher":
        return "–"
    found = paired_difference(outcome.arms[name], base, measure)
    if found is None:
        return "–"
    fewer = found.seeds < max(len(outcome.arms[name].runs), len(base.runs))
    return format_interval(found, measure) + f" ({found.seeds} of the seeds)" * fewer


def _format_target_flops(found: TargetCrossing | None, alone: TargetCrossing | None) -> str:
    """≤: it was there at its first evaluation already."""
    if found is None:
        return "never, or not known"
    share = f" ({found.flops / alone.flops:.0%})" if alone else ""
    return f"{'≤ ' * found.at_most}{found.flops:.3g}{share}"


def study_tables(outcome: StudyResults) -> Iterator[tuple[str, ReportTable, str]]:
    """(heading, table, what is to be said of it) of all that there are."""
    yield "Results", arm_results_table(outcome), ""
    if (found := paper_table(outcome)) is not None:
        yield "Beside the paper's table 1", found, PAPER_NOTE
    for measure in _tasks(outcome):
        if (found := scores_by_checkpoint(outcome, measure)) is not None:
            yield f"Along the way: {measure}", found, ""
    if (found := quality_table(outcome)) is not None:
        yield "Average score against FLOPs", found, PARETO_NOTE
    if (found := flops_to_target_table(outcome)) is not None:
        yield "FLOPs to the student alone's loss", found, ""


def study_markdown(outcome: StudyResults) -> str:
    parts = [f"# {escape_markdown(outcome.grid.title)}", f"{outcome.done} of {outcome.jobs} runs are done."]
    if outcome.hypothesis_results:
        parts.append(
            "\n".join(
                f"* {escape_markdown(hypothesis_sentence(judged, outcome))}"
                for judged in outcome.hypothesis_results
            )
        )
    for heading, table, note in study_tables(outcome):
        parts += [f"## {escape_markdown(heading)}", markdown_table(table), *([note] if note else [])]
    return "\n\n".join([*parts, METHOD_NOTE]) + "\n"


def study_csv(outcome: StudyResults) -> str:
    """A row a measured number: arm, seed, step (end), measure, fine-tuning seed, value."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["arm", "seed", "step", "measure", "finetuning_seed", "value"])
    for name, measured in outcome.arms.items():
        for measure in LOSS_MEASURES:
            for seed, one in sorted(document_losses_by_seed(measured, measure).items()):
                writer.writerow(
                    [name, seed, "end", measure, "", repr(float(one.loss.sum() / one.predictions.sum()))]
                )
        for (seed, step), scores in sorted(measured.scores.items()):
            for measure, found in scores.items():
                for i, value in enumerate(found):
                    where = "end" if step == FINAL_STEP else step
                    writer.writerow([name, seed, where, measure, i, repr(value)])
    return text.getvalue()
