"""Sentences and tables of a study's report, and their Markdown and CSV forms; sweep_html.py renders HTML."""

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
from dwt_jax.text_format import format_float, format_table

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

PAPER_NOTE = (
    "The last two columns are the paper's table 1 (Lee et al. 2023, arXiv 2305.18239), not our results: "
    "one run per arm, average over nine GLUE tasks, hidden size 768, 30M sentences, 20 epochs. For other "
    "tasks or another scale, order and sign of the changes are comparable, absolute scores are not."
)
PAIRS_NOTE = (
    "Accuracy without fine-tuning, a mean over paradigms; chance is 50 %. By FLOPs, the teacher's forward "
    "charged as long as it takes part: the higher and the further left, the better."
)
PARETO_NOTE = (
    "At the end of pre-training, means over seeds; FLOPs of the student and the teacher's forward pass, "
    "without the teacher's training. An arm is on the Pareto front if no other arm has a mean score at least "
    "as high for fewer FLOPs, or a higher one for as many; seed variance is not considered."
)


BAG_OF_WORDS_LABEL = "no model: logistic regression on bags of words"
MASKED_WORDS_NOTE = "The three most probable tokens where one word was masked, by the runs of the first seed."


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


def arm_results_table(results: StudyResults) -> ReportTable:
    """Tabulate final losses and scores, a row per arm, with the differences to the baseline."""
    measures = [LOSS_MEASURE, *_measure_if_present(results, OUT_OF_DOMAIN_MEASURE), *_scores(results)]
    compared = (*LOSS_MEASURES, AVERAGE_MEASURE, *results.study.pairs.names())
    header = ["arm", "seeds"]
    for measure in measures:
        header += [measure_label(measure), "vs. baseline"] if measure in compared else [measure]
    rows = []
    for name, arm_results in results.arms.items():
        row = [arm_label(results, name), str(len(arm_results.runs))]
        for measure in measures:
            row.append(_mean(values_by_seed(arm_results, measure), measure))
            if measure in compared:
                row.append(_vs_baseline(results, name, measure))
        rows.append(row)
    if any(task in results.bag_of_words for task in measures):
        cells = {task: f"{100 * score:.2f}" for task, score in results.bag_of_words.items()}
        row = [BAG_OF_WORDS_LABEL, "–"]
        for measure in measures:
            row += [cells.get(measure, "–")] + ["–"] * (measure in compared)
        rows.append(row)
    return ReportTable(header, rows)


def masked_words_table(results: StudyResults) -> ReportTable | None:
    """Tabulate masked words and the guesses of some arms; None if the study has none."""
    if not results.masked_words:
        return None
    names = list(results.masked_words[0]["guesses"])
    rows = [
        [
            record["text"],
            record["word"],
            *(format_guesses(record["guesses"][name]) for name in names),
        ]
        for record in results.masked_words
    ]
    header = ["held-out text", "word", *(arm_label(results, name) for name in names)]
    return ReportTable(header, rows, text_columns=len(header))


def format_guesses(guesses: Sequence[tuple[str, float]]) -> str:
    """Format guesses as 'people 41 %, citizens 12 %', a dash if there are none."""
    if not guesses:
        return "–"
    return ", ".join(f"{word} {probability:.0%}".replace("%", " %") for word, probability in guesses)


def scores_by_checkpoint(results: StudyResults, measure: str) -> ReportTable | None:
    """Tabulate scores by checkpoint (the paper's figures 3 and 4); None if only the last has one."""
    steps = sorted(
        {step for arm in results.arms.values() for step in arm.steps(measure) if step != FINAL_STEP}
    )
    if not steps:
        return None
    rows = []
    for name, arm_results in results.arms.items():
        if arm_results.steps(measure):
            cells = [
                _mean(values_by_seed(arm_results, measure, step), measure) for step in (*steps, FINAL_STEP)
            ]
            rows.append([arm_label(results, name), *cells])
    return ReportTable([measure_label(measure), *(f"step {step:,}" for step in steps), "end"], rows)


def flops_to_target_table(results: StudyResults) -> ReportTable | None:
    """Tabulate the FLOPs to the final loss of the baseline; None without a finished baseline."""
    baseline = results.arms.get(results.study.baseline)
    if baseline is None or not baseline.runs:
        return None
    target = float(np.mean(values_by_seed(baseline, LOSS_MEASURE)))
    baseline_crossing = flops_to_target(baseline, target, False)
    rows = []
    for name, arm_results in results.arms.items():
        if arm_results.arm.role != "student" or not arm_results.runs:
            continue
        if name != results.study.baseline and paired_difference(arm_results, baseline, LOSS_MEASURE) is None:
            rows.append([arm_label(results, name), *2 * ["different held-out text"]])
        else:
            cells = [
                _format_target_flops(flops_to_target(arm_results, target, with_training), baseline_crossing)
                for with_training in (False, True)
            ]
            rows.append([arm_label(results, name), *cells])
    header = [f"to {target:.4f} nats", "student and teacher's forward", "with the teacher's training"]
    return ReportTable(header, rows)


def quality_table(results: StudyResults) -> ReportTable | None:
    """Tabulate the average over tasks and FLOPs; None without scores."""
    points = arm_qualities(results.arms)
    front = {point.arm for point in pareto_front(points)}
    rows = [
        [
            arm_label(results, point.arm),
            f"{point.flops:.3g}",
            _mean(point.scores, AVERAGE_MEASURE),
            "yes" if point.arm in front else "–",
        ]
        for point in points
    ]
    header = [
        "arm",
        "FLOPs, student and teacher's forward",
        measure_label(AVERAGE_MEASURE),
        "Pareto-optimal",
    ]
    return ReportTable(header, rows) if rows else None


def paper_table(results: StudyResults) -> ReportTable | None:
    """Tabulate our averages and the paper's, for arms that reproduce a row of its table 1.

    Returns None if there is no such arm.
    """
    rows = []
    for name, arm_results in results.arms.items():
        paper_score = PAPER_TABLE_1.get(arm_results.arm.paper)
        scores = values_by_seed(arm_results, AVERAGE_MEASURE)
        if paper_score and scores:
            change = "–" if paper_score.change is None else format_float(paper_score.change, 2, signed=True)
            row = [
                arm_label(results, name),
                paper_score.label,
                _mean(scores, AVERAGE_MEASURE),
                _vs_baseline(results, name, AVERAGE_MEASURE),
            ]
            rows.append([*row, f"{paper_score.average:.2f}", change])
    tasks = len(results.study.finetuning.tasks)
    header = ["arm", "paper's arm", f"ours: average over {tasks} task{'s' * (tasks > 1)} (%)"]
    header += ["ours: vs. baseline", "paper: average over 9 tasks", "paper: vs. baseline"]
    return ReportTable(header, rows, text_columns=2) if rows else None


def values_by_seed(arm_results: ArmResults, measure: str, step: int = FINAL_STEP) -> list[float]:
    """Return the values of a measure by pre-training seed. `step`: of a score, the checkpoint."""
    if measure in LOSS_MEASURES:
        losses = document_losses_by_seed(arm_results, measure)
        return [float(losses[seed].loss.sum() / losses[seed].predictions.sum()) for seed in sorted(losses)]
    all_scores = [scores for key, scores in sorted(arm_results.scores.items()) if key[1] == step]
    return [float(np.mean(scores[measure])) for scores in all_scores if measure in scores]


def _scores(results: StudyResults) -> list[str]:
    """Return the tasks, their average and the sets of minimal pairs of which there are results."""
    tasks = results.study.finetuning.tasks
    measures = [*tasks, *([AVERAGE_MEASURE] if len(tasks) > 1 else []), *results.study.pairs.names()]
    return [measure for measure in measures if any(arm.steps(measure) for arm in results.arms.values())]


def _measure_if_present(results: StudyResults, measure: str) -> list[str]:
    return [measure] if any(document_losses_by_seed(arm, measure) for arm in results.arms.values()) else []


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


def study_tables(results: StudyResults) -> Iterator[tuple[str, ReportTable, str]]:
    """Yield (heading, table, caption or '') of every table of the report."""
    yield "Results", arm_results_table(results), ""
    if (table := paper_table(results)) is not None:
        yield "Comparison with the paper's table 1", table, PAPER_NOTE
    for measure in _scores(results):
        if (table := scores_by_checkpoint(results, measure)) is not None:
            yield f"Scores by checkpoint: {measure}", table, ""
    if (table := quality_table(results)) is not None:
        yield "Average score against FLOPs", table, PARETO_NOTE
    if (table := flops_to_target_table(results)) is not None:
        yield "FLOPs to the baseline's loss", table, ""
    if (table := masked_words_table(results)) is not None:
        yield "Masked words", table, MASKED_WORDS_NOTE


def study_lines(results: StudyResults) -> list[str]:
    """Return the results as lines for a terminal."""
    table = arm_results_table(results)
    return [
        *format_table([table.header, *table.rows]),
        *left_out_lines(results),
        *masked_words_lines(results),
    ]


def left_out_lines(results: StudyResults) -> list[str]:
    """Return a line for each job that failed, that needs such a one, or whose files cannot be read."""
    return [f"{name} is left out: {reason}" for name, reason in results.left_out.items()]


def masked_words_lines(results: StudyResults) -> list[str]:
    """Return masked words and the guesses of some arms as lines for a terminal."""
    lines = []
    for record in results.masked_words:
        lines += ["", f"… {record['text']} …   ({record['word']})"]
        guesses = [
            (f"  {arm_label(results, name)}", format_guesses(guesses))
            for name, guesses in record["guesses"].items()
        ]
        lines += format_table(guesses)
    return lines


def study_markdown(results: StudyResults) -> str:
    """Render the report of a study as Markdown."""
    progress = f"{results.num_done} of {results.num_jobs} runs are finished."
    parts = [f"# {escape_markdown(results.study.title)}", progress]
    if results.left_out:
        parts.append("\n".join(f"* {escape_markdown(line)}" for line in left_out_lines(results)))
    if results.hypothesis_results:
        parts.append(
            "\n".join(
                f"* {escape_markdown(hypothesis_sentence(result, results))}"
                for result in results.hypothesis_results
            )
        )
    for heading, table, caption in study_tables(results):
        parts += [f"## {escape_markdown(heading)}", markdown_table(table), *([caption] if caption else [])]
    return "\n\n".join([*parts, METHOD_NOTE]) + "\n"


def study_csv(results: StudyResults) -> str:
    """Render the values of a study as CSV: arm, seed, step (or end), measure, fine-tuning seed, value.

    Of a set of minimal pairs there is the mean over paradigms, without fine-tuning seed.
    """
    pair_sets = results.study.pairs.names()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["arm", "seed", "step", "measure", "finetuning_seed", "value"])
    for name, arm_results in results.arms.items():
        for measure in LOSS_MEASURES:
            for seed, documents in sorted(document_losses_by_seed(arm_results, measure).items()):
                loss = float(documents.loss.sum() / documents.predictions.sum())
                writer.writerow([name, seed, "end", measure, "", repr(loss)])
        for (seed, step), scores in sorted(arm_results.scores.items()):
            checkpoint = "end" if step == FINAL_STEP else step
            for measure, values in scores.items():
                if measure in pair_sets:
                    writer.writerow([name, seed, checkpoint, measure, "", repr(float(np.mean(values)))])
                    continue
                for i, value in enumerate(values):
                    writer.writerow([name, seed, checkpoint, measure, i, repr(value)])
    return text.getvalue()
