"""GLUE's metrics against scikit-learn and scipy, to 1e-12, including degenerate inputs."""

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

REFERENCES = {
    "accuracy": lambda predictions, labels: sklearn.accuracy_score(labels, predictions),
    "f1": lambda predictions, labels: sklearn.f1_score(labels, predictions, zero_division=0.0),
    "matthews": lambda predictions, labels: sklearn.matthews_corrcoef(labels, predictions),
    "pearson": lambda predictions, labels: stats.pearsonr(predictions, labels)[0],
    "spearman": lambda predictions, labels: stats.spearmanr(predictions, labels)[0],
}


def reference_value(metric, predictions, labels):
    """Return scikit-learn's or scipy's value, with NaN as 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(REFERENCES[metric](predictions, labels))
    return 0.0 if np.isnan(value) else value


def check_against_reference(metric, predictions, labels, undefined=None):
    values, undefined_metrics = compute_metrics([metric], np.array(predictions), np.array(labels))
    assert values[metric] == values["score"]
    assert np.isfinite(values[metric])
    assert abs(values[metric] - reference_value(metric, predictions, labels)) <= 1e-12, (
        metric,
        predictions,
        labels,
    )
    if undefined is not None:
        assert undefined_metrics == ([metric] if undefined else [])


def test_every_metric_is_implemented_and_used():
    assert set(METRIC_KINDS) == set(_METRIC_FUNCTIONS) == set(REFERENCES)
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
def test_metrics_of_two_classes(pair):
    for metric in ("accuracy", "f1", "matthews"):
        check_against_reference(metric, *pair)


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_metrics_with_absent_classes(classes, n, seed):
    random = np.random.default_rng(seed)
    predictions, labels = random.integers(0, classes, n), random.integers(0, max(1, classes - 2), n)
    for metric in ("accuracy", "matthews"):
        check_against_reference(metric, predictions, labels)


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_correlations(n, seed, ties, scale):
    random = np.random.default_rng(seed)
    predictions, labels = random.normal(size=n) * scale, random.normal(size=n) + 3
    if ties:
        predictions, labels = np.round(predictions / scale) * scale, np.round(labels)
    for metric in ("pearson", "spearman"):
        check_against_reference(metric, predictions, labels)


@pytest.mark.parametrize(
    ("metric", "predictions", "labels"),
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
def test_undefined_metric_is_zero_and_reported(metric, predictions, labels):
    if len(predictions) > 1:
        check_against_reference(metric, predictions, labels, undefined=True)
    values, undefined = compute_metrics([metric], np.array(predictions), np.array(labels))
    assert (values[metric], undefined) == (0.0, [metric])


def test_correlation_of_non_finite_predictions_is_undefined():
    for metric in ("pearson", "spearman"):
        for invalid in (np.nan, np.inf):
            assert compute_metrics([metric], np.array([1.0, invalid, 2.0]), np.array([1.0, 2.0, 3.0]))[1] == [
                metric
            ]


def test_pearson_does_not_overflow_or_underflow():
    for scale in (1e200, 1e-200):
        check_against_reference(
            "pearson", np.array([1.0, 2.0, 4.0]) * scale, [1.0, 3.0, 2.0], undefined=False
        )


def test_score_is_the_mean_of_the_metrics():
    values, _ = compute_metrics(["f1", "accuracy"], np.array([1, 1, 0, 0]), np.array([1, 0, 0, 1]))
    assert values == {"f1": 0.5, "accuracy": 0.5, "score": 0.5}
    with pytest.raises(ValueError, match="2 predictions for 1 labels"):
        compute_metrics(["f1"], np.array([1, 1]), np.array([1]))


def test_mean_std():
    summary = mean_std([0.5, 0.7, 0.9])
    assert summary["mean"] == pytest.approx(0.7, abs=1e-15)
    assert summary["standard_deviation"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1), abs=1e-15)
    assert mean_std([0.5])["standard_deviation"] is None
