"""GLUE's metrics. For all of them higher is better.

A metric that is 0/0 (constant predictions, a class that never occurs) counts as 0. For F1 and
Matthews' coefficient this is scikit-learn's convention, which GLUE uses. For the correlations scipy
returns NaN, which would make every mean over seeds and tasks NaN.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def compute_metrics(
    metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, float], list[str]]:
    """Compute metrics and their mean.

    Args:
        metrics: names in `tasks.METRIC_KINDS`.
        predictions: [N], class indices or numbers, N ≥ 1.
        labels: [N], the same.

    Returns:
        ({metric: value, "score": mean of the metrics}, names of the metrics that are 0/0).
    """
    if len(predictions) != len(labels) or not len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    raw_values = {
        metric: _METRIC_FUNCTIONS[metric](np.asarray(predictions), np.asarray(labels)) for metric in metrics
    }
    values = {metric: 0.0 if value is None else value for metric, value in raw_values.items()}
    undefined = [metric for metric, value in raw_values.items() if value is None]
    return {**values, "score": float(np.mean([*values.values()]))}, undefined


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of predictions [N] that equal the labels [N]."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the F1 score of class 1, 2·TP / (2·TP + FP + FN), or None if it is 0/0."""
    predicted_positive, label_positive = predictions == 1, labels == 1
    total = predicted_positive.sum() + label_positive.sum()
    return float(2 * (predicted_positive & label_positive).sum() / total) if total else None


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Matthews' correlation coefficient for any number of classes, or None if it is 0/0.

    (c·n − Σ p_k·t_k) / √((n² − Σ p_k²)(n² − Σ t_k²)), where c of n predictions are correct and class k
    is predicted p_k times and occurs t_k times (Gorodkin 2004).
    """
    n, classes = len(labels), np.union1d(predictions, labels)
    prediction_counts = np.array([(predictions == k).sum() for k in classes], float)
    label_counts = np.array([(labels == k).sum() for k in classes], float)
    denominator = np.sqrt(n**2 - prediction_counts @ prediction_counts) * np.sqrt(
        n**2 - label_counts @ label_counts
    )
    return (
        float(((predictions == labels).sum() * n - prediction_counts @ label_counts) / denominator)
        if denominator
        else None
    )


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Pearson's correlation coefficient, or None if it is undefined or a prediction not finite."""
    if not (np.isfinite(predictions).all() and np.ptp(predictions) and np.ptp(labels)):
        return None
    a, b = (_center_and_normalize(np.asarray(x, np.float64)) for x in (predictions, labels))
    return float(np.clip(a @ b, -1, 1))


def _center_and_normalize(x: np.ndarray) -> np.ndarray:
    """Subtract the mean and scale to norm 1. Dividing by the maximum first avoids over- and underflow."""
    x = x - x.mean()
    x = x / np.abs(x).max()
    return x / np.sqrt(x @ x)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Spearman's rank correlation, with average ranks for ties; None as for `pearson`."""
    if not np.isfinite(predictions).all():
        return None
    return pearson(_ranks(predictions), _ranks(labels))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, index, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


_METRIC_FUNCTIONS: Mapping[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
