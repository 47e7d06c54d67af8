"""GLUE's metrics of predictions against labels, all of them better the higher they are.

Where one is 0/0 (constant predictions, a class that never occurs) it counts as 0. For F1 and
Matthews' coefficient that is what scikit-learn gives, which GLUE scores with; for the correlations
scipy gives NaN, which would spoil every mean that it enters.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def compute_metrics(
    metrics: Sequence[str], predictions: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, float], list[str]]:
    """({metric: value, 'score': their mean}, the metrics that are 0/0).

    metrics: names of tasks.METRIC_KINDS. predictions, labels: [N], classes from 0 on or numbers; N ≥ 1.
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
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Of class 1: 2·TP / (2·TP + FP + FN)."""
    predicted_positive, label_positive = predictions == 1, labels == 1
    total = predicted_positive.sum() + label_positive.sum()
    return float(2 * (predicted_positive & label_positive).sum() / total) if total else None


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """(c·n − Σ p_k·t_k) / √((n² − Σ p_k²)(n² − Σ t_k²)), of any number of classes (Gorodkin 2004)."""
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
    """Σ a·b / √(Σ a² · Σ b²), a and b being what lies above the means."""
    if not (np.isfinite(predictions).all() and np.ptp(predictions) and np.ptp(labels)):
        return None
    a, b = (_center_and_normalize(np.asarray(x, np.float64)) for x in (predictions, labels))
    return float(np.clip(a @ b, -1, 1))


def _center_and_normalize(x: np.ndarray) -> np.ndarray:
    """Of length 1; without squares that overflow or vanish."""
    x = x - x.mean()
    x = x / np.abs(x).max()
    return x / np.sqrt(x @ x)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Pearson's of the ranks, ties sharing the mean of theirs."""
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
