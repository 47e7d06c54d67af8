"""Task definitions: files, columns, labels and metrics of GLUE, and two built-in tasks.

GLUE: Wang et al. 2019, arXiv 1804.07461.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

METRIC_KINDS: Mapping[str, Literal["classes", "numbers"]] = {
    "accuracy": "classes",
    "f1": "classes",
    "matthews": "classes",
    "pearson": "numbers",
    "spearman": "numbers",
}
"""Metrics (metrics.py) and the kind of predictions that they apply to."""

SCORE_DEFINITION = "the mean of its metrics, over its dev splits (MNLI: matched and mismatched)"
"""Definition of a task's score, for results and tables."""

AVERAGE_DEFINITION = "the mean of the tasks' scores, a task with several metrics or dev splits counting once"
"""Definition of the average over tasks, GLUE's own (section 3.4: macro-average, after averaging a task's
metrics)."""


class SplitSource(NamedTuple):
    """Location of a split."""

    file: str  # relative to the task's folder
    tfds: str  # split of glue/TASK, or CONFIG/split
    submission: str = ""  # file name of a test split's predictions


@dataclass(frozen=True)
class GlueTask:
    """A GLUE task, in its TSV files and in TFDS."""

    folder: str  # of the TSV files; also the name of the submission
    text_columns: tuple[str, ...]  # one or two columns of the TSV files
    label: str  # column of the label
    labels: tuple[str, ...] = ("0", "1")  # as in the files and submissions, in output order; (): numbers
    class_names: tuple[str, ...] = ()  # TFDS's names of the classes, if `labels` are digits
    metrics: tuple[str, ...] = ("accuracy",)
    bounds: tuple[float, float] | None = None  # range of the numbers
    tfds_text_columns: tuple[str, ...] = ()  # if the names differ in TFDS
    splits: Mapping[str, SplitSource] = field(default_factory=dict)  # if other than train, dev and test
    headerless_columns: Mapping[str, int] = field(
        default_factory=dict
    )  # of train and dev files without header

    def split_sources(self) -> Mapping[str, SplitSource]:
        """Return {split name: location} for train, dev, dev_…, test, test_…"""
        return self.splits or {
            "train": SplitSource("train.tsv", "train"),
            "dev": SplitSource("dev.tsv", "validation"),
            "test": SplitSource("test.tsv", "test", f"{self.folder}.tsv"),
        }


_PAIR_COLUMNS = ("sentence1", "sentence2")
_ENTAILMENT_LABELS = ("entailment", "not_entailment")

GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        class_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        headerless_columns={"label": 1, "sentence": 3},
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", class_names=("negative", "positive")),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        class_names=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        tfds_text_columns=_PAIR_COLUMNS,
    ),
    "stsb": GlueTask(
        "STS-B", _PAIR_COLUMNS, "score", labels=(), metrics=("pearson", "spearman"), bounds=(0, 5)
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        class_names=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
    ),
    "mnli": GlueTask(
        "MNLI",
        _PAIR_COLUMNS,
        "gold_label",
        labels=("entailment", "neutral", "contradiction"),
        tfds_text_columns=("premise", "hypothesis"),
        splits={
            "train": SplitSource("train.tsv", "train"),
            "dev": SplitSource("dev_matched.tsv", "validation_matched"),
            "dev_mismatched": SplitSource("dev_mismatched.tsv", "validation_mismatched"),
            "test": SplitSource("test_matched.tsv", "test_matched", "MNLI-m.tsv"),
            "test_mismatched": SplitSource("test_mismatched.tsv", "test_mismatched", "MNLI-mm.tsv"),
            "test_diagnostic": SplitSource("../diagnostic/diagnostic.tsv", "ax/test", "AX.tsv"),
        },
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", labels=_ENTAILMENT_LABELS),
    "rte": GlueTask("RTE", _PAIR_COLUMNS, "label", labels=_ENTAILMENT_LABELS),
    "wnli": GlueTask("WNLI", _PAIR_COLUMNS, "label", class_names=("not_entailment", "entailment")),
}
"""GLUE's nine tasks by their names in TFDS. The order of the labels is TFDS's too."""

BUILTIN_TASKS: Mapping[str, tuple[str, ...]] = {
    "era": ("1790-1847", "1848-1905", "1906-1963", "1964-2021"),
    "party": ("Democratic", "Republican"),
}
"""Classify a sentence of a State of the Union address: its era, or the president's party (since 1853)."""


def format_percent(summary: Mapping[str, Any]) -> str:
    """Format {mean, standard_deviation} of scores from 0 to 1 in percent, such as '79.30 ± 0.42'."""
    std = summary["standard_deviation"]
    return f"{100 * summary['mean']:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
