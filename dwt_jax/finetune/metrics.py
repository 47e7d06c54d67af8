"""GLUE's metrics of predictions against labels, all of them better the higher they are."""

import warnings
from collections.abc import Sequence

import numpy as np


def score(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """One of tasks.METRICS. predictions, labels: [N], classes from 0 on or numbers.

    Where a metric is 0/0 (constant predictions, a class that never occurs) it is 0, with a
    warning: for F1 and Matthews' coefficient as in scikit-learn, which GLUE scores with; for the
    correlations GLUE's own code gives NaN, which would spoil every mean it enters.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    found = {
        "accuracy": _accuracy,
        "f1": _f1,
        "matthews": _matthews,
        "pearson": _pearson,
        "spearman": _spearman,
    }
    value = found[metric](np.asarray(predictions), np.asarray(labels))
    if value is None:
        warnings.warn(f"{metric} is not defined for these predictions and labels: counted as 0", stacklevel=2)
        return 0.0
    return value


def mean_score(metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each metric, and under `score` their mean: the task's score."""
    values = {metric: score(metric, predictions, labels) for metric in metrics}
    return {**values, "score": float(np.mean([*values.values()]))}


def _accuracy(predictions, labels) -> float:
    return float((predictions == labels).mean())


def _f1(predictions, labels) -> float | None:
    """Of class 1: 2·TP / (2·TP + FP + FN)."""
    hit, said, there = (
        ((predictions == 1) & (labels == 1)).sum(),
        (predictions == 1).sum(),
        (labels == 1).sum(),
    )
    return float(2 * hit / (said + there)) if said + there else None


def _matthews(predictions, labels) -> float | None:
    """(c·n − Σ p_k·t_k) / √((n² − Σ p_k²)(n² − Σ t_k²)), of any number of classes (Gorodkin 2004)."""
    n, classes = len(labels), np.unique(np.concatenate([predictions, labels]))
    said = np.array([(predictions == k).sum() for k in classes], float)
    there = np.array([(labels == k).sum() for k in classes], float)
    spread = (n**2 - (said**2).sum()) * (n**2 - (there**2).sum())
    return float((((predictions == labels).sum() * n) - said @ there) / np.sqrt(spread)) if spread else None


def _pearson(predictions, labels) -> float | None:
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (predictions, labels))
    if not (np.ptp(predictions) and np.ptp(labels)):
        return None
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _spearman(predictions, labels) -> float | None:
    """Pearson's of the ranks, ties sharing the mean of theirs."""
    return _pearson(_ranks(predictions), _ranks(labels))


def _ranks(x) -> np.ndarray:
    _, index, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]
