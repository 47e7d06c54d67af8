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
from dwt_jax.data.sources import BUILTIN as ADDRESSES
from dwt_jax.data.sources import fingerprint, lines_of, open_tfds
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.finetune.config import Examples
from dwt_jax.finetune.tasks import BUILTIN, GLUE


class Split(NamedTuple):
    first: list[str]
    second: list[str] | None  # of pairs
    labels: np.ndarray | None  # int32 classes or float32 numbers [N]; None in a test file
    ids: list[str]  # as submissions name the examples

    def __len__(self) -> int:
        return len(self.first)


class Data(NamedTuple):
    splits: dict[str, Split]
    labels: tuple[str, ...]  # the classes as files write them; () for numbers
    metrics: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the classes in the model; () where `labels` will do
    submissions: Mapping[str, str] = {}  # {split: file name}, of GLUE's tests
    bounds: tuple[float, float] | None = None  # of numbers in a submission


def read(examples: Examples) -> Data:
    """All splits that are there: train, dev, perhaps dev_…, test, test_…

    Raises UserError naming file, line and column.
    """
    if examples.kind == "builtin":
        data = _builtin(examples.task)
    elif examples.kind == "files":
        data = _files(examples)
    else:
        data = _glue(examples)
    for name, split in data.splits.items():
        if not len(split):
            raise UserError(f"{examples.task}: no example in {name}, expected at least one")
    train = data.splits["train"]
    if examples.limit and examples.limit < len(train):
        kept = np.sort(np.random.default_rng(0).permutation(len(train))[: examples.limit])
        data.splits["train"] = _take(train, kept)
    return data


def _take(split: Split, kept: np.ndarray) -> Split:
    def some(values: list[str] | None) -> Any:
        return None if values is None else [values[i] for i in kept]

    labels = None if split.labels is None else split.labels[kept]
    return Split(some(split.first), some(split.second), labels, some(split.ids))


# Files


Rows = Iterator[tuple[str, dict[str, Any]]]  # (where it stands, its columns) of each example


def _rows(path: Path, tested: bool) -> Rows:
    """Lines of a TSV with a header or of JSON lines."""
    if ".jsonl" not in path.suffixes and ".json" not in path.suffixes:
        yield from _tsv(path, tested)
        return
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}, expected a JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(row).__name__}, expected an object")
        yield f"{path}, line {number}", row


def _tsv(path: Path, tested: bool, columns: Mapping[str, int] | None = None) -> Rows:
    """GLUE's format: tabs divide, and nothing is quoted. columns: where there is no header.

    A few lines of QQP lack columns: they are left out, as everyone does, and counted on stderr. In a
    test file every line is an example that a prediction is wanted for: there they are empty texts, and
    an empty line is one too where there is a single column.

    Raises UserError for a header that has a name twice: nobody could say which is meant.
    """
    short, header = 0, columns or {}
    for number, line in enumerate(lines_of(path), 1):
        cells = line.split("\t")
        if columns is None and number == 1:
            header = {name: at for at, name in enumerate(cells)}
            if twice := next((name for name in header if name and cells.count(name) > 1), ""):
                raise UserError(f"{path}: column '{twice}' twice in its first line, expected each name once")
        elif line or (tested and len(header) == 1):
            found = {name: cells[at] for name, at in header.items() if at < len(cells)}
            short += len(found) < len(header)
            if tested:
                found = {name: found.get(name, "") for name in header}
            if len(found) == len(header):
                yield f"{path}, line {number}", found
    if short:
        print(f"{path}: {short} lines with too few columns, {_SHORT[tested]}", file=sys.stderr)


_SHORT = {True: "taken as empty", False: "left out"}


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no column '{name}'{did_you_mean(name, map(str, row))}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    found = _column(row, name, where)
    if not isinstance(found, str):
        raise UserError(f"{where}: column '{name}' is {found!r}, expected text")
    # JSON may spell half of a surrogate pair, which no UTF-8 can hold.
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


LARGEST = float(np.finfo(np.float32).max)


def _label(found: Any, labels: Sequence[str], where: str) -> float:
    """The number of a class; where there are none, the number itself."""
    if labels:
        if str(found) not in labels:
            raise UserError(f"{where}: label {str(found)!r}{did_you_mean(str(found), labels)}")
        return labels.index(str(found))
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) <= LARGEST:  # NaN too
        raise UserError(f"{where}: label {found!r}, expected a number that float32 holds")
    return value


def _split(rows: Rows, texts: Sequence[str], label: str, labels: Sequence[str]) -> Split:
    """label: its column; '' where there is none."""
    first: list[str] = []
    second: list[str] = []
    found: list[float] = []
    ids: list[str] = []
    for where, row in rows:
        first.append(_text(row, texts[0], where))
        if len(texts) > 1:
            second.append(_text(row, texts[1], where))
        if label:
            found.append(_label(_column(row, label, where), labels, where))
        ids.append(str(row.get("index", row.get("id", row.get("idx", len(ids))))))
    kind = np.int32 if labels else np.float32
    return Split(first, second if len(texts) > 1 else None, np.array(found, kind) if label else None, ids)


def _files(examples: Examples) -> Data:
    texts = (examples.first, examples.second) if examples.second else (examples.first,)
    labels = examples.labels
    if not labels and not examples.regression:
        labels = _labels_in(Path(examples.train).expanduser(), examples.label)
    splits = {}
    for name in ("train", "dev", "test"):
        if path := getattr(examples, name):
            tested = name == "test"
            rows = _rows(Path(path).expanduser(), tested)
            splits[name] = _split(rows, texts, "" if tested else examples.label, labels)
    usual = ("pearson", "spearman") if examples.regression else ("accuracy",)
    return Data(splits, labels, examples.metrics or usual)


MOST_LABELS = 1000


def _labels_in(path: Path, column: str) -> tuple[str, ...]:
    """Those of a training file, sorted."""
    labels = set()
    for where, row in _rows(path, tested=False):
        if (found := _column(row, column, where)) is None:
            raise UserError(f"{where}: no label in column '{column}', expected one")
        labels.add(str(found))
    if not 2 <= len(labels) <= MOST_LABELS:
        raise UserError(
            f"{path}: {len(labels)} labels in column '{column}', expected from 2 to {MOST_LABELS} "
            "(or examples.regression)"
        )
    return tuple(sorted(labels))


# GLUE


def _glue(examples: Examples) -> Data:
    task = GLUE[examples.task]
    splits: dict[str, Split] = {}
    submissions: dict[str, str] = {}
    for name, place in task.places().items():
        tested = name.startswith("test")
        if examples.kind == "tfds":
            split = _of_tfds(examples, place.tfds, tested)
        else:
            file = Path(examples.path).expanduser() / task.folder / place.file
            split = _of_folder(file, examples.task, tested)
        if split is not None:
            splits[name] = split
            submissions |= {name: place.submission} if tested else {}
    metrics = examples.metrics or task.metrics
    return Data(splits, task.labels, metrics, task.names, submissions, task.bounds)


def _of_folder(path: Path, name: str, tested: bool) -> Split | None:
    """A split of GLUE's own files; None for a test file that is not there."""
    task = GLUE[name]
    if not path.exists():
        if tested:
            return None
        raise UserError(f"{path}: no such file, expected {name} as GLUE has it")
    columns = None if tested else task.no_header or None  # CoLA's test file has a header
    return _split(_tsv(path, tested, columns), task.texts, "" if tested else task.label, task.labels)


def _of_tfds(examples: Examples, where: str, tested: bool) -> Split | None:
    task = GLUE[examples.task]
    other, _, split = where.rpartition("/")
    name = f"glue/{other or examples.task}"
    try:
        records, _ = open_tfds(Source(kind="tfds", path=name, data_dir=examples.path, split=split))
    except UserError:
        if tested:
            return None
        raise

    def rows() -> Rows:
        for number in range(len(records)):
            record = {
                key: value.decode() if isinstance(value, bytes) else value
                for key, value in records[number].items()
            }
            yield f"tfds '{name}', {split}, example {number}", record

    # Classes are numbers there, in the order of task.labels.
    numbers = tuple(map(str, range(len(task.labels))))
    return _split(rows(), task.features or task.texts, "" if tested else "label", numbers)


# The built-in corpus

SENTENCES = 60  # of an address at most, spread over it
WORDS = range(8, 61)
DEV = 0.2  # share of each class's addresses: none is in both splits


def _builtin(task: str) -> Data:
    by_class: list[list[dict[str, Any]]] = [[] for _ in BUILTIN[task]]
    for line in lines_of(ADDRESSES):
        address = json.loads(line)
        if (label := _class_of(address, task)) is not None:
            by_class[label].append(address)
    parts: dict[str, list[tuple[str, int, str]]] = {"train": [], "dev": []}
    for label, addresses in enumerate(by_class):
        addresses.sort(key=lambda address: fingerprint(address["text"]))
        held = round(DEV * len(addresses))
        for i, address in enumerate(addresses):
            parts["dev" if i < held else "train"] += [(s, label, n) for s, n in _sentences(address)]
    held_out = {_words(sentence) for sentence, _, _ in parts["dev"]}  # Presidents have their phrases
    parts["train"] = [row for row in parts["train"] if _words(row[0]) not in held_out]
    splits = {
        name: Split(
            [s for s, _, _ in rows], None, np.array([k for _, k, _ in rows], np.int32), [i for *_, i in rows]
        )
        for name, rows in parts.items()
    }
    return Data(splits, BUILTIN[task], ("accuracy",))


def _sentences(address: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(sentence, name) of some of the sentences of an address."""
    sentences = [s for s in split_sentences(address["text"]) if len(s.split()) in WORDS]
    chosen = np.linspace(0, len(sentences) - 1, min(SENTENCES, len(sentences))).round().astype(int)
    for number, at in enumerate(chosen):
        yield sentences[at], f"{address['year']}-{address['name'].replace(' ', '-')}-{number}"


def _words(sentence: str) -> str:
    """Without punctuation and capitals: what counts as the same sentence."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _class_of(address: Mapping[str, Any], task: str) -> int | None:
    """None: not in this task."""
    if task == "era":
        ends = [int(label.split("-")[1]) for label in BUILTIN["era"]]
        return next(i for i, end in enumerate(ends) if address["year"] <= end)
    known = address["party"] in BUILTIN["party"] and address["year"] >= 1853
    return BUILTIN["party"].index(address["party"]) if known else None
