"""Extrapolate short runs to the length of the full run. This module does not import jax."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.96
"""Two-sided 95 % point of the normal distribution."""


class Estimate(NamedTuple):
    """An estimate with an interval."""

    mean: float
    low: float
    high: float


ZERO = Estimate(0.0, 0.0, 0.0)


def extrapolate_loss(steps: Sequence[int], losses: Sequence[float], total_steps: int) -> float:
    """Extrapolate the loss of runs of different lengths to the full run.

    The power law through the two longest runs is too optimistic where they lie in the fast part of learning,
    and the loss of the longest run is too high. The result is the geometric mean of both.

    Args:
        steps: lengths of the runs, increasing.
        losses: their losses.
        total_steps: length of the full run.
    """
    if len(steps) < 2:
        return losses[-1]
    return losses[-1] * (losses[-1] / losses[-2]) ** (_reach(steps, total_steps) / 2)


def extrapolate_difference(
    steps: Sequence[int],
    differences: Sequence[float],
    errors: Sequence[float],
    total_steps: int,
    *,
    lasting: bool,
) -> Estimate:
    """Extrapolate a difference of losses, at the two longest runs, to the full run.

    If the cause of a difference is over (other initial weights, a teacher that is no longer used), the
    difference shrinks, first fast and then more slowly. The interval spans the difference at the longest run
    (no further shrinking) and the power law through both runs; the estimate is their geometric mean. A
    difference that did not shrink is kept, plus or minus its change.

    If the cause lasts (a teacher that is used throughout), the difference is extrapolated linearly in
    log(steps) and may change its sign. The interval spans the difference at the longest run and this value.

    Both intervals are extended by 1.96 standard errors on both sides.

    Args:
        steps: lengths of the runs, increasing.
        differences: loss minus the baseline's loss at the same length, in nats.
        errors: their standard errors.
        total_steps: length of the full run.
        lasting: whether the cause lasts.

    Returns:
        The estimate. With a single length it is the difference there, with an interval that includes 0.
    """
    last, error = differences[-1], errors[-1]
    if len(steps) < 2:
        spread = abs(last) + Z95 * error
        return Estimate(last, last - spread, last + spread)
    before, reach = differences[-2], _reach(steps, total_steps)
    spread = Z95 * error
    if lasting:
        mean = last + (last - before) * reach
        ends, spread = (last, mean), Z95 * float(np.hypot((1 + reach) * error, reach * errors[-2]))
    elif before and 0 < last / before < 1:
        ends = (last, last * (last / before) ** reach)
        mean = float(np.copysign(np.sqrt(ends[0] * ends[1]), last))
    else:
        mean, ends = last, (before, 2 * last - before)
    return Estimate(mean, min(ends) - spread, max(ends) + spread)


def _reach(steps: Sequence[int], total_steps: int) -> float:
    """Return how far the full run is, in units of the distance of the two longest runs (logarithms)."""
    return float(np.log(total_steps / steps[-1]) / np.log(steps[-1] / steps[-2]))
