"""Confidence intervals of differences between two arms of a study, paired by seed.

An arm has S pre-training seeds; seed s of both arms has the same batches and masks. There are two
intervals, since each has a weakness: the bootstrap resamples the documents (or fine-tuning seeds) within
each run, but is too narrow for few seeds (it cannot leave their range); Student's t over the seeds' means
is valid for few seeds, but ignores the variance within runs. A difference counts only if both exclude 0.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

REPLICATES = 2000


class Verdict(StrEnum):
    """What a comparison shows: of a teacher, or of a hypothesis."""

    HELPED = "helped"
    HARMED = "harmed"
    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"
    NOT_COMPARABLE = "not comparable"


class Interval(NamedTuple):
    """95 % confidence intervals of a mean difference."""

    mean: float
    low: float  # percentile bootstrap over seeds and within them
    high: float
    t_low: float  # Student's t over seeds; −inf and inf for a single one
    t_high: float
    seeds: int

    @property
    def sign(self) -> int:
        """−1 or 1 if both intervals are on that side of 0, else 0."""
        if max(self.high, self.t_high) < 0:
            return -1
        return int(min(self.low, self.t_low) > 0)


class PairedDocuments(NamedTuple):
    """A run's held-out losses: sums and predictions by document, float64 [D]."""

    loss: np.ndarray
    predictions: np.ndarray
    text: str = ""  # digest of the prepared data, if known

    def same_text(self, other: "PairedDocuments") -> bool:
        """Whether two runs were evaluated on the same text."""
        return self.text == other.text and np.array_equal(self.predictions, other.predictions)


def paired_loss_interval(
    treatment: Sequence[PairedDocuments], baseline: Sequence[PairedDocuments]
) -> Interval:
    """Compute intervals of the difference of mean held-out losses, treatment − baseline, in nats.

    A replicate draws seeds, and one sample of documents for all seeds, since the difficulty of a
    document is common to all runs.

    Args:
        treatment: one entry per seed.
        baseline: the same seeds of the other arm.

    Raises:
        ValueError: if the documents of two runs differ.
    """
    counts = treatment[0].predictions
    if not all(run.same_text(treatment[0]) for run in (*treatment, *baseline)):
        raise ValueError("runs with different held-out documents")
    rng = np.random.default_rng(0)
    by_document = np.stack([a.loss - b.loss for a, b in zip(treatment, baseline, strict=True)])  # [S, D]
    share = np.full(len(counts), 1 / len(counts))
    replicates_by_seed = np.empty((REPLICATES, len(by_document)))
    for replicate in replicates_by_seed:  # one at a time: there may be a hundred thousand documents
        weights = rng.multinomial(len(counts), share)
        replicate[:] = by_document @ weights / (counts @ weights)
    seed_draws = rng.integers(len(by_document), size=(REPLICATES, len(by_document)))
    replicates = np.take_along_axis(replicates_by_seed, seed_draws, axis=1).mean(1)
    return _interval(by_document.sum(1) / counts.sum(), replicates)


def paired_score_interval(treatment: np.ndarray, baseline: np.ndarray, crossed: bool = False) -> Interval:
    """Compute intervals of the mean difference of scores, treatment − baseline.

    A replicate of the bootstrap draws seeds and, within each, fine-tuning seeds. If `crossed`, it draws one
    sample of paradigms for all seeds, since the difficulty of a paradigm is common to all runs.

    Args:
        treatment: [S, F], S pre-training seeds and F fine-tuning seeds or paradigms.
        baseline: scores of the other arm, of the same shape and order.
        crossed: whether column f is the same paradigm for each seed.
    """
    difference = np.asarray(treatment, float) - np.asarray(baseline, float)
    seeds, inner = difference.shape
    rng = np.random.default_rng(0)
    seed_draws = rng.integers(seeds, size=(REPLICATES, seeds, 1))
    inner_draws = rng.integers(inner, size=(REPLICATES, 1 if crossed else seeds, inner))
    return _interval(difference.mean(1), difference[seed_draws, inner_draws].mean((1, 2)))


def _interval(by_seed: np.ndarray, replicates: np.ndarray) -> Interval:
    mean, seeds = float(by_seed.mean()), len(by_seed)
    low, high = (float(x) for x in np.percentile(replicates, [2.5, 97.5]))
    half_width = np.inf
    if seeds > 1:
        half_width = float(stdtrit(seeds - 1, 0.975) * by_seed.std(ddof=1) / np.sqrt(seeds))
    return Interval(mean, low, high, mean - half_width, mean + half_width, seeds)
