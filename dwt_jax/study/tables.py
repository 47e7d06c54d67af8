"""A study in words and tables, as plain text; and as Markdown and CSV."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwt_jax.config_loader import flatten_dict
from dwt_jax.finetune.tasks import format_percent
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.study import charts
from dwt_jax.text_format import format_float, format_with_error

if TYPE_CHECKING:  # report.py calls this file
    from dwt_jax.study.report import BaselineComparison, RunComparisonStudy, RunRecord

VERDICTS = ("helped", "harmed", "undecided", "not comparable")


class ReportTable(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # how many of the first columns are words; the others are numbers


def report_headline(study: "RunComparisonStudy") -> str:
    """The result in one sentence."""
    if not study.comparisons:
        return "No distilled student to compare with a student alone."
    verdicts = [comparison.verdict for comparison in study.comparisons]
    if len(verdicts) == 1:
        return {
            "helped": "The teacher helped.",
            "harmed": "The teacher harmed.",
            "undecided": "Whether the teacher helped is undecided.",
            "not comparable": "The student with the teacher cannot be compared with the student alone.",
        }[verdicts[0]]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts]
    return f"Of {len(verdicts)} students with a teacher: {', '.join(counts)}."


def comparison_findings(comparison: "BaselineComparison", study: "RunComparisonStudy") -> list[str]:
    """What is to be said of one distilled student."""
    run, base = comparison.run, study.baseline
    assert base is not None  # a comparison has one
    if comparison.verdict == "not comparable":
        losses = (
            f"Held-out loss {format_float(run.loss, 4)}; the student alone has {format_float(base.loss, 4)}"
        )
        return [f"{losses}, but {comparison.why}."]
    side = "above" if comparison.difference > 0 else "below"
    error = ""
    if comparison.error is not None and run.documents is not None:
        many = len(run.documents[0])
        error = f"; standard error {comparison.error:.4f}, paired over {many:,} held-out documents"
    first = (
        f"Held-out loss {run.loss:.4f}, {abs(comparison.difference):.4f} {side} the student alone "
        f"({base.loss:.4f}) after the same {run.summary['steps']:,} steps: {comparison.why}{error}."
    )
    caveat = [f"Not held equal: {', '.join(comparison.unequal)}."] if comparison.unequal else []
    return [first, _describe_target(comparison, base), *caveat]


def _describe_target(comparison: "BaselineComparison", base: "RunRecord") -> str:
    reach, flops = comparison.reach, comparison.run.summary["flops"]
    if reach is None:
        return "It never reached the final loss of the student alone."
    alone = base.summary["flops"]["total"]
    at_most = " (at its first evaluation, perhaps earlier)" if reach.at_most else ""
    text = (
        f"It reached the final loss of the student alone after {reach.steps:,.0f} steps{at_most}, "
        f"{_format_percent(reach.steps / base.summary['steps'])} of its steps, and {_format_flops(reach.flops)} with the "
        f"teacher's forward charged, {_format_percent(reach.flops / alone)} of its FLOPs; "
    )
    before, whose = _prior_training_flops(flops), "teacher's"
    if "source_training" in flops:
        whose = "teacher's and its source's"
    if before is None:
        return text + f"what the {whose} own training cost is unknown."
    whole = reach.flops + before
    return (
        text
        + f"with the {whose} own training charged too {_format_flops(whole)}, {_format_percent(whole / alone)}."
    )


def _prior_training_flops(flops: Mapping[str, float | None]) -> float | None:
    """What the models that a run was taught by or grown from had cost, None where it is not known."""
    return sum_or_none(flops["teacher_training"], flops.get("source_training", 0.0))


def describe_noise(study: "RunComparisonStudy") -> str:
    if study.noise is None:
        return "No two runs differ by their seed alone: the noise is unknown, and nothing is decided."
    names = " and ".join(f"“{run.label}”" for run in study.noise.runs)
    many = len(study.noise.runs)
    rough = (
        "a rough measure: with more seeds it may turn out larger"
        if many < 5
        else "the range of their results"
    )
    return (
        f"Noise: {names} differ by their seed alone and end {study.noise.value:.4f} nats apart. That is "
        f"{_count_in_words(many)} seeds, {rough}. A difference is called helped or harmed only if it is larger than "
        "the noise and, where the losses are known by document, than twice its paired standard error."
    )


def _count_in_words(many: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(many, str(many))


def describe_schedule(schedule: Mapping[str, Any]) -> str:
    """'4 → 1 linear', '2 → 0 cosine from 10 % to 80 %', '1, from 50 % on 0', …"""
    kind, value, end = schedule["kind"], f"{schedule['value']:g}", f"{schedule['end']:g}"
    warmup, begin, until = (
        schedule.get(key, default)
        for key, default in (("warmup_fraction", 0), ("decay_start", 0), ("decay_end", 1))
    )
    rise = f", warm-up {_format_percent(warmup)}" if warmup else ""
    if kind == "constant":
        return value + rise
    if kind == "until_matched":
        return f"{value} until the teacher is beaten{rise}"
    if kind == "piecewise":
        return f"{value}, from {_format_percent(begin)} on {end}{rise}"
    name = kind.replace("_", "-")
    span = f" from {_format_percent(begin)}" if begin > warmup else ""
    span += f" to {_format_percent(until)}" if until != 1 else ""
    return f"{value} → {end} {name}{span}{rise}"


def describe_loss_weights(config: Mapping[str, Any]) -> str:
    """The objective in words; only the parts that are not the plain one."""
    distill = config["distill"]
    if not config["teacher"]["path"]:
        return "–"
    parts = [
        f"hard {describe_schedule(distill['alpha_hard'])}",
        f"soft {describe_schedule(distill['alpha_soft'])}",
    ]
    temperature = describe_schedule(distill["temperature"])
    parts += [f"t {temperature}"] if temperature != "1" else []
    parts += ["× t²"] if distill.get("scale_by_temperature_squared") and temperature != "1" else []
    for key, plain in (("divergence", "forward_kl"), ("token_selection", "all")):
        parts += [distill[key].replace("_", " ")] if distill.get(key, plain) != plain else []
    return "; ".join(parts)


def _format_flops(value: float) -> str:
    """Three digits and the unit."""
    size, unit = charts.flop_unit(value)
    digits = len(f"{value / size:.0f}")
    return f"{value / size:.{max(0, 3 - digits)}f} {unit}"


def _format_percent(share: float) -> str:
    return f"{share * 100:.3g} %" if share < 9.995 else f"{share * 100:,.0f} %"


def _model_size(run: "RunRecord") -> str:
    return f"{run.config['model']['num_hidden_layers']}\u00a0×\u00a0{run.config['model']['hidden_size']}"


def run_label(study: "RunComparisonStudy", name: str) -> str:
    return next((run.label for run in study.runs if run.name == name), name) or "–"


def find_comparison(study: "RunComparisonStudy", run: "RunRecord") -> "BaselineComparison | None":
    return next((comparison for comparison in study.comparisons if comparison.run is run), None)


def run_results_table(study: "RunComparisonStudy") -> ReportTable:
    header = ["run", "layers × hidden", "teacher", "weights", "steps", "held-out loss ± s.e."]
    header += ["against alone ± paired s.e.", "verdict", "perplexity", "top-1", "top-5"]
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
        row += [f"{held_out[key]:.2%}".replace("%", " %") for key in ("top1_accuracy", "top5_accuracy")]
        rows.append(row)
    return ReportTable(header, rows, words=4)


def costs_table(study: "RunComparisonStudy") -> ReportTable:
    size, unit = charts.flop_unit(max(run.summary["flops"]["total"] for run in study.runs))
    alone = study.baseline.summary["flops"]["total"] if study.baseline else None
    header = [
        "run",
        f"student, {unit}",
        "teacher's forward",
        "total",
        "against alone",
        "teacher's own training"
        if not any(map(_is_grown, study.runs))
        else "teacher's and source's own training",
        "all in all",
        "against alone",
        "seconds of the last process",
        "tokens/s",
        "skipped updates",
    ]
    rows = []
    for run in study.runs:
        flops, rate = run.summary["flops"], _tokens_per_second(run)
        training = _prior_training_flops(flops)
        whole = None if training is None else flops["total"] + training
        row = [run.label, *(f"{flops[key] / size:,.2f}" for key in ("student", "teacher_forward", "total"))]
        row += [_format_percent(flops["total"] / alone) if alone else "–"]
        row += ["unknown" if training is None else f"{training / size:,.2f}"]
        row += ["unknown", "unknown"] if whole is None else [f"{whole / size:,.2f}", _relative(whole, alone)]
        row += [f"{run.summary['seconds_of_this_process']:,.0f}", "–" if rate is None else f"{rate:,.0f}"]
        row += [f"{run.summary['skipped_updates']:,}"]
        rows.append(row)
    return ReportTable(header, rows)


def _is_grown(run: "RunRecord") -> bool:
    return "source_training" in run.summary["flops"]


def _relative(value: float, base: float | None) -> str:
    return _format_percent(value / base) if base else "–"


def _tokens_per_second(run: "RunRecord") -> float | None:
    """The median, so that interruptions and neighbours do not count."""
    rates = [record["tokens_per_second"] for record in run.metrics if record.get("tokens_per_second")]
    return float(np.median(rates)) if rates else None


CONTROLLED_SETTINGS = {
    "seed": ("seed",),
    "data (digest)": ("run.data_digest",),
    "steps": ("train.steps", "train.epochs"),
    "rows a step": ("train.batch_size",),
    "tokens a row": ("data.sequence_length",),
    "student's size": ("model.",),
    "masks": ("mlm.",),
    "optimizer and learning rate": ("optimizer.",),
    "compute type": ("computed in",),
    "device": ("device",),
}


def controlled_settings_table(study: "RunComparisonStudy") -> ReportTable:
    """What was the same for all students, and who differs where it was not."""
    students = [run for run in study.runs if run.role == "student"]
    settings = [{**run.settings(), "device": run.summary.get("device", "unknown")} for run in students]
    config = students[0].config
    values = {
        "student's size": _model_size(students[0]),
        "masks": f"{_format_percent(config['mlm']['probability'])} of the tokens",
        "optimizer and learning rate": describe_schedule(config["optimizer"]["learning_rate"]),
    }
    rows = []
    for name, prefixes in CONTROLLED_SETTINGS.items():
        keys = [
            key for key in dict.fromkeys(key for one in settings for key in one) if key.startswith(prefixes)
        ]
        differing = [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]
        value = values.get(name, str(settings[0].get(prefixes[0])))
        said = []
        for key in differing:
            groups: dict[str, list[str]] = {}
            for run, one in zip(students, settings, strict=True):
                groups.setdefault(str(one.get(key)), []).append(run.label)
            said.append(
                f"{key} = " + ", ".join(f"{value} ({'; '.join(who)})" for value, who in groups.items())
            )
        if keys:
            rows.append((name, "differs" if differing else "equal", "; ".join(said) or value))
    return ReportTable(("of the students", "", "value"), rows, words=3)


def differences_table(run: "RunRecord", base: "RunRecord") -> ReportTable:
    ours, theirs = flatten_dict(run.config), flatten_dict(base.config)
    keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    rows = [(key, _json(theirs.get(key)), _json(ours.get(key))) for key in keys]
    return ReportTable(("key", base.label, run.label), rows, words=3)


def _json(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


DOWNSTREAM_NOTE = (
    "Scores on the dev set in hundredths, mean and standard deviation over the seeds of fine-tuning. The "
    "best epoch is chosen on the set that it is scored on, the last is not. One pre-training each: a "
    "difference that is not far above these deviations says nothing."
)


def downstream_table(study: "RunComparisonStudy") -> ReportTable:
    """What the runs' fine-tunings gave, a row a task."""
    rows = []
    for run in study.runs:
        for task, one in study.downstream.get(run.name, {}).get("tasks", {}).items():
            scores = [format_percent(one[which]) for which in ("last", "best")]
            rows.append((run.label, task, *scores, str(len(one["last"]["by_seed"]))))
    return ReportTable(("model", "fine-tuned on", "last epoch", "best epoch", "seeds"), rows, words=2)


def report_markdown(study: "RunComparisonStudy") -> str:
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
        "## What was held equal",
        markdown_table(controlled_settings_table(study)),
    ]
    if study.downstream:
        parts += ["## Fine-tuned", markdown_table(downstream_table(study)), DOWNSTREAM_NOTE]
    if study.unfinished:
        parts += [
            "## Not finished",
            "\n".join(f"* {escape_markdown(text)}" for text in describe_unfinished(study)),
        ]
    if study.command:
        parts.append(f"Made by: {escape_markdown(study.command)}")
    return "\n\n".join(parts) + "\n"


def describe_unfinished(study: "RunComparisonStudy") -> list[str]:
    steps = {name: f"step {step:,}" if step else "no step logged" for name, step in study.unfinished}
    return [f"{name} ({step})" for name, step in steps.items()]


def escape_markdown(text: str) -> str:
    """Plain text in Markdown: nothing in it is markup or ends a cell."""
    text = "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(table: ReportTable) -> str:
    rules = ["---" if i < table.words else "---:" for i in range(len(table.header))]
    rows = [map(escape_markdown, table.header), rules, *(map(escape_markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report_csv(study: "RunComparisonStudy") -> str:
    """One row a finished run, numbers as the files have them; FLOPs and nats, shares from 0 to 1."""
    rows = [_report_csv_row(study, run) for run in study.runs]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _report_csv_row(study: "RunComparisonStudy", run: "RunRecord") -> dict[str, Any]:
    held_out, flops, distill = run.summary["held_out"], run.summary["flops"], run.config["distill"]
    comparison = find_comparison(study, run)
    reach = comparison.reach if comparison else None
    alone = study.baseline.summary["flops"]["total"] if study.baseline else None
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
        **{key: held_out.get(key) for key in ("top1_accuracy", "top5_accuracy", "predictions", "documents")},
        "difference": comparison.difference if comparison else None,
        "paired_standard_error": comparison.error if comparison else None,
        "noise": study.noise.value if study.noise else None,
        "verdict": comparison.verdict if comparison else None,
        "student_flops": flops["student"],
        "teacher_forward_flops": flops["teacher_forward"],
        "total_flops": flops["total"],
        "relative_cost": flops["total"] / alone if alone else None,
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
