"""Paired comparison of two models. This module does not import jax, so that `dwt report` starts quickly."""

import numpy as np


def paired_error(
    a: tuple[np.ndarray, np.ndarray] | None, b: tuple[np.ndarray, np.ndarray] | None
) -> float | None:
    """Compute the standard error of the difference of two mean losses on the same held-out documents.

    A mean loss is a ratio of sums, m = Σ S_d / Σ n_d, with linearised residuals
    r_d = (S_d − m·n_d) / mean(n). The standard error is std(r_a − r_b) / √documents, in which the
    difficulty of the documents, common to both models, cancels.

    Args:
        a: sums of the loss and numbers of predictions by document, [D] each; None if unknown.
        b: the same of the other model.

    Returns:
        The standard error in nats, or None if the documents are unknown, differ, or are fewer than two.
    """
    if a is None or b is None or len(a[0]) < 2 or not np.array_equal(a[1], b[1]):
        return None
    residuals = [(loss - loss.sum() / count.sum() * count) / count.mean() for loss, count in (a, b)]
    return float(np.std(residuals[0] - residuals[1], ddof=1) / np.sqrt(len(a[0])))
