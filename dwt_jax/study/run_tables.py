"""The tables of the report on the runs in a directory."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dwt_jax.config_loader import flatten_dict
from dwt_jax.finetune.tasks import format_percent
from dwt_jax.study.charts import flop_unit
from dwt_jax.study.curves import curve_records, prior_training_flops
from dwt_jax.study.descriptions import (
    describe_batch,
    describe_loss_weights,
    describe_masks,
    describe_schedule,
)
from dwt_jax.study.report import Record, Table
from dwt_jax.study.run_comparison import BaselineComparison, RunComparisonStudy
from dwt_jax.study.run_records import RunRecord
from dwt_jax.study.statistics import Verdict
from dwt_jax.text_format import format_float, format_share, format_with_error

PER_BYTE_KEYS = ("bits_per_byte", "loss_per_byte")  # of next tokens, of masked tokens
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


def _measures(study: RunComparisonStudy, run: RunRecord) -> dict[str, float | None]:
    """Return the final measures of a run and the values derived from them; None or NaN if unknown."""
    held_out, flops, model = run.summary["held_out"], run.summary["flops"], run.config["model"]
    comparison = _find_comparison(study, run)
    reach = comparison.reach if comparison else None
    baseline_flops = study.baseline.summary["flops"]["total"] if study.baseline else math.nan
    prior, total = prior_training_flops(flops), flops["total"]
    rates = [record["tokens_per_second"] for record in run.metrics if record.get("tokens_per_second")]
    accuracies = ("top1_accuracy", "top5_accuracy")
    losses = ("held_out_loss", "standard_error", "perplexity", *PER_BYTE_KEYS)
    return {
        "layers": model["num_hidden_layers"],
        "hidden": model["hidden_size"],
        "steps": run.summary["steps"],
        **{key: held_out.get(key) for key in (*losses, *accuracies, "predictions", "documents")},
        "difference": comparison.difference if comparison else None,
        "paired_standard_error": comparison.error if comparison else None,
        "noise": study.noise.value if study.noise else None,
        "student_flops": flops["student"],
        "teacher_forward_flops": flops["teacher_forward"],
        "total_flops": total,
        "relative_cost": total / baseline_flops,
        "teacher_training_flops": flops["teacher_training"],
        "source_training_flops": flops.get("source_training", 0.0),
        "prior_training_flops": prior,
        "total_with_training_flops": None if prior is None else total + prior,
        "relative_cost_with_training": None if prior is None else (total + prior) / baseline_flops,
        "steps_to_reach_alone": reach.steps if reach else None,
        "flops_to_reach_alone": reach.flops if reach else None,
        "with_teacher_training": reach.flops + prior if reach and prior is not None else None,
        "seconds": run.summary["seconds_of_this_process"],
        # The median ignores interruptions and other jobs' load.
        "tokens_per_second": float(np.median(rates)) if rates else math.nan,
        "skipped_updates": run.summary["skipped_updates"],
    }


def tidy_records(study: RunComparisonStudy) -> Iterator[Record]:
    """Yield the tidy table: the loss at each evaluation, and all measures at the end."""
    for run in study.runs:
        seed = run.config["seed"]
        yield from curve_records(run.name, seed, run.evaluations)
        for measure, value in _measures(study, run).items():
            if value is not None and math.isfinite(value):
                yield Record(run.name, seed, "end", measure, "", value)


def _find_comparison(study: RunComparisonStudy, run: RunRecord) -> BaselineComparison | None:
    return next((comparison for comparison in study.comparisons if comparison.run is run), None)


def run_results_table(study: RunComparisonStudy) -> Table:
    """Tabulate the final losses, a row per run."""
    header = ["run", "layers × hidden", "teacher", "weights", "steps", "held-out loss ± s.e."]
    per_byte = [key for key in PER_BYTE_KEYS if any(key in run.summary["held_out"] for run in study.runs)]
    header += ["vs. baseline ± paired s.e.", "verdict", "perplexity"]
    header += [*(key.replace("_", " ") for key in per_byte), "top-1", "top-5"]
    labels = {run.name: run.label for run in study.runs}
    rows = []
    for run in study.runs:
        held_out, comparison = run.summary["held_out"], _find_comparison(study, run)
        row = [run.label, _model_size(run), labels.get(run.teacher, run.teacher) or "–"]
        row += [describe_loss_weights(run.config), f"{run.summary['steps']:,}"]
        row += [format_with_error(run.loss, held_out["standard_error"])]
        if comparison is None or comparison.verdict == Verdict.NOT_COMPARABLE:
            row += ["–", comparison.verdict if comparison else "–"]
        else:
            error = "" if comparison.error is None else f" ± {comparison.error:.4f}"
            row += [format_float(comparison.difference, 4, signed=True) + error, comparison.verdict]
        row += [format_float(held_out["perplexity"], 2)]
        row += [format_float(held_out.get(key, math.nan), 4) for key in per_byte]
        row += [f"{held_out[key]:.2%}".replace("%", " %") for key in ("top1_accuracy", "top5_accuracy")]
        rows.append(row)
    return Table(header, rows, text_columns=4, highlight=_baseline_label(study))


def _baseline_label(study: RunComparisonStudy) -> str | None:
    return study.baseline.label if study.baseline else None


def _model_size(run: RunRecord) -> str:
    return f"{run.config['model']['num_hidden_layers']}\u00a0×\u00a0{run.config['model']['hidden_size']}"


def costs_table(study: RunComparisonStudy) -> Table:
    """Tabulate FLOPs and time, a row per run."""
    size, unit = flop_unit(max(run.summary["flops"]["total"] for run in study.runs))
    is_grown = any("source_training" in run.summary["flops"] for run in study.runs)

    def in_units(flops: float) -> str:
        return f"{flops / size:,.2f}"

    def count(number: float) -> str:
        return f"{number:,.0f}"

    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        (f"student, {unit}", "student_flops", in_units),
        ("teacher's forward", "teacher_forward_flops", in_units),
        ("total", "total_flops", in_units),
        ("vs. baseline", "relative_cost", format_share),
        (
            "teacher's and source's training" if is_grown else "teacher's training",
            "prior_training_flops",
            in_units,
        ),
        ("total with training", "total_with_training_flops", in_units),
        ("vs. baseline", "relative_cost_with_training", format_share),
        ("seconds of the last process", "seconds", count),
        ("tokens/s", "tokens_per_second", count),
        ("skipped updates", "skipped_updates", count),
    )
    rows = []
    for run in study.runs:
        measures, row = _measures(study, run), [run.label]
        for _, key, format_value in columns:
            value = measures[key]
            row.append("unknown" if value is None else "–" if math.isnan(value) else format_value(value))
        rows.append(row)
    return Table(("run", *(column[0] for column in columns)), rows, highlight=_baseline_label(study))


def controlled_settings_table(study: RunComparisonStudy) -> Table:
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
    return Table(("of the students", "", "value"), rows, text_columns=3)


def differences_table(run: RunRecord, baseline: RunRecord) -> Table:
    """Tabulate the config keys in which a run differs from the baseline."""
    config, baseline_config = flatten_dict(run.config), flatten_dict(baseline.config)
    keys = [key for key in {**baseline_config, **config} if config.get(key) != baseline_config.get(key)]
    rows = [(key, _json(baseline_config.get(key)), _json(config.get(key))) for key in keys]
    return Table(("key", baseline.label, run.label), rows, text_columns=3)


def _json(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def downstream_table(study: RunComparisonStudy) -> Table:
    """Tabulate the scores of the runs' fine-tunings, a row per task."""
    rows = []
    for run in study.runs:
        for task, result in study.downstream.get(run.name, {}).get("tasks", {}).items():
            scores = [format_percent(result[epoch]) for epoch in ("last", "best")]
            rows.append((run.label, task, *scores, str(len(result["last"]["by_seed"]))))
    header = ("model", "fine-tuned on", "last epoch", "best epoch", "seeds")
    return Table(header, rows, text_columns=2, highlight=_baseline_label(study))
