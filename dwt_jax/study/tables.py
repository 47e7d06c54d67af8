"""Sentences and tables of a report on runs, and their Markdown and CSV forms."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwt_jax.config_loader import flatten_dict
from dwt_jax.finetune.tasks import format_percent
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.study import charts
from dwt_jax.study.descriptions import (
    describe_batch,
    describe_loss_weights,
    describe_masks,
    describe_schedule,
)
from dwt_jax.study.run_records import RunRecord
from dwt_jax.text_format import format_float, format_share, format_with_error

if TYPE_CHECKING:  # report.py imports this module
    from dwt_jax.study.report import BaselineComparison, RunComparisonStudy

PER_BYTE_KEYS = ("bits_per_byte", "loss_per_byte")  # of next tokens, of masked tokens
VERDICTS = ("helped", "harmed", "undecided", "not comparable")


class ReportTable(NamedTuple):
    """A table of strings."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1  # the first columns that are text; the others are numbers


def report_headline(study: "RunComparisonStudy") -> str:
    """Summarize the result in one sentence."""
    if not study.comparisons:
        return "No distilled student to compare with a baseline."
    verdicts = [comparison.verdict for comparison in study.comparisons]
    if len(verdicts) == 1:
        return {
            "helped": "The teacher helped.",
            "harmed": "The teacher harmed.",
            "undecided": "Whether the teacher helped is undecided.",
            "not comparable": "The student with a teacher cannot be compared with the baseline.",
        }[verdicts[0]]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts]
    return f"Of {len(verdicts)} students with a teacher: {', '.join(counts)}."


def comparison_findings(comparison: "BaselineComparison", study: "RunComparisonStudy") -> list[str]:
    """Describe the comparison of one distilled student in sentences."""
    run, baseline = comparison.run, study.baseline
    assert baseline is not None  # required for a comparison
    if comparison.verdict == "not comparable":
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


def _describe_target(comparison: "BaselineComparison", baseline: RunRecord) -> str:
    reach, flops = comparison.reach, comparison.run.summary["flops"]
    if reach is None:
        return "It never reached the final loss of the baseline."
    baseline_flops = baseline.summary["flops"]["total"]
    upper_bound = " (at its first evaluation, perhaps earlier)" if reach.is_upper_bound else ""
    text = (
        f"It reached the final loss of the baseline after {reach.steps:,.0f} steps{upper_bound}, "
        f"{format_share(reach.steps / baseline.summary['steps'])} of the baseline's steps, and "
        f"{_format_flops(reach.flops)} including the teacher's forward pass, "
        f"{format_share(reach.flops / baseline_flops)} of the baseline's FLOPs; "
    )
    prior_flops, models = _prior_training_flops(flops), "the teacher"
    if "source_training" in flops:
        models = "the teacher and the source"
    if prior_flops is None:
        return text + f"the cost of training {models} is unknown."
    total = reach.flops + prior_flops
    return (
        text + f"including the training of {models}, {_format_flops(total)}, "
        f"{format_share(total / baseline_flops)}."
    )


def _prior_training_flops(flops: Mapping[str, float | None]) -> float | None:
    """Return the training FLOPs of a run's teacher and source, None if unknown."""
    return sum_or_none(flops["teacher_training"], flops.get("source_training", 0.0))


def describe_noise(study: "RunComparisonStudy") -> str:
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
    return (
        f"Noise: {names} differ only in their seed and end {study.noise.value:.4f} nats apart. This is "
        f"from {_spell_number(num_seeds)} seeds, {precision}. A verdict is helped or harmed only if the "
        "difference is larger than the noise and, if the losses by document are known, than twice its paired "
        "standard error."
    )


def _spell_number(number: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(number, str(number))


def _format_flops(value: float) -> str:
    """Format FLOPs with three digits and a unit."""
    size, unit = charts.flop_unit(value)
    digits = len(f"{value / size:.0f}")
    return f"{value / size:.{max(0, 3 - digits)}f} {unit}"


def _model_size(run: RunRecord) -> str:
    return f"{run.config['model']['num_hidden_layers']}\u00a0×\u00a0{run.config['model']['hidden_size']}"


def run_label(study: "RunComparisonStudy", name: str) -> str:
    """Return the label of a run, its name if it is not in the study, or a dash."""
    return next((run.label for run in study.runs if run.name == name), name) or "–"


def find_comparison(study: "RunComparisonStudy", run: RunRecord) -> "BaselineComparison | None":
    """Return the comparison of a run with the baseline, None if it has none."""
    return next((comparison for comparison in study.comparisons if comparison.run is run), None)


def run_results_table(study: "RunComparisonStudy") -> ReportTable:
    """Tabulate the final losses, a row per run."""
    header = ["run", "layers × hidden", "teacher", "weights", "steps", "held-out loss ± s.e."]
    per_byte = [key for key in PER_BYTE_KEYS if any(key in run.summary["held_out"] for run in study.runs)]
    header += ["vs. baseline ± paired s.e.", "verdict", "perplexity"]
    header += [*(key.replace("_", " ") for key in per_byte), "top-1", "top-5"]
    rows = []
    for run in study.runs:
        held_out, comparison = run.summary["held_out"], find_comparison(study, run)
        row = [run.label, _model_size(run), run_label(study, run.teacher), describe_loss_weights(run.config)]
        row += [f"{run.summary['steps']:,}", format_with_error(run.loss, held_out["standard_error"])]
        if comparison is None or comparison.verdict == "not comparable":
            row += ["–", comparison.verdict if comparison else "–"]
        else:
            error = "" if comparison.error is None else f" ± {comparison.error:.4f}"
            row += [format_float(comparison.difference, 4, signed=True) + error, comparison.verdict]
        row += [format_float(held_out["perplexity"], 2)]
        row += [format_float(held_out.get(key, math.nan), 4) for key in per_byte]
        row += [f"{held_out[key]:.2%}".replace("%", " %") for key in ("top1_accuracy", "top5_accuracy")]
        rows.append(row)
    return ReportTable(header, rows, text_columns=4)


def costs_table(study: "RunComparisonStudy") -> ReportTable:
    """Tabulate FLOPs and time, a row per run."""
    size, unit = charts.flop_unit(max(run.summary["flops"]["total"] for run in study.runs))
    baseline_flops = study.baseline.summary["flops"]["total"] if study.baseline else None
    header = [
        "run",
        f"student, {unit}",
        "teacher's forward",
        "total",
        "vs. baseline",
        "teacher's and source's training" if any(map(_is_grown, study.runs)) else "teacher's training",
        "total with training",
        "vs. baseline",
        "seconds of the last process",
        "tokens/s",
        "skipped updates",
    ]
    rows = []
    for run in study.runs:
        flops, rate = run.summary["flops"], _tokens_per_second(run)
        training = _prior_training_flops(flops)
        total = None if training is None else flops["total"] + training
        row = [run.label, *(f"{flops[key] / size:,.2f}" for key in ("student", "teacher_forward", "total"))]
        row += [_relative(flops["total"], baseline_flops)]
        row += ["unknown" if training is None else f"{training / size:,.2f}"]
        row += (
            ["unknown"] * 2 if total is None else [f"{total / size:,.2f}", _relative(total, baseline_flops)]
        )
        row += [f"{run.summary['seconds_of_this_process']:,.0f}", "–" if rate is None else f"{rate:,.0f}"]
        row += [f"{run.summary['skipped_updates']:,}"]
        rows.append(row)
    return ReportTable(header, rows)


def _is_grown(run: RunRecord) -> bool:
    return "source_training" in run.summary["flops"]


def _relative(value: float, baseline: float | None) -> str:
    return format_share(value / baseline) if baseline else "–"


def _tokens_per_second(run: RunRecord) -> float | None:
    """Return the median over the logged steps, which ignores interruptions and other jobs' load."""
    rates = [record["tokens_per_second"] for record in run.metrics if record.get("tokens_per_second")]
    return float(np.median(rates)) if rates else None


CONTROLLED_SETTINGS = {
    "seed": ("seed",),
    "data (digest)": ("run.data_digest",),
    "steps": ("train.steps", "train.epochs"),
    "rows a step": ("train.batch_size", "train.batch_ramp"),
    "positions a row": ("data.sequence_length",),
    "student's size": ("model.",),
    "masks": ("mlm.",),
    "optimizer and learning rate": ("optimizer.",),
    "compute type": ("computed in",),
    "device": ("device",),
}


def controlled_settings_table(study: "RunComparisonStudy") -> ReportTable:
    """Tabulate the settings that should be equal for all students, and the students that differ."""
    students = [run for run in study.runs if run.role == "student"]
    settings = [{**run.settings(), "device": run.summary.get("device", "unknown")} for run in students]
    config = students[0].config
    values = {
        "rows a step": describe_batch(students[0]),
        "student's size": _model_size(students[0]),
        "masks": describe_masks(config),
        "optimizer and learning rate": describe_schedule(config["optimizer"]["learning_rate"]),
    }
    rows = []
    for name, prefixes in CONTROLLED_SETTINGS.items():
        keys = [
            key
            for key in dict.fromkeys(key for run_settings in settings for key in run_settings)
            if key.startswith(prefixes)
        ]
        differing = [
            key for key in keys if len({json.dumps(run_settings.get(key)) for run_settings in settings}) > 1
        ]
        value = values.get(name, str(settings[0].get(prefixes[0])))
        descriptions = []
        for key in differing:
            labels_by_value: dict[str, list[str]] = {}
            for run, run_settings in zip(students, settings, strict=True):
                labels_by_value.setdefault(str(run_settings.get(key)), []).append(run.label)
            groups = (f"{group} ({'; '.join(labels)})" for group, labels in labels_by_value.items())
            descriptions.append(f"{key} = {', '.join(groups)}")
        if keys:
            rows.append((name, "differs" if differing else "equal", "; ".join(descriptions) or value))
    return ReportTable(("of the students", "", "value"), rows, text_columns=3)


def differences_table(run: RunRecord, baseline: RunRecord) -> ReportTable:
    """Tabulate the config keys in which a run differs from the baseline."""
    config, baseline_config = flatten_dict(run.config), flatten_dict(baseline.config)
    keys = [key for key in {**baseline_config, **config} if config.get(key) != baseline_config.get(key)]
    rows = [(key, _json(baseline_config.get(key)), _json(config.get(key))) for key in keys]
    return ReportTable(("key", baseline.label, run.label), rows, text_columns=3)


def _json(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


DOWNSTREAM_NOTE = (
    "Scores on the dev set in %, mean and standard deviation over the seeds of fine-tuning. The best epoch "
    "is chosen on the set that it is scored on, the last is not. Each model was pre-trained once: a "
    "difference that is not far above these deviations is not significant."
)


def downstream_table(study: "RunComparisonStudy") -> ReportTable:
    """Tabulate the scores of the runs' fine-tunings, a row per task."""
    rows = []
    for run in study.runs:
        for task, result in study.downstream.get(run.name, {}).get("tasks", {}).items():
            scores = [format_percent(result[epoch]) for epoch in ("last", "best")]
            rows.append((run.label, task, *scores, str(len(result["last"]["by_seed"]))))
    header = ("model", "fine-tuned on", "last epoch", "best epoch", "seeds")
    return ReportTable(header, rows, text_columns=2)


def report_markdown(study: "RunComparisonStudy") -> str:
    """Render a report as Markdown."""
    parts = [f"# {escape_markdown(study.title)}", escape_markdown(report_headline(study))]
    for comparison in study.comparisons:
        text = " ".join(comparison_findings(comparison, study))
        parts.append(
            f"* **{escape_markdown(comparison.run.label)}: {comparison.verdict}.** {escape_markdown(text)}"
        )
    parts += [escape_markdown(describe_noise(study)), "## Results", markdown_table(run_results_table(study))]
    parts += [
        "## Costs",
        markdown_table(costs_table(study)),
        "## Controlled settings",
        markdown_table(controlled_settings_table(study)),
    ]
    if study.downstream:
        parts += ["## Fine-tuning", markdown_table(downstream_table(study)), DOWNSTREAM_NOTE]
    if study.unfinished or study.left_out:
        parts += [
            "## Unfinished or unreadable",
            "\n".join(f"* {escape_markdown(text)}" for text in describe_unfinished(study)),
        ]
    if study.command:
        parts.append(f"Command: {escape_markdown(study.command)}")
    return "\n\n".join(parts) + "\n"


def describe_unfinished(study: "RunComparisonStudy") -> list[str]:
    """List the unfinished runs with their last logged step, and the runs that cannot be read."""
    steps = {name: f"step {step:,}" if step else "no step logged" for name, step in study.unfinished}
    return [f"{name} ({text})" for name, text in [*steps.items(), *study.left_out]]


def escape_markdown(text: str) -> str:
    """Escape text so that nothing in it is Markdown, HTML or the end of a table cell."""
    text = "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(table: ReportTable) -> str:
    """Render a table as Markdown."""
    rules = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    rows = [map(escape_markdown, table.header), rules, *(map(escape_markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report_csv(study: "RunComparisonStudy") -> str:
    """Render a report as CSV: a row per finished run, unrounded, in FLOPs, nats and shares from 0 to 1."""
    rows = [_report_csv_row(study, run) for run in study.runs]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _report_csv_row(study: "RunComparisonStudy", run: RunRecord) -> dict[str, Any]:
    held_out, flops, distill = run.summary["held_out"], run.summary["flops"], run.config["distill"]
    comparison = find_comparison(study, run)
    reach = comparison.reach if comparison else None
    baseline_flops = study.baseline.summary["flops"]["total"] if study.baseline else None
    training = _prior_training_flops(flops)
    return {
        "run": run.name,
        "label": run.label,
        "role": run.role,
        "seed": run.config["seed"],
        "layers": run.config["model"]["num_hidden_layers"],
        "hidden": run.config["model"]["hidden_size"],
        "teacher": run.teacher,
        **{
            key: describe_schedule(distill[key]) if run.teacher else ""
            for key in ("alpha_hard", "alpha_soft")
        },
        "temperature": describe_schedule(distill["temperature"]) if run.teacher else "",
        "steps": run.summary["steps"],
        **{key: held_out.get(key) for key in ("held_out_loss", "standard_error", "perplexity")},
        **{key: held_out.get(key) for key in PER_BYTE_KEYS},
        **{key: held_out.get(key) for key in ("top1_accuracy", "top5_accuracy", "predictions", "documents")},
        "difference": comparison.difference if comparison else None,
        "paired_standard_error": comparison.error if comparison else None,
        "noise": study.noise.value if study.noise else None,
        "verdict": comparison.verdict if comparison else None,
        "student_flops": flops["student"],
        "teacher_forward_flops": flops["teacher_forward"],
        "total_flops": flops["total"],
        "relative_cost": flops["total"] / baseline_flops if baseline_flops else None,
        "teacher_training_flops": flops["teacher_training"],
        "source_training_flops": flops.get("source_training", 0.0),
        "steps_to_reach_alone": reach.steps if reach else None,
        "flops_to_reach_alone": reach.flops if reach else None,
        "with_teacher_training": reach.flops + training if reach and training is not None else None,
        "seconds": run.summary["seconds_of_this_process"],
        "tokens_per_second": _tokens_per_second(run),
        "skipped_updates": run.summary["skipped_updates"],
        "device": run.summary.get("device"),
    }
