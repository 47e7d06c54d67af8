"""Config of a fine-tuning as frozen dataclasses, and its validation. This module does not import jax."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from dwt_jax.config import Optimizer, Precision, Schedule
from dwt_jax.config_checks import optimizer_problems
from dwt_jax.config_loader import build_dataclass, read_config_file, split_spec
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import read_json_object
from dwt_jax.finetune.tasks import BUILTIN_TASKS, GLUE_TASKS, METRIC_KINDS
from dwt_jax.limits import Limit, at_least, limit_problems
from dwt_jax.unused_keys import keys_of_other_kinds, unused_optimizer_keys

RESERVED_NAMES = ("config.json", "results.json", "submission")
_KINDS_OF_EXAMPLE_KEYS = {
    "path": ("glue", "tfds"),
    **dict.fromkeys(("train", "dev", "test", "text_column", "text_pair_column"), ("files",)),
    **dict.fromkeys(("label", "labels", "regression"), ("files",)),
}
MIN_SEQUENCE_LENGTH = 8  # tokens: special tokens of a pair, and some text


@dataclass(frozen=True)
class Examples:
    """Source of the labelled texts. See docs/finetuning.md."""

    kind: Literal["builtin", "glue", "tfds", "files"] = "builtin"
    task: str = "era"  # builtin: era or party; glue, tfds: one of GLUE's nine tasks; files: any name
    path: str = ""  # glue: the folder that contains CoLA/, SST-2/, …; tfds: data_dir (empty: TFDS's default)
    # kind=files: .tsv or .csv with a header, or .jsonl; possibly .gz, .bz2, .xz, .zst
    train: str = ""
    dev: str = ""
    test: str = ""  # without labels; empty: no test split; can be added later
    text_column: str = "sentence"
    text_pair_column: str = ""  # column of the second text of a pair; empty: single texts
    label: str = "label"  # column of the label
    labels: tuple[str, ...] = ()  # classes in output order; empty: the sorted classes of the training file
    regression: bool = False  # labels are numbers
    metrics: tuple[str, ...] = ()  # empty: the task's metrics; for files accuracy, or pearson and spearman
    # Size of a random training subset, equal for all seeds; 0: all examples.
    max_train_examples: Annotated[int, at_least(0)] = 0


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a fine-tuning."""

    epochs: Annotated[int, at_least(1)] = 3
    batch_size: Annotated[int, at_least(1)] = 32
    # Tokens of an example, at most the model's positions; longer ones are truncated.
    max_length: Annotated[int, at_least(MIN_SEQUENCE_LENGTH)] = 128
    buckets: Annotated[int, at_least(1)] = 4  # number of padded lengths, in equal steps up to max_length
    group_by_length: bool = False  # batch examples of similar length: less padding, different order
    # Rate for hidden states, attention probabilities and classifier input.
    dropout: Annotated[float, Limit("from 0 to 0.99", lambda rate: 0 <= rate <= 0.99)] = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)  # determine new weights, example order and dropout
    # Seeds trained at once (vmap); 0: as many as fit in memory, one on CPU.
    seeds_in_parallel: Annotated[int, at_least(0)] = 0
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=Schedule(kind="linear", value=2e-5, warmup_fraction=0.1), eps=1e-6
        )
    )

    def lengths(self) -> tuple[int, ...]:
        """Return the lengths that batches are padded to, in tokens, increasing."""
        return tuple(sorted({-(-self.max_length * i // self.buckets) for i in range(1, self.buckets + 1)}))


@dataclass(frozen=True)
class FinetuneConfig:
    """Config of `dwt finetune` for one task."""

    examples: Examples = field(default_factory=Examples)
    recipe: Recipe = field(default_factory=Recipe)
    precision: Precision = field(default_factory=Precision)


def load_finetune_config(spec: str, overrides: Mapping[str, str] | None = None) -> FinetuneConfig:
    """Load and check a fine-tuning config.

    Args:
        spec: the config file as `path[:argument]`.
        overrides: {dotted key: value} of the command line.

    Raises:
        UserError: as `config_loader.load_config` does.
    """
    config = check_finetune_config(build_dataclass(FinetuneConfig, read_config_file(spec), overrides))
    for problem in _unused_key_problems(config, overrides or ()):
        raise UserError(f"config: {problem}")
    return config


def load_task_configs(spec: str, tasks: str | None, overrides: Mapping[str, str]) -> list[FinetuneConfig]:
    """Load one config per task.

    Args:
        spec: the config file; without an argument if `tasks` is given.
        tasks: comma-separated arguments of the file; None for the file's default.
        overrides: {dotted key: value} of the command line, for every task.

    Raises:
        UserError: as `load_finetune_config` does, and for a repeated task.
    """
    if tasks is None:
        return [load_finetune_config(spec, overrides)]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--task is {tasks!r}, expected names of tasks (omit it for the config's own)")
    if split_spec(spec)[1]:
        raise UserError(f"--task: {spec} already has an argument, expected only one of the two")
    if len(set(names)) < len(names):
        raise UserError(f"--task is {tasks!r}, expected each task once")
    return [load_finetune_config(f"{spec}:{name}", overrides) for name in names]


def read_finetune_config(workdir: Path) -> FinetuneConfig:
    """Read the resolved config of a fine-tuning directory."""
    return check_finetune_config(
        build_dataclass(FinetuneConfig, read_json_object(workdir / "config.json", "JSON that dwt wrote"))
    )


def check_finetune_config(config: Any) -> FinetuneConfig:
    """Return `config` if it is valid. Raises UserError with key, value and expectation."""
    for problem in _config_problems(config):
        raise UserError(f"config: {problem}")
    return config


def _unused_key_problems(config: FinetuneConfig, overrides: Collection[str]) -> Iterator[str]:
    """Yield one line for each key of a config as the user wrote it that has a value but no effect."""
    kinds_of_keys = _KINDS_OF_EXAMPLE_KEYS
    yield from keys_of_other_kinds(config.examples, "examples", kinds_of_keys, Examples(), overrides)
    yield from unused_optimizer_keys(config.recipe.optimizer, "recipe.optimizer", overrides)


def _config_problems(config: FinetuneConfig) -> Iterator[str]:
    """Yield one line per invalid value, each starting with its key."""
    yield from limit_problems(config, "")
    yield from _example_problems(config.examples)
    recipe = config.recipe
    invalid_seeds = [seed for seed in recipe.seeds if not 0 <= seed < 2**32]
    if not recipe.seeds or invalid_seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        yield f"recipe.seeds is {list(recipe.seeds)}, expected different numbers from 0 to 2**32 - 1"
    yield from optimizer_problems(recipe.optimizer, "recipe.optimizer")
    if config.precision.attention not in ("auto", "reference"):
        yield (
            f"precision.attention is {config.precision.attention!r}, expected 'auto' or 'reference': "
            "fine-tuning has no other back end"
        )


def _example_problems(examples: Examples) -> Iterator[str]:
    tasks: Mapping[str, Any] | None = {"builtin": BUILTIN_TASKS, "glue": GLUE_TASKS, "tfds": GLUE_TASKS}.get(
        examples.kind
    )
    if tasks is not None and examples.task not in tasks:
        yield f"examples.task is {examples.task!r}{did_you_mean(examples.task, tasks)}"
    if not re.fullmatch(r"\w[\w.-]*", examples.task):
        yield f"examples.task is {examples.task!r}, expected a valid folder name"
    if examples.task in RESERVED_NAMES:
        yield f"examples.task is {examples.task!r}, expected another name: this one is reserved"
    if examples.kind == "glue" and not examples.path:
        yield "examples.path is empty, expected the folder that contains CoLA/, SST-2/, …"
    if examples.kind == "files":
        for key in ("train", "dev", "text_column", "label"):
            if not getattr(examples, key):
                yield f"examples.{key} is empty, expected a value for kind 'files'"
        if examples.regression and examples.labels:
            yield f"examples.labels is {list(examples.labels)}, expected none for a regression"
        if len(examples.labels) == 1 or len(set(examples.labels)) < len(examples.labels):
            yield f"examples.labels is {list(examples.labels)}, expected at least two different ones, or none"
    is_regression = examples.task == "stsb" if tasks is GLUE_TASKS else examples.regression
    for metric in examples.metrics:
        if metric not in METRIC_KINDS:
            yield f"examples.metrics names {metric!r}{did_you_mean(metric, METRIC_KINDS)}"
        elif (METRIC_KINDS[metric] == "numbers") != is_regression:
            kind = "numbers" if is_regression else "classes"
            yield f"examples.metrics names {metric!r}, expected metrics of {kind}"
