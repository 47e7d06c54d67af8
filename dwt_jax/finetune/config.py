"""Every setting of a fine-tuning, as frozen dataclasses, and what must hold between them. No jax here."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dwt_jax.config import Optimizer, Precision, Schedule, optimizer_problems
from dwt_jax.config_loader import construct, read_file
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import read_object
from dwt_jax.finetune.tasks import BUILTIN, GLUE, METRICS

RESERVED = ("config.json", "results.json", "submission")
SHORTEST = 8  # tokens: room for what frames a pair, and a text


@dataclass(frozen=True)
class Examples:
    """Where labelled texts come from. See docs/finetuning.md."""

    kind: Literal["builtin", "glue", "tfds", "files"] = "builtin"
    task: str = "era"  # builtin: era or party; glue, tfds: one of GLUE's nine; files: a name for it
    path: str = ""  # glue: the folder that holds CoLA/, SST-2/, …; tfds: data_dir (empty: TFDS's own)
    # kind=files: .tsv with a header, or .jsonl; possibly .gz, .bz2, .xz, .zst
    train: str = ""
    dev: str = ""
    test: str = ""  # without labels; may be empty
    first: str = "sentence"  # column of the text
    second: str = ""  # column of the second text of a pair
    label: str = "label"  # column
    labels: tuple[str, ...] = ()  # in the order of the outputs; empty: those in the training file, sorted
    regression: bool = False  # labels are numbers
    metrics: tuple[str, ...] = ()  # empty: the task's; files: accuracy, or pearson and spearman
    limit: int = 0  # use so many training examples at most, drawn once and for all; 0: all


@dataclass(frozen=True)
class Recipe:
    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128  # tokens of an example, the model's positions at most; what is longer is cut
    buckets: int = 4  # lengths that batches are padded to: so many equal steps up to max_length
    group_by_length: bool = False  # batches of examples of like length: less padding, another order
    dropout: float = 0.1  # of hidden states, attention and what the classifier takes
    seeds: tuple[int, ...] = (0, 1, 2)  # of the new weights, the order and dropout
    at_once: int = 0  # seeds trained side by side; 0: as many as fit, on CPU one
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=Schedule(kind="linear", value=2e-5, warmup=0.1), eps=1e-6
        )
    )

    def lengths(self) -> tuple[int, ...]:
        """What batches are padded to, rising."""
        return tuple(sorted({-(-self.max_length * i // self.buckets) for i in range(1, self.buckets + 1)}))


@dataclass(frozen=True)
class FineTune:
    examples: Examples = field(default_factory=Examples)
    recipe: Recipe = field(default_factory=Recipe)
    precision: Precision = field(default_factory=Precision)


def load(spec: str, overrides: Mapping[str, str] | None = None) -> FineTune:
    """The config of `path[:arg]` with `overrides` on top. Raises UserError as config_file.load does."""
    return check(construct(FineTune, read_file(spec), overrides))


def load_tasks(spec: str, tasks: str | None, overrides: Mapping[str, str]) -> list[FineTune]:
    """One config a task: the file's for that argument. None: the file's own.

    Raises UserError as `load` does, and for a task twice.
    """
    if tasks is None:
        return [load(spec, overrides)]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--task is {tasks!r}, expected tasks by name (without it: the config's own)")
    if ":" in spec:
        raise UserError(f"--task: {spec} has an argument already, expected one of the two")
    if len(set(names)) < len(names):
        raise UserError(f"--task is {tasks!r}, expected each task once")
    return [load(f"{spec}:{name}", overrides) for name in names]


def of_directory(workdir: Path) -> FineTune:
    """The config that a work directory holds."""
    return check(construct(FineTune, read_object(workdir / "config.json", "JSON that dwt wrote")))


def check(config: Any) -> FineTune:
    """`config` itself. Raises UserError naming the key, what was found, what was expected."""
    for problem in _problems(config):
        raise UserError(f"config: {problem}")
    return config


def _problems(config: FineTune) -> Iterator[str]:
    """What cannot be so, lazily, each a line that begins with the key."""
    yield from _example_problems(config.examples)
    recipe = config.recipe
    lows = {"epochs": 1, "batch_size": 1, "max_length": SHORTEST, "buckets": 1, "at_once": 0}
    for key, low in lows.items():
        if getattr(recipe, key) < low:
            yield f"recipe.{key} is {getattr(recipe, key)}, expected at least {low}"
    if not 0 <= recipe.dropout <= 0.99:
        yield f"recipe.dropout is {recipe.dropout}, expected from 0 to 0.99"
    wrong = [seed for seed in recipe.seeds if not 0 <= seed < 2**32]
    if not recipe.seeds or wrong or len(set(recipe.seeds)) < len(recipe.seeds):
        yield f"recipe.seeds is {list(recipe.seeds)}, expected different numbers from 0 to 2**32 - 1"
    yield from optimizer_problems(recipe.optimizer, "recipe.optimizer")


def _example_problems(examples: Examples) -> Iterator[str]:
    known: Mapping[str, Any] | None = {"builtin": BUILTIN, "glue": GLUE, "tfds": GLUE}.get(examples.kind)
    if known is not None and examples.task not in known:
        yield f"examples.task is {examples.task!r}{did_you_mean(examples.task, known)}"
    if not re.fullmatch(r"\w[\w.-]*", examples.task):
        yield f"examples.task is {examples.task!r}, expected the name of a folder"
    if examples.task in RESERVED:
        yield f"examples.task is {examples.task!r}, expected another name: dwt writes that beside the tasks"
    if examples.kind == "glue" and not examples.path:
        yield "examples.path is empty, expected the folder that holds GLUE's own (CoLA/, SST-2/, …)"
    if examples.kind == "files":
        for key in ("train", "dev", "first", "label"):
            if not getattr(examples, key):
                yield f"examples.{key} is empty, expected one for kind 'files'"
        if examples.regression and examples.labels:
            yield f"examples.labels is {list(examples.labels)}, expected none for a regression"
        if len(examples.labels) == 1 or len(set(examples.labels)) < len(examples.labels):
            yield f"examples.labels is {list(examples.labels)}, expected at least two, or none"
    numbers = examples.task == "stsb" if known is GLUE else examples.regression
    for metric in examples.metrics:
        if metric not in METRICS:
            yield f"examples.metrics names {metric!r}{did_you_mean(metric, METRICS)}"
        elif (METRICS[metric] == "numbers") != numbers:
            kind = "numbers" if numbers else "classes"
            yield f"examples.metrics names {metric!r}, expected metrics of {kind}"
    if examples.limit < 0:
        yield f"examples.limit is {examples.limit}, expected at least 0"
