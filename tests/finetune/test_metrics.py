"""GLUE's metrics against scikit-learn and scipy, to 1e-12, degenerate inputs among them."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dwt_jax.finetune.metrics import _METRIC_FUNCTIONS, compute_metrics
from dwt_jax.finetune.outputs import mean_std
from dwt_jax.finetune.tasks import GLUE_TASKS, METRIC_KINDS

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

THEIRS = {
    "accuracy": lambda said, there: sklearn.accuracy_score(there, said),
    "f1": lambda said, there: sklearn.f1_score(there, said, zero_division=0.0),
    "matthews": lambda said, there: sklearn.matthews_corrcoef(there, said),
    "pearson": lambda said, there: stats.pearsonr(said, there)[0],
    "spearman": lambda said, there: stats.spearmanr(said, there)[0],
}


def theirs(metric, said, there):
    """GLUE's value, with NaN as 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(THEIRS[metric](said, there))
    return 0.0 if np.isnan(value) else value


def same(metric, said, there, undefined=None):
    found, zero = compute_metrics([metric], np.array(said), np.array(there))
    assert found[metric] == found["score"]
    assert np.isfinite(found[metric])
    assert abs(found[metric] - theirs(metric, said, there)) <= 1e-12, (metric, said, there)
    if undefined is not None:
        assert zero == ([metric] if undefined else [])


def test_every_metric_is_there():
    assert set(METRIC_KINDS) == set(_METRIC_FUNCTIONS) == set(THEIRS)
    assert {metric for task in GLUE_TASKS.values() for metric in task.metrics} == set(METRIC_KINDS)


pairs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 1), min_size=n, max_size=n),) * 2)
)


@settings(max_examples=60)
@given(pairs)
@example(([0, 0], [0, 0]))
@example(([1, 1], [1, 1]))
@example(([0, 0, 0], [1, 0, 1]))
@example(([1, 1, 1], [0, 0, 0]))
@example(([1], [0]))
def test_two_classes(pair):
    for metric in ("accuracy", "f1", "matthews"):
        same(metric, *pair)


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_more_classes_some_of_which_never_occur(classes, n, seed):
    random = np.random.default_rng(seed)
    said, there = random.integers(0, classes, n), random.integers(0, max(1, classes - 2), n)
    for metric in ("accuracy", "matthews"):
        same(metric, said, there)


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_numbers(n, seed, ties, scale):
    random = np.random.default_rng(seed)
    said, there = random.normal(size=n) * scale, random.normal(size=n) + 3
    if ties:
        said, there = np.round(said / scale) * scale, np.round(there)
    for metric in ("pearson", "spearman"):
        same(metric, said, there)


@pytest.mark.parametrize(
    ("metric", "said", "there"),
    [
        ("f1", [0, 0], [0, 0]),  # no positive anywhere
        ("matthews", [1, 1, 1], [0, 1, 0]),
        ("matthews", [0, 1, 0], [1, 1, 1]),
        ("pearson", [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]),
        ("spearman", [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]),
        ("pearson", [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]),
        ("spearman", [1.0], [2.0]),
    ],
)
def test_nothing_over_nothing_is_zero_and_is_told(metric, said, there):
    if len(said) > 1:
        same(metric, said, there, undefined=True)
    found, undefined = compute_metrics([metric], np.array(said), np.array(there))
    assert (found[metric], undefined) == (0.0, [metric])


def test_predictions_that_are_no_numbers():
    for metric in ("pearson", "spearman"):
        for bad in (np.nan, np.inf):
            assert compute_metrics([metric], np.array([1.0, bad, 2.0]), np.array([1.0, 2.0, 3.0]))[1] == [
                metric
            ]


def test_numbers_whose_squares_overflow_or_vanish():
    for scale in (1e200, 1e-200):
        same("pearson", np.array([1.0, 2.0, 4.0]) * scale, [1.0, 3.0, 2.0], undefined=False)


def test_the_score_is_the_mean_of_the_metrics():
    found, _ = compute_metrics(["f1", "accuracy"], np.array([1, 1, 0, 0]), np.array([1, 0, 0, 1]))
    assert found == {"f1": 0.5, "accuracy": 0.5, "score": 0.5}
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        compute_metrics(["f1"], np.array([1, 1]), np.array([1]))


def test_spread():
    found = mean_std([0.5, 0.7, 0.9])
    assert found["mean"] == pytest.approx(0.7, abs=1e-15)
    assert found["standard_deviation"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1), abs=1e-15)
    assert mean_std([0.5])["standard_deviation"] is None
