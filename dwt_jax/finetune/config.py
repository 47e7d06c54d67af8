"""Every setting of a fine-tuning, as frozen dataclasses, and what must hold between them. No jax here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dwt_jax.config import Optimizer, Precision, Schedule, optimizer_problems
from dwt_jax.config_file import construct, read_file
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.finetune.tasks import BUILTIN, GLUE, METRICS


@dataclass(frozen=True)
class Examples:
    """Where labelled texts come from. See docs/finetuning.md."""

    kind: Literal["builtin", "glue", "tfds", "files"] = "builtin"
    task: str = "era"  # builtin: era or party; glue, tfds: one of GLUE's nine; files: a name for it
    path: str = ""  # glue: the folder that holds CoLA/, SST-2/, …; tfds: data_dir (empty: TFDS's own)
    # kind=files: .tsv with a header, or .jsonl; possibly .gz, .xz, .zst
    train: str = ""
    dev: str = ""
    test: str = ""  # without labels; may be empty
    first: str = "sentence"  # column of the text
    second: str = ""  # column of the second text of a pair
    label: str = "label"  # column
    labels: tuple[str, ...] = ()  # in the order of the outputs; empty: those in the training file, sorted
    regression: bool = False  # labels are numbers
    metrics: tuple[str, ...] = ()  # empty: accuracy, or pearson and spearman for regression
    limit: int = 0  # use so many training examples at most, drawn once and for all; 0: all


@dataclass(frozen=True)
class Recipe:
    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128  # tokens of an example; the longer text of a pair is cut first
    buckets: tuple[int, ...] = (32, 64, 128)  # lengths that batches are padded to: one compilation each
    dropout: float = 0.1  # of hidden states, attention and pooled output
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the new weights, the order and dropout
    at_once: int = 0  # seeds trained side by side; 0: one on CPU, all of them elsewhere
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=Schedule(kind="linear", value=2e-5, warmup=0.1), eps=1e-6
        )
    )


@dataclass(frozen=True)
class FineTune:
    examples: Examples = field(default_factory=Examples)
    recipe: Recipe = field(default_factory=Recipe)
    precision: Precision = field(default_factory=Precision)


def load(spec: str, overrides: Mapping[str, str] | None = None) -> FineTune:
    """The config of `path[:arg]` with `overrides` on top. Raises UserError as config_file.load does."""
    config = construct(FineTune, read_file(spec), overrides)
    for problem in problems(config):
        raise UserError(f"config: {problem}")
    return config


def problems(config: FineTune):
    """What cannot be so, lazily, each a line that begins with the key."""
    yield from _example_problems(config.examples)
    recipe = config.recipe
    for key in ("epochs", "batch_size"):
        if getattr(recipe, key) < 1:
            yield f"recipe.{key} is {getattr(recipe, key)}, expected at least 1"
    if recipe.max_length < 8:
        yield f"recipe.max_length is {recipe.max_length}, expected at least 8"
    if not recipe.buckets or list(recipe.buckets) != sorted({*recipe.buckets}) or recipe.buckets[0] < 1:
        yield f"recipe.buckets is {list(recipe.buckets)}, expected lengths that rise"
    elif recipe.buckets[-1] != recipe.max_length:
        yield (
            f"recipe.buckets ends at {recipe.buckets[-1]}, expected recipe.max_length ({recipe.max_length}) "
            "as the last"
        )
    if not 0 <= recipe.dropout <= 0.99:
        yield f"recipe.dropout is {recipe.dropout}, expected from 0 to 0.99"
    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds) or min(recipe.seeds) < 0:
        yield f"recipe.seeds is {list(recipe.seeds)}, expected different numbers of at least 0"
    if recipe.at_once < 0:
        yield f"recipe.at_once is {recipe.at_once}, expected at least 0"
    yield from optimizer_problems(recipe.optimizer, "recipe.optimizer")


def _example_problems(examples: Examples):
    known = {"builtin": BUILTIN, "glue": GLUE, "tfds": GLUE}.get(examples.kind)
    if known is not None and examples.task not in known:
        yield f"examples.task is {examples.task!r}{did_you_mean(examples.task, known)}"
    if examples.kind == "glue" and not examples.path:
        yield "examples.path is empty, expected the folder that holds GLUE's own (CoLA/, SST-2/, …)"
    if examples.kind == "files":
        for key in ("train", "dev", "task"):
            if not getattr(examples, key):
                yield f"examples.{key} is empty, expected one for kind 'files'"
        if examples.regression and examples.labels:
            yield f"examples.labels is {list(examples.labels)}, expected none for a regression"
        if len(examples.labels) == 1 or len(set(examples.labels)) < len(examples.labels):
            yield f"examples.labels is {list(examples.labels)}, expected at least two, or none"
    for metric in examples.metrics:
        if metric not in METRICS:
            yield f"examples.metrics names {metric!r}{did_you_mean(metric, METRICS)}"
        elif (METRICS[metric] == "numbers") != examples.regression:
            kind = "numbers" if examples.regression else "classes"
            yield f"examples.metrics names {metric!r}, expected a metric of {kind}"
    if examples.limit < 0:
        yield f"examples.limit is {examples.limit}, expected at least 0"
