"""Reject config keys that are set but have no effect. This module does not import jax."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dwt_jax.config import Config, Data, Optimizer, Schedule, Source, Tokenizer
from dwt_jax.errors import UserError
from dwt_jax.files import user_path
from dwt_jax.model_files import is_model_file, read_model_json

Kinds = Mapping[str, tuple[str, ...]]
"""The values of `kind` that each key belongs to. Keys that are not in it belong to all."""

_DECAYS = ("linear", "cosine", "warmup_stable_decay")
_KINDS_OF_SCHEDULE_KEYS: Kinds = {
    "end": (*_DECAYS, "piecewise"),
    "decay_start": (*_DECAYS, "piecewise"),
    "decay_end": _DECAYS,
}
_KINDS_OF_SOURCE_KEYS: Kinds = {
    "path": ("text", "jsonl", "csv", "parquet", "tfds"),
    "documents": ("text",),
    "blank_lines": ("text",),
    "field": ("jsonl", "csv", "parquet", "tfds"),
    "split": ("tfds",),
    "data_dir": ("tfds",),
}
_KINDS_OF_OPTIMIZER_KEYS: Kinds = dict.fromkeys(("momentum", "ns_steps", "adam_lr_ratio"), ("muon",))
_KEYS_WITHOUT_TEACHER = ("preset", "alpha_hard", "loss_chunk_rows")  # `check` reports preset


def check_all_used(config: Config, overrides: Collection[str] = ()) -> Config:
    """Return a config as the user wrote it if every value in it that is not a default has an effect.

    Resolved configs, in which `train.steps` may come from `train.epochs`, are not checked.

    Args:
        config: the config.
        overrides: keys of the command line. `train.steps` there takes precedence over epochs of the file.

    Raises:
        UserError: a key has a value but no effect, with the key that decides this.
    """
    for problem in _problems(config, overrides):
        raise UserError(f"config: {problem}")
    return config


def check_data_used(data: Data, overrides: Collection[str] = ()) -> Data:
    """Return the section `data` as the user wrote it. Args and errors are those of `check_all_used`."""
    for problem in _data_problems(data, overrides):
        raise UserError(f"config: {problem}")
    return data


def keys_of_other_kinds(
    group: Any, name: str, kinds_of_keys: Kinds, default: Any, overrides: Collection[str]
) -> Iterator[str]:
    """Yield one line for each key that is set but belongs to another value of `kind`.

    Args:
        group: a dataclass with the field `kind`.
        name: its dotted key.
        kinds_of_keys: the kinds of the keys to check.
        default: a group with the values that are not reported.
        overrides: keys of the command line. A `kind` there takes precedence over what a file has for another.
    """
    for key, kinds in kinds_of_keys.items():
        value = getattr(group, key)
        is_overridden = f"{name}.kind" in overrides and f"{name}.{key}" not in overrides
        if group.kind not in kinds and value != getattr(default, key) and not is_overridden:
            expected = " or ".join(repr(kind) for kind in kinds)
            shown = list(value) if isinstance(value, tuple) else value
            yield f"{name}.{key} is {shown!r}, expected {name}.kind {expected} with it (it is {group.kind!r})"


def unused_optimizer_keys(optimizer: Optimizer, name: str, overrides: Collection[str]) -> Iterator[str]:
    """Yield one line for each key of an optimizer that has a value but no effect.

    Args:
        optimizer: the section to check.
        name: its dotted key.
        overrides: keys of the command line.
    """
    yield from keys_of_other_kinds(optimizer, name, _KINDS_OF_OPTIMIZER_KEYS, Optimizer(), overrides)
    yield from _schedule_problems(optimizer.learning_rate, f"{name}.learning_rate", overrides)


def _schedule_problems(schedule: Schedule, name: str, overrides: Collection[str]) -> Iterator[str]:
    for problem in keys_of_other_kinds(schedule, name, _KINDS_OF_SCHEDULE_KEYS, Schedule(), overrides):
        yield f"{problem}; for a constant, give a number instead of the group: {name}={schedule.value:g}"
    stages = schedule.boundaries, schedule.decay_start, schedule.warmup_fraction
    if schedule.kind == "piecewise" and not any(stages):
        yield f"{name}.decay_start is 0, expected more than 0 with kind 'piecewise': the start of `end`"


def _data_problems(data: Data, overrides: Collection[str]) -> Iterator[str]:
    for i, source in enumerate(data.sources):
        name = f"data.sources.{i}"
        yield from keys_of_other_kinds(source, name, _KINDS_OF_SOURCE_KEYS, Source(), overrides)
        if source.documents != "blank_lines" and source.blank_lines != Source.blank_lines:
            expected = f"{name}.documents 'blank_lines' with it"
            yield f"{name}.blank_lines is {source.blank_lines}, expected {expected}"
    yield from _tokenizer_problems(data.tokenizer, overrides)


def _tokenizer_problems(tokenizer: Tokenizer, overrides: Collection[str]) -> Iterator[str]:
    """Yield one line for each setting without effect beside data.tokenizer.path.

    A path of the command line takes precedence over the settings of a file.
    """
    if not tokenizer.path:
        return
    rules = dict.fromkeys(
        ("vocab_size", "alphabet_size", "sample_megabytes"),
        "data.tokenizer.path empty with it (the setting is for training a tokenizer)",
    )
    if not _may_set_lowercase(user_path(tokenizer.path)):
        rules["lowercase"] = "data.tokenizer.path to be a vocab.txt without do_lower_case beside it"
    for name, expected in rules.items():
        key, value = f"data.tokenizer.{name}", getattr(tokenizer, name)
        is_overridden = "data.tokenizer.path" in overrides and key not in overrides
        if value != getattr(Tokenizer, name) and not is_overridden:
            yield f"{key} is {value!r}, expected {expected}"


def _may_set_lowercase(path: Path) -> bool:
    """Whether `data.tokenizer.lowercase` has an effect: only on a vocab.txt whose settings do not say."""
    vocab_path = path / "vocab.txt" if path.is_dir() else path
    if vocab_path.suffix == ".json" or (path.is_dir() and (path / "tokenizer.json").exists()):
        return False
    settings = vocab_path.with_name("tokenizer_config.json")
    has_settings = is_model_file(settings)
    return not (has_settings and "do_lower_case" in read_model_json(settings, "a tokenizer's settings"))


def _problems(config: Config, overrides: Collection[str]) -> Iterator[str]:
    """Yield one line for each key that has a value but no effect beside the others."""
    distill, model = config.distill, config.model
    teacher_keys = [f"distill.{f.name}" for f in fields(distill) if f.name not in _KEYS_WITHOUT_TEACHER]
    rules: list[tuple[bool, str, Sequence[str]]] = [
        (
            not config.teacher.is_set,
            "teacher.path to name a teacher (it is empty)",
            teacher_keys,
        ),
        (
            not config.teacher.model_paths or bool(config.teacher.cache),
            "teacher.path to name a teacher, and no teacher.cache",
            ["teacher.dtype"],
        ),
        (
            distill.alpha_soft.kind != "until_matched",
            "distill.alpha_soft.kind 'until_matched' with it",
            ["distill.match_margin", "distill.gap_ema_decay"],
        ),
        (
            distill.token_selection != "entropy",
            "distill.token_selection 'entropy' with it",
            ["distill.drop_fraction"],
        ),
        (
            config.init.method != "ligo",
            f"init.method 'ligo' with it (it is {config.init.method!r})",
            ["init.learning_steps"],
        ),
        (
            not (model.gated_layers or model.weighted_norm),
            "model.gated_layers or model.weighted_norm with it",
            ["init.gate_warmup"],
        ),
        (
            model.objective != "mlm",
            f"a model_type of masked models with it (it is {model.model_type!r}, for {model.objective})",
            [f"mlm.{f.name}" for f in fields(config.mlm)],
        ),
        (
            config.train.steps > 0 and ("train.epochs" in overrides or "train.steps" not in overrides),
            f"train.steps 0 with it (it is {config.train.steps}; --config.train.steps=0)",
            ["train.epochs"],
        ),
    ]
    default = Config()
    for is_unused, expected, keys in rules:
        for section, _, key in (name.partition(".") for name in keys if is_unused):
            value = getattr(getattr(config, section), key)
            if value != getattr(getattr(default, section), key):
                shown = "set" if isinstance(value, Schedule) else repr(value)
                yield f"{section}.{key} is {shown}, expected {expected}"
    yield from unused_optimizer_keys(config.optimizer, "optimizer", overrides)
    if model.objective == "mlm":
        yield from _schedule_problems(config.mlm.probability, "mlm.probability", overrides)
    for key in ("alpha_hard", "alpha_soft", "temperature"):
        yield from _schedule_problems(getattr(distill, key), f"distill.{key}", overrides)
    yield from _data_problems(config.data, overrides)
