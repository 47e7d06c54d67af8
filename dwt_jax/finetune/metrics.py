"""GLUE's metrics. For all of them higher is better.

A metric that is 0/0 (constant predictions, a class that never occurs) counts as 0. For F1 and
Matthews' coefficient this is scikit-learn's convention, which GLUE uses. For the correlations scipy
returns NaN, which would make every mean over seeds and tasks NaN.
"""

import warnings
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
    """Return the F1 score of class 1, or None if it is 0/0."""
    from sklearn.metrics import f1_score

    if not (predictions == 1).any() and not (labels == 1).any():
        return None
    return float(f1_score(labels, predictions, labels=[1], average="macro"))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Matthews' correlation coefficient for any number of classes, or None if it is 0/0."""
    from sklearn.metrics import matthews_corrcoef

    if not (np.ptp(predictions) and np.ptp(labels)):
        return None
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Pearson's correlation coefficient, or None if it is undefined or a prediction not finite."""
    from scipy.stats import pearsonr

    if not (np.isfinite(predictions).all() and np.ptp(predictions) and np.ptp(labels)):
        return None
    with warnings.catch_warnings(action="ignore"):  # of nearly constant predictions
        return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Return Spearman's rank correlation, with average ranks for ties; None as for `pearson`."""
    from scipy.stats import rankdata

    if not np.isfinite(predictions).all():
        return None
    return pearson(rankdata(predictions), rankdata(labels))


_METRIC_FUNCTIONS: Mapping[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
