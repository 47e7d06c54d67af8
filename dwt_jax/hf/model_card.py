"""The model card: a README.md with the hub's YAML header, written from what a run knows of itself."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwt_jax.config import Config, Model, Schedule
from dwt_jax.hf.names import FAMILIES, architecture
from dwt_jax.runs.metric_writer import amount, number, plus_minus

_TASKS = {"mlm": "fill-mask", "classifier": "text-classification"}
_CLASSES = {"mlm": "AutoModelForMaskedLM", "classifier": "AutoModelForSequenceClassification"}


def of_run(config: Config, heads: Sequence[str], summary: Mapping[str, Any], step: int) -> str:
    """The card of a run's model after `step` steps.

    summary: what is known of the run, as in its summary.json (which a run that goes on does
    not have yet): held_out, teacher, data, flops, versions, device.
    """
    name = _name(config.model)
    held_out = summary.get("held_out")
    tags = ["dwt-jax", *(["distillation"] if config.teacher.path else []), "pretraining"]
    header = _header(config.model, heads, tags, name, held_out)
    parts = [
        f"# {name}",
        _model(config.model, heads),
        _training(config, summary, step),
        _start(config, summary),
        _teacher(config, summary),
        _results(held_out),
        _cost(summary),
        _use(heads),
    ]
    return header + "\n" + _joined(parts)


def of_directory(
    model: Model, heads: Sequence[str], source: str, theirs: str = "", *, tokenizer: bool = True
) -> str:
    """The card of a model that came from elsewhere, with no card or with one that tells of parts that
    are left out here (`theirs`): its licence and text are handed on."""
    name = _name(model)
    origin = f"Written by dwt-jax from the model directory `{source}`, "
    if not theirs:
        parts = [f"# {name}", _model(model, heads), f"{origin}which had no card of its own."]
        return _header(model, heads, ["dwt-jax"], name) + "\n" + _joined([*parts, _use(heads, tokenizer)])
    said, text = _taken_apart(theirs)
    parts = [
        f"# {name}",
        _model(model, heads),
        f"{origin}of which parts are left out. What follows its use is the card of the whole.",
        _use(heads, tokenizer),
        f"## The card of `{source}`",
        text,
    ]
    handed_on = _handed_on(said)
    return _header(model, heads, ["dwt-jax"], name, handed_on=handed_on) + "\n" + _joined(parts)


def of_its_own(directory: Path) -> str:
    """The card that lies in a model directory, "" where there is none."""
    path = directory / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def of_remapped(
    model: Model, heads: Sequence[str], source: str, method: str, exact: bool, theirs: str = ""
) -> str:
    """The card of what `dwt remap` wrote: not trained since. The licence of the source's card (`theirs`)
    is handed on."""
    name = _name(model)
    kept = "It computes what that did." if exact else "It computes something else, and wants training."
    origin = (
        f"Grown by dwt-jax from the model directory `{source}` by `{method}` (parameter remapping). {kept}"
    )
    parts = [f"# {name}", _model(model, heads), origin, _use(heads)]
    handed_on = _handed_on(_taken_apart(theirs)[0])
    return _header(model, heads, ["dwt-jax", "remapped"], name, handed_on=handed_on) + "\n" + _joined(parts)


def of_classifier(model: Model, source: str, config: Any, results: Mapping[str, Any]) -> str:
    """The card of a fine-tuned model. config: a finetune.config.FineTune; results: its results.json."""
    heads, name = ("pooler", "classifier"), f"{_name(model)}, {config.examples.task}"
    recipe, rate = config.recipe, config.recipe.optimizer.learning_rate
    winner = results["seeds"][str(results["model_of_seed"])]
    chosen = winner["history"][winner["best_epoch"] - 1]["dev"]
    rows = [(split, metric, chosen[split][metric]) for split in chosen for metric in results["metrics"]]
    kind = {"builtin": "the built-in corpus", "files": "files"}.get(config.examples.kind, "GLUE")
    task = {"type": "text-classification", "name": config.examples.task}
    shown = [{"type": m, "name": f"{split} {m}", "value": value} for split, m, value in rows]
    result = {"task": task, "dataset": {"type": "text", "name": kind}, "metrics": shown}
    index = {"model-index": [{"name": name, "results": [result]}]}
    best, last = (
        f"{results[which]['mean']:.4f}"
        + ("" if (spread := results[which]["standard_deviation"]) is None else f" ± {spread:.4f}")
        for which in ("best", "last")
    )
    parts = [
        f"# {name}",
        _model(model, heads),
        f"`{source}` fine-tuned by dwt-jax on the task {config.examples.task} ({kind}): "
        f"{results['examples']['train']:,} examples, {recipe.epochs} epochs in batches of "
        f"{recipe.batch_size}, up to {recipe.max_length} tokens, AdamW at {rate.value:g} ({rate.kind}, "
        f"warm-up {rate.warmup:.0%}), weight decay {recipe.optimizer.weight_decay:g}, dropout "
        f"{recipe.dropout:g}.",
        "## Results\n"
        f"The best epoch ({winner['best_epoch']}) of the best of {len(results['seeds'])} seeds "
        f"({results['model_of_seed']}), chosen by the same dev set that it is scored on, which flatters it:",
        "\n".join(
            ["| split | metric | |", "|---|---|---|", *(f"| {s} | {m} | {v:.4f} |" for s, m, v in rows)]
        ),
        f"Over all seeds the score is {best} at the best epoch and {last} at the last one (± standard "
        "deviation).",
        _use(heads),
    ]
    return _header(model, heads, ["dwt-jax"], name, handed_on=index) + "\n" + _joined(parts)


_HANDED_ON = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def _handed_on(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: header[key] for key in _HANDED_ON if key in header}


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _taken_apart(card: str) -> tuple[Mapping[str, Any], str]:
    """(what the header says, the text) of a card."""
    import yaml

    card = card.removeprefix("\ufeff")
    if not card.startswith("---\n"):
        return {}, card.strip()
    header, _, text = card[4:].partition("\n---")
    try:
        said = yaml.safe_load(header)
    except (yaml.YAMLError, RecursionError):
        said = None
    return (said if isinstance(said, dict) else {}), text.strip()


def _name(model: Model) -> str:
    return f"{FAMILIES[model.model_type].name} {model.num_hidden_layers} x {model.hidden_size}"


def _header(
    model: Model,
    heads: Sequence[str],
    tags: list[str],
    name: str,
    held_out: Mapping[str, Any] | None = None,
    handed_on: Mapping[str, Any] = {},
) -> str:
    import yaml

    task = next((_TASKS[head] for head in _TASKS if head in heads), "feature-extraction")
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": [*tags, model.model_type],
        **handed_on,
    }
    if held_out:
        shown = {"held_out_loss": "loss", "perplexity": "perplexity", "top1_accuracy": "accuracy"}
        metrics = [
            {"type": kind, "name": key, "value": held_out[key]}
            for key, kind in shown.items()
            if math.isfinite(held_out[key])
        ]
        result = {
            "task": {"type": task, "name": "Masked language modelling"},
            "dataset": {"type": "text", "name": "held-out documents of the training corpus"},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _model(model: Model, heads: Sequence[str]) -> str:
    return (
        f"`{architecture(FAMILIES[model.model_type], heads)}`: {model.num_hidden_layers} layers, hidden size "
        f"{model.hidden_size}, {model.num_attention_heads} heads, intermediate size "
        f"{model.intermediate_size}, {model.vocab_size:,} tokens, rows of up to {model.max_length} tokens."
    )


def _training(config: Config, summary: Mapping[str, Any], step: int) -> str:
    train, data = config.train, config.data
    sources = ", ".join(f"{s.kind}" + (f" `{Path(s.path).name}`" if s.path else "") for s in data.sources)
    tokens = step * train.batch_size * data.sequence_length
    rate = config.optimizer.learning_rate
    lines = [
        "## Training",
        f"* {step:,} of {train.steps:,} steps of {train.batch_size} rows of {data.sequence_length} tokens "
        f"({amount(tokens)} positions), seed {config.seed}",
        f"* data: {sources}; {config.mask.rate:.0%} of the tokens predicted",
        f"* AdamW, learning rate {rate.value:g} ({rate.kind}, warm-up {rate.warmup:.0%}), "
        f"weight decay {config.optimizer.weight_decay:g}",
    ]
    if found := summary.get("data"):
        lines[2] += f"; {found['train_tokens']:,} tokens in {found['train_documents']:,} documents"
    return "\n".join(lines)


def _start(config: Config, summary: Mapping[str, Any]) -> str:
    if not config.init.method:
        return ""
    who = f"`{Path(config.init.from_ or config.teacher.path).name}`"
    text = f"## Start\nGrown by `{config.init.method}` (parameter remapping) from {who}"
    if found := summary.get("init"):
        text += f", {found['num_hidden_layers']} layers of hidden size {found['hidden_size']}"
        amid = found.get("step", 0)
        text += f", after {amid:,} of its steps" if amid else ""
        text += f"; before the {'next' if amid else 'first'} step it computed what that did" * found["exact"]
    return text + "."


def _teacher(config: Config, summary: Mapping[str, Any]) -> str:
    if not config.teacher.path:
        return "## Teacher\nNone: the masked-LM loss alone."
    distill = config.distill
    found = summary.get("teacher")
    who = f"`{Path(config.teacher.path).name}`"
    if found:
        who += f", {found['num_hidden_layers']} layers of hidden size {found['hidden_size']}"
    return "\n".join(
        [
            "## Teacher",
            f"Distilled from a weak teacher ({who}) while pre-training: loss = α_h · hard + α_s · soft.",
            f"* preset {distill.preset}; α_h {_schedule(distill.alpha_hard)}; "
            f"α_s {_schedule(distill.alpha_soft)}; temperature {_schedule(distill.temperature)}",
            f"* {distill.divergence}, positions: {distill.selection}"
            + (
                f"; the teacher took part in {summary['teacher_steps']:,} steps"
                if "teacher_steps" in summary
                else ""
            ),
        ]
    )


def _schedule(schedule: Schedule) -> str:
    if schedule.kind == "constant":
        return f"{schedule.value:g}"
    if schedule.kind == "until_beaten":
        return f"{schedule.value:g} until the student is as good as the teacher"
    share = f"{schedule.kind}, from {schedule.begin:.0%} to {schedule.until:.0%} of the steps"
    return f"{schedule.value:g} to {schedule.end:g} ({share})"


def _results(held_out: Mapping[str, Any] | None) -> str:
    if not held_out:
        return "## Results\nNot evaluated at this step."
    rows = [
        ("loss (nats)", plus_minus(held_out["held_out_loss"], held_out["standard_error"])),
        ("perplexity", number(held_out["perplexity"], 2)),
        ("top-1 accuracy", f"{held_out['top1_accuracy']:.2%}"),
        ("top-5 accuracy", f"{held_out['top5_accuracy']:.2%}"),
    ]
    return "\n".join(
        [
            "## Results",
            f"Masked-LM on {held_out['documents']:,} held-out documents ({held_out['predictions']:,} "
            "predictions, 15 % of the tokens, fixed masks; ± is the standard error over documents):",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _cost(summary: Mapping[str, Any]) -> str:
    if not (flops := summary.get("flops")):
        return ""
    own, grown = _amount(flops["teacher_training"]), flops.get("source_training", 0)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        "## Cost",
        f"* student {flops['student']:.3g} FLOPs, teacher's forward passes {flops['teacher_forward']:.3g}",
        *([f"* the teacher's own pre-training: {own}"] if summary.get("teacher") else []),
        *([f"* that of the model it was grown from: {_amount(grown)}"] if grown != 0 else []),
        f"* {summary['device']}; {versions}",
    ]
    return "\n".join(lines)


def _amount(flops: float | None) -> str:
    return "unknown" if flops is None else f"{flops:.3g} FLOPs"


def _use(heads: Sequence[str], tokenizer: bool = True) -> str:
    auto = next((_CLASSES[head] for head in _CLASSES if head in heads), "AutoModel")
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if tokenizer else ""), ""]
    lines += [f'model = {auto}.from_pretrained("PATH")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("PATH")'] if tokenizer else []
    return "\n".join(["## Use", "```python", *lines, "```"])
