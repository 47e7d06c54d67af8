"""The tasks: where GLUE keeps what, how it is scored, and two of our own that need no download.

GLUE: Wang et al. 2019, arXiv 1804.07461.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

METRICS: Mapping[str, Literal["classes", "numbers"]] = {
    "accuracy": "classes",
    "f1": "classes",
    "matthews": "classes",
    "pearson": "numbers",
    "spearman": "numbers",
}
"""What is scored (metrics.py), and on what kind of predictions."""

SCORE = "the mean of its metrics, over its dev splits (MNLI: matched and mismatched)"
"""What the score of a task is."""

AVERAGE = "the mean of the tasks' scores, a task with several metrics or dev splits counting once"
"""What the average over tasks is: GLUE's (section 3.4: macro-average, metrics of a task first)."""


class Place(NamedTuple):
    """Where a split lies."""

    file: str  # from the task's folder
    tfds: str  # split of glue/TASK, or ANOTHER/split
    submission: str = ""  # the name of the file of a test's predictions


@dataclass(frozen=True)
class Task:
    """One of GLUE's, in its own files and in TFDS."""

    folder: str  # of the TSV files; the submission is called so too
    texts: tuple[str, ...]  # one or two columns, as the files' headers call them
    label: str  # column
    labels: tuple[str, ...] = ("0", "1")  # as the files and submissions write them, by outputs; (): numbers
    names: tuple[str, ...] = ()  # of the classes, TFDS's, where `labels` are digits
    metrics: tuple[str, ...] = ("accuracy",)
    bounds: tuple[float, float] | None = None  # of numbers
    features: tuple[str, ...] = ()  # the texts in TFDS, where they are called otherwise
    splits: Mapping[str, Place] = field(default_factory=dict)  # where they are not the usual three
    no_header: Mapping[str, int] = field(default_factory=dict)  # columns of train and dev, without a header

    def places(self) -> Mapping[str, Place]:
        """By the names of the splits: train, dev, dev_…, test, test_…"""
        return self.splits or {
            "train": Place("train.tsv", "train"),
            "dev": Place("dev.tsv", "validation"),
            "test": Place("test.tsv", "test", f"{self.folder}.tsv"),
        }


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[str, Task] = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        no_header={"label": 1, "sentence": 3},
    ),
    "sst2": Task("SST-2", ("sentence",), "label", names=("negative", "positive")),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        names=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        features=_PAIR,
    ),
    "stsb": Task("STS-B", _PAIR, "score", labels=(), metrics=("pearson", "spearman"), bounds=(0, 5)),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        names=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
    ),
    "mnli": Task(
        "MNLI",
        _PAIR,
        "gold_label",
        labels=("entailment", "neutral", "contradiction"),
        features=("premise", "hypothesis"),
        splits={
            "train": Place("train.tsv", "train"),
            "dev": Place("dev_matched.tsv", "validation_matched"),
            "dev_mismatched": Place("dev_mismatched.tsv", "validation_mismatched"),
            "test": Place("test_matched.tsv", "test_matched", "MNLI-m.tsv"),
            "test_mismatched": Place("test_mismatched.tsv", "test_mismatched", "MNLI-mm.tsv"),
            "test_diagnostic": Place("../diagnostic/diagnostic.tsv", "ax/test", "AX.tsv"),
        },
    ),
    "qnli": Task("QNLI", ("question", "sentence"), "label", labels=_ENTAILMENT),
    "rte": Task("RTE", _PAIR, "label", labels=_ENTAILMENT),
    "wnli": Task("WNLI", _PAIR, "label", names=("not_entailment", "entailment")),
}
"""By their names in TFDS. Orders of labels are TFDS's too."""

BUILTIN: Mapping[str, tuple[str, ...]] = {
    "era": ("1790-1847", "1848-1905", "1906-1963", "1964-2021"),
    "party": ("Democratic", "Republican"),
}
"""From one sentence of a State of the Union address: when, and of which party's president (since 1853)."""


def hundredths(spread: Mapping[str, Any]) -> str:
    """{mean, standard_deviation} of scores for a person; without the second where there is one seed."""
    deviation = spread["standard_deviation"]
    return f"{100 * spread['mean']:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")
