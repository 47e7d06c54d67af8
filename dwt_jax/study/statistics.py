"""Intervals of differences between two arms of a study, paired by seed. No jax here.

An arm has S pre-training seeds; seed s of both arms saw the same batches and masks. Two
intervals are given, because each is short of something: the bootstrap knows the documents
(or fine-tuning seeds) within each run, but with three seeds it is too narrow (it cannot leave
their range); Student's t over the seeds' means is right for few seeds, and knows nothing within.
A difference counts as one only where both exclude 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPLICATES = 2000
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % points of Student's t for 1 to 10 degrees of freedom; beyond those 2.228 is taken."""


class Interval(NamedTuple):
    """Of a mean difference, 95 %."""

    mean: float
    low: float  # percentile bootstrap over seeds and what is within them
    high: float
    t_low: float  # Student's t over seeds; −inf and inf for a single one
    t_high: float
    seeds: int

    @property
    def sign(self) -> int:
        """−1 or 1 where both intervals lie on that side of 0, else 0."""
        if max(self.high, self.t_high) < 0:
            return -1
        return int(min(self.low, self.t_low) > 0)


class PairedDocuments(NamedTuple):
    """A run's held-out losses: sums and predictions by document, float64 [D]."""

    loss: np.ndarray
    predictions: np.ndarray
    text: str = ""  # the digest of the prepared data, where it is known

    def same_text(self, other: "PairedDocuments") -> bool:
        return self.text == other.text and np.array_equal(self.predictions, other.predictions)


def paired_loss_interval(
    treatment: Sequence[PairedDocuments], baseline: Sequence[PairedDocuments]
) -> Interval:
    """Difference of mean held-out losses, ours − theirs, run by run: nats.

    A replicate draws seeds and, for all of them together, documents: what is hard is hard in all runs.
    Raises ValueError where the documents of two runs are not the same.
    """
    counts = treatment[0].predictions
    if not all(run.same_text(treatment[0]) for run in (*treatment, *baseline)):
        raise ValueError("runs with other held-out documents")
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


def paired_score_interval(treatment: np.ndarray, baseline: np.ndarray) -> Interval:
    """Mean difference of scores [S, F], ours − theirs; F fine-tuning seeds, the same for every run.

    A replicate draws seeds and, within each, fine-tuning seeds.
    """
    difference = np.asarray(treatment, float) - np.asarray(baseline, float)
    seeds, inner = difference.shape
    rng = np.random.default_rng(0)
    seed_draws = rng.integers(seeds, size=(REPLICATES, seeds, 1))
    inner_draws = rng.integers(inner, size=(REPLICATES, seeds, inner))
    return _interval(difference.mean(1), difference[seed_draws, inner_draws].mean((1, 2)))


def _interval(by_seed: np.ndarray, replicates: np.ndarray) -> Interval:
    mean, seeds = float(by_seed.mean()), len(by_seed)
    low, high = (float(x) for x in np.percentile(replicates, [2.5, 97.5]))
    half_width = np.inf
    if seeds > 1:
        half_width = float(_T95[min(seeds - 1, len(_T95)) - 1] * by_seed.std(ddof=1) / np.sqrt(seeds))
    return Interval(mean, low, high, mean - half_width, mean + half_width, seeds)
