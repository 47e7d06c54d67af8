"""The report on the runs in a directory: its sentences, tables and charts."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dwt_jax.study.charts import Chart, ChartLine, downsample, finite_charts, flop_unit, line_styles
from dwt_jax.study.curves import loss_charts, prior_training_flops
from dwt_jax.study.report import Details, Finding, Part, Remark, Report, Section, Table
from dwt_jax.study.run_comparison import BaselineComparison, RunComparisonStudy
from dwt_jax.study.run_records import RunRecord
from dwt_jax.study.run_tables import (
    controlled_settings_table,
    costs_table,
    differences_table,
    downstream_table,
    run_results_table,
    tidy_records,
)
from dwt_jax.study.statistics import Verdict
from dwt_jax.text_format import format_duration, format_float, format_share

HEADLINES = {
    Verdict.HELPED: "The teacher helped.",
    Verdict.HARMED: "The teacher harmed.",
    Verdict.UNDECIDED: "Whether the teacher helped is undecided.",
    Verdict.NOT_COMPARABLE: "The student with a teacher cannot be compared with the baseline.",
}
RESULTS_NOTE = (
    "Losses are in nats per predicted token of the held-out documents, the same tokens for every run. s.e.: "
    "standard error over documents. vs. baseline: a value below 0 is better."
)
COSTS_NOTE = (
    "FLOPs are computed from the shapes and count matrix products only. The cost of training the teacher is "
    "shared by all its students, and is 0 if the teacher exists already. Seconds are those of the process "
    "that finished the run; tokens/s is the median over the logged steps."
)
DOWNSTREAM_NOTE = (
    "Scores on the dev set in %, mean and standard deviation over the seeds of fine-tuning. The best epoch "
    "is chosen on the dev set on which it is scored; the last epoch is not. Each model was pre-trained once: "
    "a difference that is not far above these deviations is not significant."
)
CONTROL_NOTE = (
    "Runs with equal seeds have the same data order and predicted tokens and, unless they are grown from "
    "another model, the same initial parameters, so they differ only in the objective. The paired standard "
    "error covers the choice of held-out documents, and the noise covers the choice of seeds. Neither covers "
    "other sizes, data or lengths of training. Held-out loss does not measure the quality after fine-tuning."
)
TRAINING_NOTE = (
    "Averages of neighbouring logged steps. Hard loss: cross-entropy of the predicted tokens. Soft loss: "
    "divergence from the teacher, shown while the teacher is used."
)


def run_report(study: RunComparisonStudy) -> Report:
    """Build the report on the runs in a directory."""
    training_charts = _training_charts(study)
    controlled = [controlled_settings_table(study)] if _students(study) else []
    sections = [
        Section("", list(_summary(study))),
        Section("Held-out loss", _loss_charts(study)),
        Section("Training losses", [TRAINING_NOTE, *training_charts] if training_charts else []),
        Section("Results", [run_results_table(study), Remark(RESULTS_NOTE)]),
        Section("Costs", [costs_table(study), Remark(COSTS_NOTE)]),
        Section(
            "Fine-tuning", [downstream_table(study), Remark(DOWNSTREAM_NOTE)] if study.downstream else []
        ),
        Section("Controlled settings", [*controlled, CONTROL_NOTE]),
        Section("Environment", [Table(("of the runs", "value"), _environment(study), text_columns=2)]),
        Section("Configs", ["The differences of each config from the baseline's, and the complete config."]),
        *(_config_section(study, run) for run in study.runs),
    ]
    return Report(study.title, _headline(study), sections, list(tidy_records(study)))


def _headline(study: RunComparisonStudy) -> str:
    """Summarize the result in one sentence."""
    if not study.comparisons:
        return "There is no distilled student to compare with a baseline."
    verdicts = [comparison.verdict for comparison in study.comparisons]
    if len(verdicts) == 1:
        return HEADLINES[verdicts[0]]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in HEADLINES if verdict in verdicts]
    return f"Of {len(verdicts)} students with a teacher: {', '.join(counts)}."


def _summary(study: RunComparisonStudy) -> Iterator[Part]:
    styles = _styles(study)
    for comparison in study.comparisons:
        run = comparison.run
        yield Finding(run.label, comparison.verdict, _findings(comparison, study), styles[run.name][0])
    if study.baseline is None:
        yield "There is no finished run without a teacher to compare with."
    if study.comparisons:
        yield _describe_noise(study)
    if unfinished := _describe_unfinished(study):
        yield f"Not in this report, because unfinished or unreadable: {unfinished}."


def _findings(comparison: BaselineComparison, study: RunComparisonStudy) -> list[str]:
    """Describe the comparison of one distilled student in sentences."""
    run, baseline = comparison.run, study.baseline
    assert baseline is not None  # required for a comparison
    if comparison.verdict == Verdict.NOT_COMPARABLE:
        losses = (
            f"Held-out loss {format_float(run.loss, 4)}; the baseline has {format_float(baseline.loss, 4)}"
        )
        return [f"{losses}, but {comparison.reason}."]
    side = "above" if comparison.difference > 0 else "below"
    error = ""
    if comparison.error is not None and run.documents is not None:
        count = len(run.documents[0])
        error = f"; standard error {comparison.error:.4f}, paired over {count:,} held-out documents"
    first = (
        f"Held-out loss {run.loss:.4f}, {abs(comparison.difference):.4f} {side} the baseline "
        f"({baseline.loss:.4f}) after the same {run.summary['steps']:,} steps: {comparison.reason}{error}."
    )
    differing = ", ".join(comparison.differing_keys)
    caveat = [f"Settings that differ: {differing}."] if differing else []
    return [first, _describe_target(comparison, baseline), *caveat]


def _describe_target(comparison: BaselineComparison, baseline: RunRecord) -> str:
    reach, flops = comparison.reach, comparison.run.summary["flops"]
    if reach is None:
        return "It never reached the final loss of the baseline."
    baseline_flops = baseline.summary["flops"]["total"]
    upper_bound = " (at its first evaluation; possibly earlier)" if reach.is_upper_bound else ""
    text = (
        f"It reached the final loss of the baseline after {reach.steps:,.0f} steps{upper_bound}, "
        f"{format_share(reach.steps / baseline.summary['steps'])} of the baseline's steps, and "
        f"{_format_flops(reach.flops)} including the teacher's forward pass, "
        f"{format_share(reach.flops / baseline_flops)} of the baseline's FLOPs; "
    )
    prior_flops, models = prior_training_flops(flops), "the teacher"
    if "source_training" in flops:
        models = "the teacher and the source"
    if prior_flops is None:
        return text + f"the cost of training {models} is unknown."
    total = reach.flops + prior_flops
    return (
        text + f"including the training of {models}, {_format_flops(total)}, "
        f"{format_share(total / baseline_flops)}."
    )


def _describe_noise(study: RunComparisonStudy) -> str:
    """Describe how the seed noise was measured, in a paragraph."""
    if study.noise is None:
        return "No two runs differ only in their seed: the noise is unknown, and every verdict is undecided."
    names = " and ".join(f"“{run.label}”" for run in study.noise.runs)
    num_seeds = len(study.noise.runs)
    precision = (
        "a rough estimate: more seeds may show a larger noise"
        if num_seeds < 5
        else "the range of their results"
    )
    count = {2: "two", 3: "three", 4: "four"}.get(num_seeds, str(num_seeds))
    return (
        f"Noise: {names} differ only in their seed and end {study.noise.value:.4f} nats apart. This is "
        f"from {count} seeds, {precision}. A verdict is helped or harmed only if the "
        "difference is larger than the noise and, if the losses by document are known, than twice its paired "
        "standard error."
    )


def _describe_unfinished(study: RunComparisonStudy) -> str:
    """List the unfinished runs with their last logged step, and the runs that cannot be read."""
    steps = {name: f"step {step:,}" if step else "no step logged" for name, step in study.unfinished}
    return "; ".join(f"{name} ({text})" for name, text in [*steps.items(), *study.left_out])


def _format_flops(value: float) -> str:
    """Format FLOPs with three digits and a unit."""
    size, unit = flop_unit(value)
    digits = len(f"{value / size:.0f}")
    return f"{value / size:.{max(0, 3 - digits)}f} {unit}"


def _styles(study: RunComparisonStudy) -> dict[str, tuple[int, int]]:
    """Return (colour, dash) of each student; those without a teacher have the baseline's colour."""
    students = _students(study)
    alike = [run.name for run in students if not run.is_distilled and run is not study.baseline]
    distilled = [run.name for run in students if run.is_distilled]
    return line_styles(study.baseline.name if study.baseline else None, distilled, alike)


def _students(study: RunComparisonStudy) -> list[RunRecord]:
    """Return the students, the baseline first."""
    students = [run for run in study.runs if run.role == "student"]
    return sorted(students, key=lambda run: run is not study.baseline)


def _lines(
    study: RunComparisonStudy, points: Callable[[RunRecord], tuple[Sequence[float], Sequence[float]]]
) -> list[ChartLine]:
    styles = _styles(study)
    return [ChartLine(run.label, *points(run), *styles[run.name]) for run in _students(study)]


def _teacher_losses(study: RunComparisonStudy) -> list[tuple[str, float]]:
    """Return reference lines of the teachers' losses, if measured on the same predictions."""
    baseline = study.baseline or [*_students(study), *study.runs][0]
    prefixes = ("mlm.", "run.data_digest", "held-out predictions")

    def eval_settings(run: RunRecord) -> dict[str, Any]:
        return {key: value for key, value in run.settings().items() if key.startswith(prefixes)}

    teachers = [
        run for run in study.runs if run.role == "teacher" and eval_settings(run) == eval_settings(baseline)
    ]
    return [(f"{run.loss:.3f} {run.label}", run.loss) for run in teachers if math.isfinite(run.loss)]


def _loss_charts(study: RunComparisonStudy) -> list[Chart]:
    """Plot the held-out loss against steps and FLOPs, and the difference to the baseline."""
    teachers = _teacher_losses(study)
    steps_caption = (
        "By steps, with the same data."
        + " The dashed line is the teacher's loss." * bool(teachers)
        + " The learning rate decays until the last step, so the end of one curve and the middle of another "
        "are not comparable."
    )
    flops_caption = (
        "By FLOPs (UNIT): forward and backward pass of the student, and the teacher's forward pass while it "
        "is used. The table of costs includes the training of the teacher."
    )
    styles = _styles(study)
    curves = [(run.label, run.evaluations, styles[run.name]) for run in _students(study)]
    captions = (steps_caption, flops_caption)
    by_steps, by_flops = loss_charts(curves, "held-out loss (nats)", captions, teachers)
    return finite_charts([by_steps, *_baseline_difference(study), by_flops])


def _baseline_difference(study: RunComparisonStudy) -> list[Chart]:
    if study.baseline is None:
        return []
    baseline_losses = {record["step"]: record["held_out_loss"] for record in study.baseline.evaluations}

    def difference(run: RunRecord) -> tuple[list[float], list[float]]:
        common = [record for record in run.evaluations if record["step"] in baseline_losses]
        common = [] if run is study.baseline else common
        steps = [record["step"] for record in common]
        return steps, [record["held_out_loss"] - baseline_losses[record["step"]] for record in common]

    band = study.noise.value if study.noise else 0.0
    caption = "Difference to the baseline: below the dashed line is better."
    caption += " The grey band is the seed noise at the end of training." * bool(band)
    return [
        Chart(
            "Difference to the baseline against steps",
            [line for line in _lines(study, difference) if len(line.x) > 1],
            *("steps", "minus the baseline", caption),
            reference_lines=[(study.baseline.label, 0.0)],
            band=band,
            cut=True,
            signed=True,
            decimals=4,
        )
    ]


def _training_charts(study: RunComparisonStudy) -> list[Chart]:
    """Plot the training losses."""

    def series(key: str, with_teacher: bool) -> list[ChartLine]:
        def points(run: RunRecord) -> tuple[list[float], list[float]]:
            records = [
                record
                for record in run.metrics
                if record.get(key) is not None and (not with_teacher or record.get("teacher_hard_loss"))
            ]
            return downsample([r["step"] for r in records], [r[key] for r in records])

        return _lines(study, points)

    def weights(run: RunRecord) -> tuple[list[float], list[float]]:
        records = run.metrics if run.is_distilled else []
        return [r["step"] for r in records], [r["alpha_soft"] for r in records]

    panels = (
        ("Hard loss", "nats", series("hard_loss", False)),
        ("Soft loss at temperature 1", "nats", series("soft_loss_at_1", True)),
        ("Weight of the soft loss, α soft", "", _lines(study, weights)),
    )
    return finite_charts(
        Chart(
            f"{title} against steps",
            lines,
            "steps",
            f"{title} ({unit})" if unit else title,
            title,
            cut=cut,
            from_zero=not cut,
            is_panel=True,
        )
        for title, unit, lines in panels
        for cut in [bool(unit)]
    )


def _environment(study: RunComparisonStudy) -> list[tuple[str, str]]:
    """Return the rows of the table of what the runs ran on."""

    def values_of(get_value: Callable[[RunRecord], str]) -> str:
        labels_by_value: dict[str, list[str]] = {}
        for run in study.runs:
            labels_by_value.setdefault(get_value(run), []).append(run.label)
        if len(labels_by_value) == 1:
            return next(iter(labels_by_value))
        return "; ".join(f"{value} ({', '.join(labels)})" for value, labels in labels_by_value.items())

    def versions(run: RunRecord) -> str:
        return ", ".join(f"{name} {version}" for name, version in run.summary.get("versions", {}).items())

    rows = [
        ("command", study.command),
        ("total time", format_duration(study.seconds) if study.seconds else ""),
        ("device", values_of(lambda run: run.summary.get("device", "unknown"))),
        ("versions", values_of(versions)),
        ("data digest", values_of(lambda run: run.identity.get("data_digest", "unknown"))),
    ]
    return [row for row in rows if row[1]]


def _config_section(study: RunComparisonStudy, run: RunRecord) -> Section:
    kind = "baseline" if run is study.baseline else run.role
    parts: list[Part] = [Remark(f"{run.name}: {kind}")]
    if study.baseline and run is not study.baseline:
        table = differences_table(run, study.baseline)
        parts.append(table if table.rows else "Same config as the baseline.")
    parts.append(Details("Resolved config", json.dumps(run.config, indent=2, ensure_ascii=False)))
    return Section(run.label, parts, level=3)
