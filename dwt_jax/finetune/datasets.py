"""Labelled texts: GLUE's own files, GLUE in TFDS, files with named columns, and the built-in corpus."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.config import Source
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import BUILTIN_CORPUS as ADDRESSES
from dwt_jax.data.sources import document_fingerprint, open_tfds, read_lines
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.tasks import BUILTIN_TASKS, GLUE_TASKS


class ExampleSplit(NamedTuple):
    first: list[str]
    second: list[str] | None  # of pairs
    labels: np.ndarray | None  # int32 classes or float32 numbers [N]; None in a test file
    ids: list[str]  # as submissions name the examples

    def __len__(self) -> int:
        return len(self.first)


class TaskData(NamedTuple):
    splits: dict[str, ExampleSplit]
    labels: tuple[str, ...]  # the classes as files write them; () for numbers
    metrics: tuple[str, ...]
    class_names: tuple[str, ...] = ()  # of the classes in the model; () where `labels` will do
    submissions: Mapping[str, str] = {}  # {split: file name}, of GLUE's tests
    bounds: tuple[float, float] | None = None  # of numbers in a submission


def read_examples(examples: Examples) -> TaskData:
    """All splits that are there: train, dev, perhaps dev_…, test, test_…

    Raises UserError naming file, line and column.
    """
    if examples.kind == "builtin":
        data = _read_builtin(examples.task)
    elif examples.kind == "files":
        data = _read_files(examples)
    else:
        data = _read_glue(examples)
    for name, split in data.splits.items():
        if not len(split):
            raise UserError(f"{examples.task}: no example in {name}, expected at least one")
    train = data.splits["train"]
    if examples.max_train_examples and examples.max_train_examples < len(train):
        subset = np.sort(np.random.default_rng(0).permutation(len(train))[: examples.max_train_examples])
        data.splits["train"] = _select_examples(train, subset)
    return data


def _select_examples(split: ExampleSplit, indices: np.ndarray) -> ExampleSplit:
    def select(values: list[str] | None) -> Any:
        return None if values is None else [values[i] for i in indices]

    labels = None if split.labels is None else split.labels[indices]
    return ExampleSplit(select(split.first), select(split.second), labels, select(split.ids))


# Files


RowIterator = Iterator[tuple[str, dict[str, Any]]]  # (where it stands, its columns) of each example


def _read_rows(path: Path, is_test: bool) -> RowIterator:
    """Lines of a TSV with a header or of JSON lines."""
    if ".jsonl" not in path.suffixes and ".json" not in path.suffixes:
        yield from _read_tsv(path, is_test)
        return
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}, expected a JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
        yield f"{path}, line {number}", row


def _read_tsv(path: Path, is_test: bool, columns: Mapping[str, int] | None = None) -> RowIterator:
    """GLUE's format: tabs divide, and nothing is quoted. columns: where there is no header.

    A few lines of QQP lack columns: they are left out, as everyone does, and counted on stderr. In a
    test file every line is an example that a prediction is wanted for: there they are empty texts, and
    an empty line is one too where there is a single column.

    Raises UserError for a header that has a name twice: nobody could say which is meant.
    """
    num_short, header = 0, columns or {}
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if columns is None and number == 1:
            header = {name: column for column, name in enumerate(cells)}
            if duplicate := next((name for name in header if name and cells.count(name) > 1), ""):
                raise UserError(
                    f"{path}: column '{duplicate}' twice in its first line, expected each name once"
                )
        elif line or (is_test and len(header) == 1):
            row = {name: cells[column] for name, column in header.items() if column < len(cells)}
            num_short += len(row) < len(header)
            if is_test:
                row = {name: row.get(name, "") for name in header}
            if len(row) == len(header):
                yield f"{path}, line {number}", row
    if num_short:
        print(
            f"{path}: {num_short} lines with too few columns, {_SHORT_LINE_HANDLING[is_test]}",
            file=sys.stderr,
        )


_SHORT_LINE_HANDLING = {True: "taken as empty", False: "left out"}


def _get_column(row: Mapping[str, Any], name: str, location: str) -> Any:
    if name not in row:
        raise UserError(f"{location}: no column '{name}'{did_you_mean(name, map(str, row))}")
    return row[name]


def _get_text(row: Mapping[str, Any], name: str, location: str) -> str:
    value = _get_column(row, name, location)
    if not isinstance(value, str):
        raise UserError(f"{location}: column '{name}' is {value!r}, expected text")
    # JSON may spell half of a surrogate pair, which no UTF-8 can hold.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _parse_label(raw_label: Any, labels: Sequence[str], location: str) -> float:
    """The number of a class; where there are none, the number itself."""
    if labels:
        if str(raw_label) not in labels:
            raise UserError(f"{location}: label {str(raw_label)!r}{did_you_mean(str(raw_label), labels)}")
        return labels.index(str(raw_label))
    try:
        value = float(raw_label)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) <= MAX_FLOAT32:  # NaN too
        raise UserError(f"{location}: label {raw_label!r}, expected a number that float32 holds")
    return value


def _make_split(
    rows: RowIterator, texts: Sequence[str], label_column: str, labels: Sequence[str]
) -> ExampleSplit:
    """label: its column; '' where there is none."""
    first: list[str] = []
    second: list[str] = []
    label_values: list[float] = []
    ids: list[str] = []
    for location, row in rows:
        first.append(_get_text(row, texts[0], location))
        if len(texts) > 1:
            second.append(_get_text(row, texts[1], location))
        if label_column:
            label_values.append(_parse_label(_get_column(row, label_column, location), labels, location))
        ids.append(str(row.get("index", row.get("id", row.get("idx", len(ids))))))
    dtype = np.int32 if labels else np.float32
    return ExampleSplit(
        first,
        second if len(texts) > 1 else None,
        np.array(label_values, dtype) if label_column else None,
        ids,
    )


def _read_files(examples: Examples) -> TaskData:
    texts = (
        (examples.text_column, examples.text_pair_column)
        if examples.text_pair_column
        else (examples.text_column,)
    )
    labels = examples.labels
    if not labels and not examples.regression:
        labels = _collect_labels(Path(examples.train).expanduser(), examples.label)
    splits = {}
    for name in ("train", "dev", "test"):
        if path := getattr(examples, name):
            is_test = name == "test"
            rows = _read_rows(Path(path).expanduser(), is_test)
            splits[name] = _make_split(rows, texts, "" if is_test else examples.label, labels)
    default_metrics = ("pearson", "spearman") if examples.regression else ("accuracy",)
    return TaskData(splits, labels, examples.metrics or default_metrics)


MAX_LABELS = 1000


def _collect_labels(path: Path, column: str) -> tuple[str, ...]:
    """Those of a training file, sorted."""
    labels = set()
    for location, row in _read_rows(path, is_test=False):
        if (value := _get_column(row, column, location)) is None:
            raise UserError(f"{location}: no label in column '{column}', expected one")
        labels.add(str(value))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise UserError(
            f"{path}: {len(labels)} labels in column '{column}', expected from 2 to {MAX_LABELS} "
            "(or examples.regression)"
        )
    return tuple(sorted(labels))


# GLUE


def _read_glue(examples: Examples) -> TaskData:
    task = GLUE_TASKS[examples.task]
    splits: dict[str, ExampleSplit] = {}
    submissions: dict[str, str] = {}
    for name, split_source in task.split_sources().items():
        is_test = name.startswith("test")
        if examples.kind == "tfds":
            split = _read_tfds_split(examples, split_source.tfds, is_test)
        else:
            file = Path(examples.path).expanduser() / task.folder / split_source.file
            split = _read_glue_split(file, examples.task, is_test)
        if split is not None:
            splits[name] = split
            submissions |= {name: split_source.submission} if is_test else {}
    metrics = examples.metrics or task.metrics
    return TaskData(splits, task.labels, metrics, task.class_names, submissions, task.bounds)


def _read_glue_split(path: Path, name: str, is_test: bool) -> ExampleSplit | None:
    """A split of GLUE's own files; None for a test file that is not there."""
    task = GLUE_TASKS[name]
    if not path.exists():
        if is_test:
            return None
        raise UserError(f"{path}: no such file, expected {name} as GLUE has it")
    columns = None if is_test else task.headerless_columns or None  # CoLA's test file has a header
    return _make_split(
        _read_tsv(path, is_test, columns), task.text_columns, "" if is_test else task.label, task.labels
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

    # Classes are numbers there, in the order of task.labels.
    class_numbers = tuple(map(str, range(len(task.labels))))
    return _make_split(
        iter_rows(), task.tfds_text_columns or task.text_columns, "" if is_test else "label", class_numbers
    )


# The built-in corpus

MAX_SENTENCES = 60  # of an address at most, spread over it
SENTENCE_WORD_COUNTS = range(8, 61)
DEV_FRACTION = 0.2  # share of each class's addresses: none is in both splits


def _read_builtin(task: str) -> TaskData:
    by_class: list[list[dict[str, Any]]] = [[] for _ in BUILTIN_TASKS[task]]
    for line in read_lines(ADDRESSES):
        address = json.loads(line)
        if (label := _class_of_address(address, task)) is not None:
            by_class[label].append(address)
    parts: dict[str, list[tuple[str, int, str]]] = {"train": [], "dev": []}
    for label, addresses in enumerate(by_class):
        addresses.sort(key=lambda address: document_fingerprint(address["text"]))
        num_dev = round(DEV_FRACTION * len(addresses))
        for i, address in enumerate(addresses):
            parts["dev" if i < num_dev else "train"] += [(s, label, n) for s, n in _sample_sentences(address)]
    dev_sentences = {
        _normalize_sentence(sentence) for sentence, _, _ in parts["dev"]
    }  # Presidents have their phrases
    parts["train"] = [row for row in parts["train"] if _normalize_sentence(row[0]) not in dev_sentences]
    splits = {
        name: ExampleSplit(
            [s for s, _, _ in rows], None, np.array([k for _, k, _ in rows], np.int32), [i for *_, i in rows]
        )
        for name, rows in parts.items()
    }
    return TaskData(splits, BUILTIN_TASKS[task], ("accuracy",))


def _sample_sentences(address: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(sentence, name) of some of the sentences of an address."""
    sentences = [s for s in split_sentences(address["text"]) if len(s.split()) in SENTENCE_WORD_COUNTS]
    indices = np.linspace(0, len(sentences) - 1, min(MAX_SENTENCES, len(sentences))).round().astype(int)
    for number, index in enumerate(indices):
        yield sentences[index], f"{address['year']}-{address['name'].replace(' ', '-')}-{number}"


def _normalize_sentence(sentence: str) -> str:
    """Without punctuation and capitals: what counts as the same sentence."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _class_of_address(address: Mapping[str, Any], task: str) -> int | None:
    """None: not in this task."""
    if task == "era":
        ends = [int(label.split("-")[1]) for label in BUILTIN_TASKS["era"]]
        return next(i for i, end in enumerate(ends) if address["year"] <= end)
    in_task = address["party"] in BUILTIN_TASKS["party"] and address["year"] >= 1853
    return BUILTIN_TASKS["party"].index(address["party"]) if in_task else None
