"""Readers of labelled texts: GLUE's TSV files, GLUE in TFDS, tables, and the built-in corpus."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.config import Source
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import BUILTIN_CORPUS, document_fingerprint, read_lines
from dwt_jax.data.tfds import open_tfds
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import user_path
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.example_files import RowIterator, get_column, get_text, read_example_rows, read_tsv
from dwt_jax.finetune.tasks import BUILTIN_TASKS, GLUE_TASKS
from dwt_jax.logs import logger


class ExampleSplit(NamedTuple):
    """A split of N examples: single texts or pairs."""

    texts: list[str]
    text_pairs: list[str] | None  # the second text of each pair; None for single texts
    labels: np.ndarray | None  # int32 classes or float32 numbers [N]; None for a test split
    ids: list[str]  # of the examples in submissions

    def __len__(self) -> int:
        """Number of examples, unlike a plain NamedTuple's number of fields."""
        return len(self.texts)


class TaskData(NamedTuple):
    """All splits of a task and how it is scored."""

    splits: dict[str, ExampleSplit]
    labels: tuple[str, ...]  # the classes as written in the files; () for a regression
    metrics: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # readable names of the classes for the model; () to use `labels`
    submissions: Mapping[str, str] = {}  # {test split: name of its submission file}, of GLUE
    bounds: tuple[float, float] | None = None  # range of a regression's values in a submission


def read_examples(examples: Examples) -> TaskData:
    """Read all available splits of a task.

    These are train, dev, and optionally dev_…, test and test_….

    Raises:
        UserError: with file, line and column, for a missing file, column, text or label.
    """
    if examples.kind == "builtin":
        data = _read_builtin(examples.task)
        data = data._replace(metrics=examples.metrics or data.metrics)
    elif examples.kind == "files":
        data = _read_files(examples)
    else:
        data = _read_glue(examples)
    if "f1" in data.metrics and len(data.labels) > 2:
        raise UserError(
            f"examples.metrics has 'f1', which is that of the second of two classes, expected another: "
            f"there are {len(data.labels)} classes"
        )
    for name, split in data.splits.items():
        if not len(split):
            raise UserError(f"{examples.task}: no example in {name}, expected at least one")
    train = data.splits["train"]
    if examples.max_train_examples and examples.max_train_examples < len(train):
        subset = np.sort(np.random.default_rng(0).permutation(len(train))[: examples.max_train_examples])
        data.splits["train"] = select_examples(train, subset)
    return data


MAX_SHARED_SHARE = 0.1
"""Largest share of a dev split that may be in the training split without a warning."""


def describe_shared_examples(data: TaskData) -> Iterator[str]:
    """Yield a warning for each dev split that shares many texts with the training split, with any label."""
    train = {*_iter_texts(data.splits["train"])}
    for name, split in data.splits.items():
        share = sum(text in train for text in _iter_texts(split)) / len(split)
        if name.startswith("dev") and share > MAX_SHARED_SHARE:
            yield (
                f"warning: {share:.0%} of the examples in {name} are in train too, expected at most "
                f"{MAX_SHARED_SHARE:.0%}: their score says little about new texts"
            )


def _iter_texts(split: ExampleSplit) -> Iterator[tuple[str, str]]:
    """Yield the text of each example, and the second text or ''."""
    return zip(split.texts, split.text_pairs or [""] * len(split), strict=True)


def select_examples(split: ExampleSplit, indices: np.ndarray) -> ExampleSplit:
    """Return the examples of these indices, int [M], in their order."""

    def select(values: list[str] | None) -> Any:
        return None if values is None else [values[i] for i in indices]

    labels = None if split.labels is None else split.labels[indices]
    return ExampleSplit(select(split.texts), select(split.text_pairs), labels, select(split.ids))


# Files

MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _label_text(value: Any) -> str:
    """The name of a class. Of 1.0 it is 1: programs write the whole numbers of a column with a gap so."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _parse_label(raw_label: Any, labels: Sequence[str], location: str) -> float:
    """Return the index of a class or, without classes, the label as a number."""
    if labels:
        text = _label_text(raw_label)
        if text not in labels:
            raise UserError(f"{location}: label {text!r}{did_you_mean(text, labels)}")
        return labels.index(text)
    try:
        value = float("nan") if isinstance(raw_label, bool) else float(raw_label)
    except (TypeError, ValueError, OverflowError):  # the last: a whole number of JSON with 400 digits
        value = float("nan")
    if not abs(value) <= MAX_FLOAT32:  # NaN too
        raise UserError(f"{location}: label {raw_label!r}, expected a number that float32 holds")
    return value


MAX_ROUNDING = 0.01
"""Largest error of a label in float32, in standard deviations of all labels."""


def _check_spread(values: np.ndarray, locations: Sequence[str]) -> None:
    """Raise UserError if float32 rounds the differences of labels away: of large ones, or tiny ones.

    Args:
        values: float64 [N].
        locations: of the labels, for the message.
    """
    rounded = values.astype(np.float32).astype(np.float64)
    errors = np.abs(rounded - values)
    scale = np.abs(values).max() or 1.0  # the squares of tiny labels would be 0
    spread = (values / scale).std() * scale
    worst = int(errors.argmax())
    if spread and errors[worst] > MAX_ROUNDING * spread:
        raise UserError(
            f"{locations[worst]}: label {values[worst]:.15g} is {rounded[worst]:.15g} in float32, expected "
            "labels that it tells apart (subtract their mean, or scale them)"
        )


def make_split(
    rows: RowIterator, text_columns: Sequence[str], label_column: str, labels: Sequence[str]
) -> ExampleSplit:
    """Collect rows in a split.

    Args:
        rows: the examples. A column `index`, `id` or `idx` names them; without one they are numbered from 0.
        text_columns: one or two.
        label_column: '' for an unlabelled split.
        labels: the classes; () for numbers.

    Raises:
        UserError: for a missing column, for what is no text or no label, and for numbers that float32 does
            not tell apart.
    """
    texts: list[str] = []
    text_pairs: list[str] = []
    label_values: list[float] = []
    ids: list[str] = []
    locations: list[str] = []
    for location, row in rows:
        texts.append(get_text(row, text_columns[0], location))
        if len(text_columns) > 1:
            text_pairs.append(get_text(row, text_columns[1], location))
        if label_column:
            label_values.append(_parse_label(get_column(row, label_column, location), labels, location))
            locations.append(location)
        ids.append(str(row.get("index", row.get("id", row.get("idx", len(ids))))))
    if label_values and not labels:
        _check_spread(np.array(label_values), locations)
    dtype = np.int32 if labels else np.float32
    return ExampleSplit(
        texts,
        text_pairs if len(text_columns) > 1 else None,
        np.array(label_values, dtype) if label_column else None,
        ids,
    )


def _read_files(examples: Examples) -> TaskData:
    text_columns = tuple(filter(None, (examples.text_column, examples.text_pair_column)))
    labels = examples.labels
    if not labels and not examples.regression:
        labels = _collect_labels(user_path(examples.train), examples.label)
    splits = {}
    for name in ("train", "dev", "test"):
        if path := getattr(examples, name):
            is_test = name == "test"
            rows = read_example_rows(user_path(path), is_test)
            splits[name] = make_split(rows, text_columns, "" if is_test else examples.label, labels)
    default_metrics = ("pearson", "spearman") if examples.regression else ("accuracy",)
    return TaskData(splits, labels, examples.metrics or default_metrics)


MAX_LABELS = 1000
_MISSING = ("", "nan", "na", "n/a", "<na>", "null")  # how programs write that there is no value


def _collect_labels(path: Path, column: str) -> tuple[str, ...]:
    """Return the distinct labels of a training file, sorted."""
    labels: dict[str, type] = {}
    for location, row in read_example_rows(path, is_test=False):
        value = get_column(row, column, location)
        text = "" if value is None else _label_text(value)
        kind = int if isinstance(value, float) and value.is_integer() else type(value)
        expected = ""
        if text.strip().lower() in _MISSING:
            expected = "the name of a class (list it in examples.labels if it is one)"
        elif text != text.strip() or not text.isprintable():
            expected = "the name of a class without white space around it or invisible characters"
        elif kind not in (str, int, bool):  # of JSON: numbers with a fraction, lists, objects
            expected = "the name of a class, a whole number, or true or false"
        elif labels and kind is not next(iter(labels.values())):
            expected = f"a label of type {next(iter(labels.values())).__name__} as in the lines before"
        if expected:
            raise UserError(f"{location}: label {text!r} in column '{column}', expected {expected}")
        labels[text] = kind
    if fraction := _label_with_fraction(labels):
        raise UserError(
            f"{path}: the labels in column '{column}' are numbers with fractions, such as {fraction}, "
            "expected names of classes (examples.regression=true for numbers; listed in examples.labels "
            "they are classes)"
        )
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UserError(
            f"{path}: {len(labels)} labels in column '{column}', expected from 2 to {MAX_LABELS} "
            "(or examples.regression)"
        )
    return tuple(sorted(labels))


def _label_with_fraction(labels: Iterable[str]) -> str:
    """Return the first label that is no whole number, if all are numbers; '' otherwise."""
    try:
        values = {label: float(label) for label in labels}
    except ValueError:
        return ""
    return next((label for label, value in values.items() if not value.is_integer()), "")


# GLUE


def _read_glue(examples: Examples) -> TaskData:
    task = GLUE_TASKS[examples.task]
    splits: dict[str, ExampleSplit] = {}
    submissions: dict[str, str] = {}
    missing: list[Path] = []
    for name, split_source in task.split_sources().items():
        is_test = name.startswith("test")
        if examples.kind == "tfds":
            split = _read_tfds_split(examples, split_source.tfds, is_test)
        else:
            file = user_path(examples.path) / task.folder / split_source.file
            split = _read_glue_split(file, examples.task, is_test)
            missing += [file] if split is None else []
        if split is not None:
            splits[name] = split
            submissions |= {name: split_source.submission} if is_test else {}
    if missing:
        if "train" not in splits or not any(name.startswith("dev") for name in splits):
            raise UserError(f"{missing[0]}: no such file, expected GLUE's file of {examples.task}")
        names = ", ".join(path.name for path in missing)
        logger.warning(f"{missing[0].parent}: without {names}; the other files are used")
    metrics = examples.metrics or task.metrics
    return TaskData(splits, task.labels, metrics, task.class_names, submissions, task.bounds)


def _read_glue_split(path: Path, name: str, is_test: bool) -> ExampleSplit | None:
    """Read a split from GLUE's TSV files; None for a missing file."""
    task = GLUE_TASKS[name]
    if not path.exists():
        return None
    columns = None if is_test else task.headerless_columns or None  # CoLA's test file has a header
    return make_split(
        read_tsv(path, is_test, columns), task.text_columns, "" if is_test else task.label, task.labels
    )


def _read_tfds_split(examples: Examples, split_spec: str, is_test: bool) -> ExampleSplit | None:
    task = GLUE_TASKS[examples.task]
    tfds_config, _, split = split_spec.rpartition("/")
    name = f"glue/{tfds_config or examples.task}"
    try:
        records, _ = open_tfds(Source(kind="tfds", path=name, data_dir=examples.path, split=split))
    except UserError:
        if is_test:
            return None
        raise

    def iter_rows() -> RowIterator:
        for index in range(len(records)):
            record = {
                key: value.decode() if isinstance(value, bytes) else value
                for key, value in records[index].items()
            }
            yield f"tfds '{name}', {split}, example {index}", record

    # TFDS stores class indices, in the order of task.labels.
    class_numbers = tuple(map(str, range(len(task.labels))))
    return make_split(
        iter_rows(), task.tfds_text_columns or task.text_columns, "" if is_test else "label", class_numbers
    )


# The built-in corpus

MAX_SENTENCES = 60  # per address, evenly spaced
SENTENCE_WORD_COUNTS = range(8, 61)
DEV_FRACTION = 0.2  # of each class's addresses; no address is in both splits


def _read_builtin(task: str) -> TaskData:
    by_class: list[list[dict[str, Any]]] = [[] for _ in BUILTIN_TASKS[task]]
    for line in read_lines(BUILTIN_CORPUS):
        address = json.loads(line)
        if (label := _class_of_address(address, task)) is not None:
            by_class[label].append(address)
    rows_by_split: dict[str, list[tuple[str, int, str]]] = {"train": [], "dev": []}  # sentence, class, id
    for label, addresses in enumerate(by_class):
        addresses.sort(key=lambda address: document_fingerprint(address["text"]))
        num_dev = round(DEV_FRACTION * len(addresses))
        for i, address in enumerate(addresses):
            rows = rows_by_split["dev" if i < num_dev else "train"]
            rows += [(sentence, label, name) for sentence, name in _sample_sentences(address)]
    # Presidents repeat stock phrases.
    dev_sentences = {_normalize_sentence(row[0]) for row in rows_by_split["dev"]}
    rows_by_split["train"] = [
        row for row in rows_by_split["train"] if _normalize_sentence(row[0]) not in dev_sentences
    ]
    splits = {}
    for split_name, rows in rows_by_split.items():
        labels = np.array([label for _, label, _ in rows], np.int32)
        splits[split_name] = ExampleSplit([row[0] for row in rows], None, labels, [row[2] for row in rows])
    return TaskData(splits, BUILTIN_TASKS[task], ("accuracy",))


def _sample_sentences(address: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (sentence, id) of evenly spaced sentences of an address."""
    sentences = [s for s in split_sentences(address["text"]) if len(s.split()) in SENTENCE_WORD_COUNTS]
    indices = np.linspace(0, len(sentences) - 1, min(MAX_SENTENCES, len(sentences))).round().astype(int)
    for i, index in enumerate(indices):
        yield sentences[index], f"{address['year']}-{address['name'].replace(' ', '-')}-{i}"


def _normalize_sentence(sentence: str) -> str:
    """Lower-case a sentence and drop its punctuation, to compare it with others."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _class_of_address(address: Mapping[str, Any], task: str) -> int | None:
    """Return the class of an address, None if it is not part of the task."""
    if task == "era":
        ends = [int(label.split("-")[1]) for label in BUILTIN_TASKS["era"]]
        return next(i for i, end in enumerate(ends) if address["year"] <= end)
    in_task = address["party"] in BUILTIN_TASKS["party"] and address["year"] >= 1853
    return BUILTIN_TASKS["party"].index(address["party"]) if in_task else None
