"""Readers of labelled texts: GLUE's TSV files, GLUE in TFDS, TSV or JSON lines, the built-in corpus."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.config import Source
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import BUILTIN_CORPUS, document_fingerprint, open_tfds, read_lines
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import user_path
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.tasks import BUILTIN_TASKS, GLUE_TASKS


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
    return ExampleSplit(select(split.texts), select(split.text_pairs), labels, select(split.ids))


# Files


RowIterator = Iterator[tuple[str, dict[str, Any]]]  # (file and line, columns) of each example


def _read_rows(path: Path, is_test: bool) -> RowIterator:
    """Yield the rows of a TSV file with a header, or of JSON lines."""
    if ".jsonl" not in path.suffixes and ".json" not in path.suffixes:
        yield from _read_tsv(path, is_test)
        return
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line_number}: {error}, expected a JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line_number}: a JSON {type(row).__name__}, expected an object")
        yield f"{path}, line {line_number}", row


def _read_tsv(path: Path, is_test: bool, columns: Mapping[str, int] | None = None) -> RowIterator:
    """Yield the rows of a TSV file in GLUE's format: split at tabs, without quoting.

    A few lines of QQP lack columns. They are skipped, as is usual, and counted on stderr. In a test
    file every line needs a prediction: missing columns are empty texts, and so is an empty line if
    there is only one column.

    Args:
        path: the file.
        is_test: whether it is a test file.
        columns: {name: index} for a file without a header.

    Raises:
        UserError: for a header with a repeated name, which is ambiguous.
    """
    num_short, header = 0, columns or {}
    for line_number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if columns is None and line_number == 1:
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
                yield f"{path}, line {line_number}", row
    if num_short:
        print(
            f"{path}: {num_short} lines with too few columns, {_SHORT_LINE_HANDLING[is_test]}",
            file=sys.stderr,
        )


_SHORT_LINE_HANDLING = {True: "missing texts are empty", False: "skipped"}


def _get_column(row: Mapping[str, Any], name: str, location: str) -> Any:
    if name not in row:
        raise UserError(f"{location}: no column '{name}'{did_you_mean(name, map(str, row))}")
    return row[name]


def _get_text(row: Mapping[str, Any], name: str, location: str) -> str:
    value = _get_column(row, name, location)
    if not isinstance(value, str):
        raise UserError(f"{location}: column '{name}' is {value!r}, expected text")
    # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


MAX_FLOAT32 = float(np.finfo(np.float32).max)


def _parse_label(raw_label: Any, labels: Sequence[str], location: str) -> float:
    """Return the index of a class or, without classes, the label as a number."""
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
    rows: RowIterator, text_columns: Sequence[str], label_column: str, labels: Sequence[str]
) -> ExampleSplit:
    """Collect rows in a split. `label_column` is '' for an unlabelled split."""
    texts: list[str] = []
    text_pairs: list[str] = []
    label_values: list[float] = []
    ids: list[str] = []
    for location, row in rows:
        texts.append(_get_text(row, text_columns[0], location))
        if len(text_columns) > 1:
            text_pairs.append(_get_text(row, text_columns[1], location))
        if label_column:
            label_values.append(_parse_label(_get_column(row, label_column, location), labels, location))
        ids.append(str(row.get("index", row.get("id", row.get("idx", len(ids))))))
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
            rows = _read_rows(user_path(path), is_test)
            splits[name] = _make_split(rows, text_columns, "" if is_test else examples.label, labels)
    if "f1" in examples.metrics and len(labels) > 2:
        raise UserError(
            f"examples.metrics has 'f1', which is that of the second of two classes, expected another: "
            f"there are {len(labels)} classes"
        )
    default_metrics = ("pearson", "spearman") if examples.regression else ("accuracy",)
    return TaskData(splits, labels, examples.metrics or default_metrics)


MAX_LABELS = 1000


def _collect_labels(path: Path, column: str) -> tuple[str, ...]:
    """Return the distinct labels of a training file, sorted."""
    labels = set()
    for location, row in _read_rows(path, is_test=False):
        if (value := _get_column(row, column, location)) is None:
            raise UserError(f"{location}: no label in column '{column}', expected one")
        text = str(value)
        if not text.strip() or text != text.strip() or value != value:  # the last: NaN of a JSON file
            raise UserError(
                f"{location}: label {text!r} in column '{column}', expected the name of a class without "
                "white space around it"
            )
        labels.add(text)
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
            file = user_path(examples.path) / task.folder / split_source.file
            split = _read_glue_split(file, examples.task, is_test)
        if split is not None:
            splits[name] = split
            submissions |= {name: split_source.submission} if is_test else {}
    metrics = examples.metrics or task.metrics
    return TaskData(splits, task.labels, metrics, task.class_names, submissions, task.bounds)


def _read_glue_split(path: Path, name: str, is_test: bool) -> ExampleSplit | None:
    """Read a split from GLUE's TSV files; None for a missing test file."""
    task = GLUE_TASKS[name]
    if not path.exists():
        if is_test:
            return None
        raise UserError(f"{path}: no such file, expected GLUE's file of {name}")
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

    # TFDS stores class indices, in the order of task.labels.
    class_numbers = tuple(map(str, range(len(task.labels))))
    return _make_split(
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
