"""The batch ramp against loops over steps and rows."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwt_jax.config import Train
from dwt_jax.data.batch_ramp import count_rows, describe_rows_per_step, rows_per_step, steps_for_rows


@st.composite
def ramps(draw):
    sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=5)))
    fraction = draw(st.floats(0.001, 1)) if len(sizes) > 1 else 0.0
    return Train(
        steps=draw(st.integers(1, 60)),
        batch_size=sizes[-1],
        batch_ramp=tuple(sizes[:-1]),
        batch_ramp_fraction=fraction,
    )


def test_stages_divide_the_share_equally():
    train = Train(steps=100, batch_size=16, batch_ramp=(4, 8), batch_ramp_fraction=0.3)
    assert rows_per_step(train).tolist() == [4] * 15 + [8] * 15 + [16] * 70
    assert rows_per_step(dataclasses.replace(train, batch_ramp_fraction=1.0)).tolist() == [4] * 50 + [8] * 50
    constant = Train(steps=7, batch_size=16)
    assert rows_per_step(constant).tolist() == [16] * 7
    assert rows_per_step(constant).dtype == np.int64


@given(ramps())
def test_steps_of_each_stage(train):
    """Within one step of its share; sizes in their order."""
    sizes = rows_per_step(train).tolist()
    assert len(sizes) == train.steps
    assert sizes == sorted(sizes)
    stages = len(train.batch_ramp)
    for size in train.batch_ramp:
        assert abs(sizes.count(size) - train.batch_ramp_fraction * train.steps / stages) <= 1
    assert abs(sizes.count(train.batch_size) - (1 - train.batch_ramp_fraction) * train.steps) <= 0.5 + 1e-9


@given(ramps())
def test_rows_are_those_of_the_steps_before(train):
    num_rows = 0
    for step, size in enumerate(rows_per_step(train).tolist()):
        assert count_rows(train, step) == num_rows
        num_rows += size
    assert count_rows(train, train.steps) == num_rows


@given(ramps(), st.floats(0, 300))
def test_steps_for_rows_are_the_fewest(train, rows):
    expected = next(
        steps
        for steps in range(1, 400)
        if rows_per_step(dataclasses.replace(train, steps=steps)).sum() >= rows
    )
    assert steps_for_rows(train, rows) == expected


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (Train(steps=10, batch_size=16), "16 rows"),
        (Train(batch_size=16), "16 rows"),
        (Train(steps=10, batch_size=16, batch_ramp=(4,), batch_ramp_fraction=0.01), "16 rows"),
        (
            Train(steps=10000, batch_size=16, batch_ramp=(4, 8), batch_ramp_fraction=0.3),
            "4 rows to step 1,500, 8 rows to step 3,000, then 16 rows",
        ),
        (
            Train(steps=10, batch_size=16, batch_ramp=(4, 8), batch_ramp_fraction=1.0),
            "4 rows to step 5, then 8 rows",
        ),
    ],
)
def test_rows_per_step_in_words(train, text):
    assert describe_rows_per_step(train) == text
