"""Write model cards: a README.md with the hub's YAML header."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwt_jax.config import Config, Schedule
from dwt_jax.data.batch_ramp import count_rows, describe_rows_per_step
from dwt_jax.hf.source_card import INHERITED_KEYS, LICENSE_KEYS, inherited_metadata, split_front_matter
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import OBJECTIVE_LABELS
from dwt_jax.text_format import format_count, format_float, format_with_error

_OPTIMIZER_NAMES = {"adamw": "AdamW", "stable_adamw": "StableAdamW", "muon": "Muon with AdamW"}
_FEATURES = ("feature-extraction", "AutoModel")
_CLASSIFIER = ("text-classification", "AutoModelForSequenceClassification")
_LANGUAGE_MODELS = {
    "mlm": ("fill-mask", "AutoModelForMaskedLM"),
    "next_token": ("text-generation", "AutoModelForCausalLM"),
}
"""The hub's name of a task and the class of transformers that loads a model for it."""

_PER_BYTE_NAMES = {
    "bits_per_byte": "bits per byte",
    "loss_per_byte": "loss per byte (nats; of masked tokens, not a code length)",
}

_TASK_NAMES = {"mlm": "Masked language modelling", "next_token": "Causal language modelling"}


def _task_and_class(model: ModelConfig, heads: Sequence[str]) -> tuple[str, str]:
    if set(heads).issuperset(family(model).LM_HEADS):
        return _LANGUAGE_MODELS[model.objective]
    return _CLASSIFIER if set(heads).issuperset(family(model).CLASSIFIER_HEADS) else _FEATURES


def run_card(config: Config, heads: Sequence[str], summary: Mapping[str, Any], step: int) -> str:
    """Return the card of a run's model after `step` steps.

    Args:
        config: config of the run.
        heads: heads that the model has.
        summary: the available entries of summary.json, which an unfinished run does not have yet:
            held_out, teacher, data, flops, versions, device.
        step: training steps of the model.
    """
    name = _model_title(config.model)
    held_out = summary.get("held_out")
    tags = ["dwt-jax", *(["distillation"] if config.teacher.is_set else []), "pretraining"]
    header = _front_matter(config.model, heads, tags, name, held_out)
    parts = [
        f"# {name}",
        _model_section(config.model, heads),
        _training_section(config, summary, step),
        _init_section(config, summary),
        _teacher_section(config, summary),
        _results_section(config.model, held_out),
        _cost_section(summary),
        _usage_section(config.model, heads),
    ]
    return header + "\n" + _join_sections(parts)


def directory_card(
    model: ModelConfig, heads: Sequence[str], source: str, source_card: str = "", *, tokenizer: bool = True
) -> str:
    """Return the card of a model exported from a model directory.

    Args:
        model: config of the model.
        heads: heads that the model has.
        source: name of the directory.
        source_card: card of the directory, if it describes parts that are omitted; its licence and text are
            copied. Empty: the directory has no card.
        tokenizer: whether the model has a tokenizer.
    """
    name = _model_title(model)
    origin = f"Written by dwt-jax from the model directory `{source}`, "
    if not source_card:
        parts = [f"# {name}", _model_section(model, heads), f"{origin}which has no model card."]
        return (
            _front_matter(model, heads, ["dwt-jax"], name)
            + "\n"
            + _join_sections([*parts, _usage_section(model, heads, tokenizer)])
        )
    parts = [
        f"# {name}",
        _model_section(model, heads),
        f"{origin}with parts omitted. The card of the complete model follows after the section on use.",
        _usage_section(model, heads, tokenizer),
        f"## Model card of `{source}`",
        split_front_matter(source_card)[1],
    ]
    inherited = inherited_metadata(source_card, INHERITED_KEYS)
    return (
        _front_matter(model, heads, ["dwt-jax"], name, extra_metadata=inherited)
        + "\n"
        + _join_sections(parts)
    )


def grown_card(
    model: ModelConfig,
    heads: Sequence[str],
    source: str,
    method: str,
    function_preserving: bool,
    source_card: str = "",
) -> str:
    """Return the card of a model that `dwt remap` wrote, which has not been trained since.

    Args:
        model: config of the grown model.
        heads: heads that the model has.
        source: name of the source's directory.
        method: growth method.
        function_preserving: whether the model computes the same function as the source.
        source_card: card of the source; its licence, language and data are copied.
    """
    name = _model_title(model)
    verdict = (
        "It computes the same function."
        if function_preserving
        else "It computes a different function and needs training."
    )
    origin = (
        f"Grown by dwt-jax from the model directory `{source}` by `{method}` (parameter remapping). {verdict}"
    )
    parts = [f"# {name}", _model_section(model, heads), origin, _usage_section(model, heads)]
    inherited = {**inherited_metadata(source_card, INHERITED_KEYS), "base_model": source}
    return (
        _front_matter(model, heads, ["dwt-jax", "remapped"], name, extra_metadata=inherited)
        + "\n"
        + _join_sections(parts)
    )


def classifier_card(
    model: ModelConfig, source: str, config: Any, results: Mapping[str, Any], source_card: str = ""
) -> str:
    """Return the card of a fine-tuned model.

    Args:
        model: config of the model.
        source: name of the pre-trained model, the `base_model` of the card.
        config: a finetune.config.FineTune.
        results: content of the run's results.json.
        source_card: card of the pre-trained model; its licence and language are copied.
    """
    heads, name = family(model).CLASSIFIER_HEADS, f"{_model_title(model)}, {config.examples.task}"
    recipe, learning_rate = config.recipe, config.recipe.optimizer.learning_rate
    best_record = results["seeds"][str(results["model_of_seed"])]
    dev_scores = best_record["history"][best_record["best_epoch"] - 1]["dev"]
    rows = [
        (split, metric, dev_scores[split][metric]) for split in dev_scores for metric in results["metrics"]
    ]
    kind = {"builtin": "the built-in corpus", "files": "files"}.get(config.examples.kind, "GLUE")
    best, last = (_format_mean(results[epoch]) for epoch in ("best", "last"))
    parts = [
        f"# {name}",
        _model_section(model, heads),
        f"`{source}` fine-tuned by dwt-jax on the task {config.examples.task} ({kind}): "
        f"{results['examples']['train']:,} examples, {recipe.epochs} epochs in batches of "
        f"{recipe.batch_size}, up to {recipe.max_length} tokens, {_OPTIMIZER_NAMES[recipe.optimizer.kind]} "
        f"at {learning_rate.value:g} ({learning_rate.kind}, warm-up {learning_rate.warmup_fraction:.0%}), "
        f"weight decay {recipe.optimizer.weight_decay:g}, dropout {recipe.dropout:g}.",
        "## Results\n"
        f"This is the best epoch ({best_record['best_epoch']}) of the best of {len(results['seeds'])} seeds "
        f"({results['model_of_seed']}). It was selected on the dev set on which it is scored, so the score "
        "is optimistic:",
        "\n".join(
            ["| split | metric | |", "|---|---|---|", *(f"| {s} | {m} | {v:.4f} |" for s, m, v in rows)]
        ),
        f"Over all seeds the score is {best} at the best epoch and {last} at the last one (± standard "
        "deviation).",
        _usage_section(model, heads),
    ]
    metadata = {
        **inherited_metadata(source_card, LICENSE_KEYS),
        "base_model": source,
        "model-index": [_task_results(name, config.examples.task, kind, rows)],
    }
    header = _front_matter(model, heads, ["dwt-jax"], name, extra_metadata=metadata)
    return header + "\n" + _join_sections(parts)


def _format_mean(scores: Mapping[str, Any]) -> str:
    deviation = scores["standard_deviation"]
    return f"{scores['mean']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _task_results(name: str, task: str, kind: str, rows: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """The model-index entry of a fine-tuned model."""
    result = {
        "task": {"type": "text-classification", "name": task},
        "dataset": {"type": "text", "name": kind},
        "metrics": [{"type": m, "name": f"{split} {m}", "value": value} for split, m, value in rows],
    }
    return {"name": name, "results": [result]}


def _join_sections(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _model_title(model: ModelConfig) -> str:
    class_prefix = family(model).HF_NAMES[model.model_type].class_prefix
    return f"{class_prefix} {model.num_hidden_layers} x {model.hidden_size}"


def _front_matter(
    model: ModelConfig,
    heads: Sequence[str],
    tags: list[str],
    name: str,
    held_out: Mapping[str, Any] | None = None,
    extra_metadata: Mapping[str, Any] = {},
) -> str:
    import yaml

    task = _task_and_class(model, heads)[0]
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": [*tags, model.model_type],
        **extra_metadata,
    }
    if held_out:
        metric_types = {
            "held_out_loss": "loss",
            "perplexity": "perplexity",
            "bits_per_byte": "bits_per_byte",
            "top1_accuracy": "accuracy",
        }
        metrics = [
            {"type": kind, "name": key, "value": held_out[key]}
            for key, kind in metric_types.items()
            if math.isfinite(held_out.get(key, math.nan))
        ]
        result = {
            "task": {"type": task, "name": _TASK_NAMES[model.objective]},
            "dataset": {"type": "text", "name": "held-out documents of the training corpus"},
            "metrics": metrics,
        }
        header["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _model_section(model: ModelConfig, heads: Sequence[str]) -> str:
    architecture = family(model).HF_NAMES[model.model_type].architecture_name(heads)
    return (
        f"`{architecture}`: {model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} heads, intermediate size "
        f"{model.intermediate_size}, {model.vocab_size:,} tokens, rows of up to {model.max_length} tokens."
    )


def _training_section(config: Config, summary: Mapping[str, Any], step: int) -> str:
    train, data = config.train, config.data
    sources = ", ".join(f"{s.kind}" + (f" `{Path(s.path).name}`" if s.path else "") for s in data.sources)
    num_rows, data_stats = count_rows(train, step), summary.get("data", {})
    counts = f"{format_count(num_rows * data.sequence_length)} positions"
    if "tokens_per_row" in data_stats:
        counts += f", {format_count(num_rows * data_stats['tokens_per_row'])} tokens without padding"
    learning_rate = config.optimizer.learning_rate
    predicted = "every next token"
    if config.model.objective == "mlm":
        predicted = f"{_format_schedule(config.mlm.probability, '.0%')} of the tokens"
    lines = [
        "## Training",
        f"* {step:,} of {train.steps:,} steps of {describe_rows_per_step(train)} of {data.sequence_length} "
        f"positions ({counts}), seed {config.seed}",
        f"* data: {sources}; {predicted} predicted",
        f"* {_OPTIMIZER_NAMES[config.optimizer.kind]}, learning rate {learning_rate.value:g} "
        f"({learning_rate.kind}, warm-up {learning_rate.warmup_fraction:.0%}), "
        f"weight decay {config.optimizer.weight_decay:g}",
    ]
    if data_stats:
        lines[2] += f"; {data_stats['train_tokens']:,} tokens in {data_stats['train_documents']:,} documents"
    return "\n".join(lines)


def _init_section(config: Config, summary: Mapping[str, Any]) -> str:
    if not config.init.method:
        return ""
    source_name = f"`{Path(config.init.from_ or config.teacher.path).name}`"
    text = f"## Start\nGrown by `{config.init.method}` (parameter remapping) from {source_name}"
    if source := summary.get("init"):
        text += f", {source['num_hidden_layers']} layers of hidden size {source['hidden_size']}"
        source_step = source.get("step", 0)
        text += f", after {source_step:,} of its steps" if source_step else ""
        if source["function_preserving"]:
            text += f"; before the {'next' if source_step else 'first'} step it computed the same function"
    return text + "."


def _teacher_section(config: Config, summary: Mapping[str, Any]) -> str:
    if not config.teacher.is_set:
        return f"## Teacher\nNone: trained with the {OBJECTIVE_LABELS[config.model.objective]} loss only."
    distill = config.distill
    names = _teacher_names(config, summary)
    teacher_name = f"a weak teacher ({names[0]})"
    if len(names) > 1:
        teacher_name = f"the mean of the probabilities of several teachers ({'; '.join(names)})"
    return "\n".join(
        [
            "## Teacher",
            f"Distilled from {teacher_name} while pre-training: loss = α_h · hard + α_s · soft.",
            f"* preset {distill.preset}; α_h {_format_schedule(distill.alpha_hard)}; "
            f"α_s {_format_schedule(distill.alpha_soft)}; "
            f"temperature {_format_schedule(distill.temperature)}",
            f"* divergence {distill.divergence}; token selection {distill.token_selection}"
            + (
                f"; {summary['teacher_steps']:,} steps with the teacher" if "teacher_steps" in summary else ""
            ),
        ]
    )


def _teacher_names(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Return the name, weight and size of each teacher, as far as known."""
    if config.teacher.cache and not config.teacher.model_paths:
        return [f"its answers in `{Path(config.teacher.cache).name}`"]
    names = [f"`{Path(path).name}`" for path in config.teacher.model_paths]
    if config.teacher.weights:
        weighted = zip(names, config.teacher.weights, strict=True)
        names = [f"{name}, weight {weight:g}" for name, weight in weighted]
    if sizes := summary.get("teachers"):
        sized = zip(names, sizes, strict=True)
        names = [
            f"{name}, {size['num_hidden_layers']} layers of hidden size {size['hidden_size']}"
            for name, size in sized
        ]
    return names


def _format_schedule(schedule: Schedule, number: str = "g") -> str:
    """Return a schedule in words, with its values in the format `number`."""
    if schedule.kind == "constant":
        return f"{schedule.value:{number}}"
    if schedule.kind == "until_matched":
        return f"{schedule.value:{number}} until the student matches the teacher"
    if schedule.boundaries:
        stages = zip(schedule.boundaries, schedule.boundary_values, strict=True)
        later = "".join(f", {value:{number}} from {start:.0%} of the steps on" for start, value in stages)
        return f"{schedule.value:{number}}{later}"
    kind = schedule.kind if schedule.decay_type == "linear" else f"{schedule.kind} by {schedule.decay_type}"
    span = f"{kind}, from {schedule.decay_start:.0%} to {schedule.decay_end:.0%} of the steps"
    return f"{schedule.value:{number}} to {schedule.end:{number}} ({span})"


def _results_section(model: ModelConfig, held_out: Mapping[str, Any] | None) -> str:
    if not held_out:
        return "## Results\nNot evaluated at this step."
    rows = [
        ("loss (nats)", format_with_error(held_out["held_out_loss"], held_out["standard_error"])),
        ("perplexity", format_float(held_out["perplexity"], 2)),
        *((name, format_float(held_out[key], 4)) for key, name in _PER_BYTE_NAMES.items() if key in held_out),
        ("top-1 accuracy", f"{held_out['top1_accuracy']:.2%}"),
        ("top-5 accuracy", f"{held_out['top5_accuracy']:.2%}"),
    ]
    masks = ", 15 % of the tokens, fixed masks" if model.objective == "mlm" else ""
    return "\n".join(
        [
            "## Results",
            f"{_TASK_NAMES[model.objective]} on {held_out['documents']:,} held-out documents "
            f"({held_out['predictions']:,} predictions{masks}; ± is the standard error over documents):",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _cost_section(summary: Mapping[str, Any]) -> str:
    if not (flops := summary.get("flops")):
        return ""
    teacher_cost, source_flops = _format_flops(flops["teacher_training"]), flops.get("source_training", 0)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        "## Cost",
        f"* student {flops['student']:.3g} FLOPs, teacher's forward passes {flops['teacher_forward']:.3g}",
        *([f"* pre-training of the teacher: {teacher_cost}"] if flops["teacher_training"] != 0 else []),
        *(
            [f"* pre-training of the model it was grown from: {_format_flops(source_flops)}"]
            if source_flops != 0
            else []
        ),
        f"* {summary['device']}; {versions}",
    ]
    return "\n".join(lines)


def _format_flops(flops: float | None) -> str:
    return "unknown" if flops is None else f"{flops:.3g} FLOPs"


def _usage_section(model: ModelConfig, heads: Sequence[str], tokenizer: bool = True) -> str:
    auto_class = _task_and_class(model, heads)[1]
    lines = [f"from transformers import {auto_class}" + (", AutoTokenizer" if tokenizer else ""), ""]
    lines += [f'model = {auto_class}.from_pretrained("PATH")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("PATH")'] if tokenizer else []
    return "\n".join(["## Use", "```python", *lines, "```"])
