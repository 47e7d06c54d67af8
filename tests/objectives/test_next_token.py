"""Next-token prediction against a loop over positions."""

import jax
import numpy as np

from dwt_jax.data.batch import Batch
from dwt_jax.objectives import objective_module
from dwt_jax.objectives.next_token import NextTokenObjective


def test_labels_are_the_next_tokens_of_the_same_segment():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (20, 16)).astype(np.uint16)
    segments = np.sort(random.integers(0, 4, (20, 16)), axis=1)[:, ::-1]  # decreasing, 0 (padding) last
    segments = np.where(segments > 0, 4 - segments, 0).astype(np.uint8)
    module = objective_module("next_token")
    keys = jax.random.split(jax.random.key(0), 20)
    targets = module.make_targets(Batch(tokens, segments), keys, NextTokenObjective())
    assert targets.positions is None
    np.testing.assert_array_equal(targets.inputs, tokens)
    expected = {
        (row, i): int(tokens[row, i + 1])
        for row in range(20)
        for i in range(15)
        if segments[row, i] > 0 and segments[row, i] == segments[row, i + 1]
    }
    found = {
        (int(row), int(i)): int(targets.labels[row, i]) for row, i in np.argwhere(np.asarray(targets.weights))
    }
    assert found == expected
    assert set(np.unique(targets.weights)) == {0, 1}
    assert module.predictions_per_row(NextTokenObjective(), 16) == targets.labels.shape[1]


def test_a_row_of_one_token_predicts_nothing():
    batch = Batch(np.array([[7, 0, 0]], np.uint16), np.array([[1, 0, 0]], np.uint8))
    module = objective_module("next_token")
    targets = module.make_targets(batch, jax.random.split(jax.random.key(0), 1), NextTokenObjective())
    assert targets.weights.sum() == 0
    assert targets.num_predictions() == 1  # what sums are divided by
