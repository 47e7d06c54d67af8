"""Two models on the same held-out documents. No jax here: `dwt report` answers at once."""

import numpy as np


def paired_error(
    a: tuple[np.ndarray, np.ndarray] | None, b: tuple[np.ndarray, np.ndarray] | None
) -> float | None:
    """Standard error of the difference of two mean losses over the same held-out documents.

    A mean loss is a ratio of sums, Σ S_d / Σ n_d. Its linearised residuals
    r_d = (S_d − m·n_d) / mean(n), subtracted document by document, give
    std(r_a − r_b) / √documents: what the two models share, easy and hard documents, cancels.
    None if the documents are unknown, not the same, or fewer than two.
    """
    if a is None or b is None or len(a[0]) < 2 or not np.array_equal(a[1], b[1]):
        return None
    residuals = [(loss - loss.sum() / count.sum() * count) / count.mean() for loss, count in (a, b)]
    return float(np.std(residuals[0] - residuals[1], ddof=1) / np.sqrt(len(a[0])))
