"""The tasks: where GLUE keeps what, how it is scored, and two of our own that need no download.

GLUE: Wang et al. 2019, arXiv 1804.07461. A task's score is the mean of its metrics; the average
over GLUE is that of the tasks' scores, MNLI's being the mean of matched and mismatched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

METRICS: Mapping[str, Literal["classes", "numbers"]] = {
    "accuracy": "classes",
    "f1": "classes",
    "matthews": "classes",
    "pearson": "numbers",
    "spearman": "numbers",
}
"""What is scored (metrics.py), and on what kind of predictions."""


@dataclass(frozen=True)
class Task:
    """One of GLUE's, in its own files and in TFDS."""

    folder: str  # of the TSV files; the submission is called so too
    texts: tuple[str, ...]  # one or two columns, as the files' headers call them
    label: str  # column
    labels: tuple[str, ...] = ("0", "1")  # as the files and submissions write them, by outputs; (): numbers
    metrics: tuple[str, ...] = ("accuracy",)
    features: tuple[str, ...] = ()  # the texts in TFDS, where they are called otherwise
    # {split: (file, split in TFDS, file of a submission)}; 'dev' may be several
    splits: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    no_header: Mapping[str, int] = field(default_factory=dict)  # columns of train and dev, without a header

    def where(self) -> Mapping[str, tuple[str, str, str]]:
        return self.splits or {
            "train": ("train.tsv", "train", ""),
            "dev": ("dev.tsv", "validation", ""),
            "test": ("test.tsv", "test", f"{self.folder}.tsv"),
        }


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[str, Task] = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        metrics=("matthews",),
        no_header={"label": 1, "sentence": 3},
    ),
    "sst2": Task("SST-2", ("sentence",), "label"),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", metrics=("f1", "accuracy"), features=_PAIR),
    "stsb": Task("STS-B", _PAIR, "score", labels=(), metrics=("pearson", "spearman")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", metrics=("f1", "accuracy")),
    "mnli": Task(
        "MNLI",
        _PAIR,
        "gold_label",
        labels=("entailment", "neutral", "contradiction"),
        features=("premise", "hypothesis"),
        splits={
            "train": ("train.tsv", "train", ""),
            "dev": ("dev_matched.tsv", "validation_matched", ""),
            "dev_mismatched": ("dev_mismatched.tsv", "validation_mismatched", ""),
            "test": ("test_matched.tsv", "test_matched", "MNLI-m.tsv"),
            "test_mismatched": ("test_mismatched.tsv", "test_mismatched", "MNLI-mm.tsv"),
        },
    ),
    "qnli": Task("QNLI", ("question", "sentence"), "label", labels=_ENTAILMENT),
    "rte": Task("RTE", _PAIR, "label", labels=_ENTAILMENT),
    "wnli": Task("WNLI", _PAIR, "label"),
}
"""By their names in TFDS. Orders of labels are TFDS's too."""

BUILTIN: Mapping[str, tuple[str, ...]] = {
    "era": ("1790-1847", "1848-1905", "1906-1963", "1964-2021"),
    "party": ("Democratic", "Republican"),
}
"""From one sentence of a State of the Union address: when, and of which party's president (since 1853)."""
