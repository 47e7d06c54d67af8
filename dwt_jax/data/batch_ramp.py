"""The batch ramp: the number of rows of each step, as a function of the run's settings.

The stages divide `train.batch_ramp_fraction` of the steps equally; the other steps have `train.batch_size`
rows. Without a ramp all steps have `train.batch_size` rows.
"""

import bisect
import dataclasses
import itertools
import math

import numpy as np

from dwt_jax.config import Train


def batch_stages(train: Train) -> list[tuple[int, int]]:
    """Return (rows a step, number of steps) of each stage that has steps.

    Args:
        train: with its number of steps resolved.
    """
    counts = np.diff([0, *_ramp_ends(train), train.steps]).tolist()
    return [
        (size, count)
        for size, count in zip((*train.batch_ramp, train.batch_size), counts, strict=True)
        if count
    ]


def _ramp_ends(train: Train) -> list[int]:
    """The number of steps before the end of each stage but the last, rounded as schedules are."""
    num_stages = len(train.batch_ramp)
    return [round(train.batch_ramp_fraction * train.steps * i / num_stages) for i in range(1, num_stages + 1)]


def rows_per_step(train: Train) -> np.ndarray:
    """Return the number of rows of each step, int64 [train.steps]."""
    sizes, counts = np.array(batch_stages(train), np.int64).reshape(-1, 2).T
    return np.repeat(sizes, counts)


def count_rows(train: Train, step: int) -> int:
    """Return the number of rows of the first `step` steps."""
    sizes = (*train.batch_ramp, train.batch_size)
    missing = sum(
        (next_size - size) * min(step, end)
        for (size, next_size), end in zip(itertools.pairwise(sizes), _ramp_ends(train), strict=True)
    )
    return step * train.batch_size - missing


def steps_for_rows(train: Train, rows: float) -> int:
    """Return the smallest number of steps, at least 1, that have `rows` rows or more.

    The length of the ramp depends on the number of steps, so the number is found by search: a run with more
    steps has more rows.

    Args:
        train: its number of steps is not read.
        rows: number of rows to train on.
    """
    fewest = max(1, math.ceil(rows / train.batch_size))
    most = max(fewest, math.ceil(rows / min(train.batch_ramp, default=train.batch_size)))

    def rows_of_run(steps: int) -> int:
        return count_rows(dataclasses.replace(train, steps=steps), steps)

    return fewest + bisect.bisect_left(range(fewest, most), rows, key=rows_of_run)


def describe_rows_per_step(train: Train) -> str:
    """Return the rows of each stage in words: '4 rows to step 15, 8 rows to step 30, then 16 rows'."""
    stages = batch_stages(train) or [(train.batch_size, 0)]
    ends = itertools.accumulate(count for _, count in stages[:-1])
    earlier = [f"{size} rows to step {end:,}, " for (size, _), end in zip(stages, ends, strict=False)]
    return f"{''.join(earlier)}{'then ' if earlier else ''}{stages[-1][0]} rows"
