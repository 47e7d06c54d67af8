"""The tasks: where GLUE keeps what, how it is scored, and two of our own that need no download.

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
"""What is scored (metrics.py), and on what kind of predictions."""

SCORE_DEFINITION = "the mean of its metrics, over its dev splits (MNLI: matched and mismatched)"
"""What the score of a task is."""

AVERAGE_DEFINITION = "the mean of the tasks' scores, a task with several metrics or dev splits counting once"
"""What the average over tasks is: GLUE's (section 3.4: macro-average, metrics of a task first)."""


class SplitSource(NamedTuple):
    """Where a split lies."""

    file: str  # from the task's folder
    tfds: str  # split of glue/TASK, or ANOTHER/split
    submission: str = ""  # the name of the file of a test's predictions


@dataclass(frozen=True)
class GlueTask:
    """One of GLUE's, in its own files and in TFDS."""

    folder: str  # of the TSV files; the submission is called so too
    text_columns: tuple[str, ...]  # one or two columns, as the files' headers call them
    label: str  # column
    labels: tuple[str, ...] = ("0", "1")  # as the files and submissions write them, by outputs; (): numbers
    class_names: tuple[str, ...] = ()  # of the classes, TFDS's, where `labels` are digits
    metrics: tuple[str, ...] = ("accuracy",)
    bounds: tuple[float, float] | None = None  # of numbers
    tfds_text_columns: tuple[str, ...] = ()  # the texts in TFDS, where they are called otherwise
    splits: Mapping[str, SplitSource] = field(default_factory=dict)  # where they are not the usual three
    headerless_columns: Mapping[str, int] = field(
        default_factory=dict
    )  # columns of train and dev, without a header

    def split_sources(self) -> Mapping[str, SplitSource]:
        """By the names of the splits: train, dev, dev_…, test, test_…"""
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
"""By their names in TFDS. Orders of labels are TFDS's too."""

BUILTIN_TASKS: Mapping[str, tuple[str, ...]] = {
    "era": ("1790-1847", "1848-1905", "1906-1963", "1964-2021"),
    "party": ("Democratic", "Republican"),
}
"""From one sentence of a State of the Union address: when, and of which party's president (since 1853)."""


def format_percent(summary: Mapping[str, Any]) -> str:
    """{mean, standard_deviation} of scores for a person; without the second where there is one seed."""
    std = summary["standard_deviation"]
    return f"{100 * summary['mean']:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
