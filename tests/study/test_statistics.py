"""Intervals against scipy and simulations, and special cases."""

import numpy as np
import pytest
from scipy import stats

from dwt_jax.study.statistics import PairedDocuments, paired_loss_interval, paired_score_interval


def test_students_t_matches_scipy():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5, 11, 40):
        a, b = rng.normal(size=(2, seeds, 1))
        interval = paired_score_interval(a, b)
        expected = stats.ttest_rel(a[:, 0], b[:, 0]).confidence_interval(0.95)
        assert interval.mean == pytest.approx((a - b).mean(), abs=1e-12)
        assert interval.t_low + interval.t_high == pytest.approx(expected.low + expected.high, abs=1e-12)
        assert interval.t_high - interval.t_low == pytest.approx(expected.high - expected.low, rel=1e-12)


def test_bootstrap_matches_scipy_for_one_level():
    """Percentile bootstrap of a mean; two random ones agree within their own error."""
    a = np.random.default_rng(1).normal(0.3, 1, size=(40, 1))
    interval = paired_score_interval(a, np.zeros_like(a))
    expected = stats.bootstrap(
        (a[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = expected.high - expected.low
    assert interval.low == pytest.approx(expected.low, abs=0.06 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.06 * width)


def test_interval_of_one_run_matches_the_paired_error():
    """One seed, many documents: the interval is ± 1.96 of the paired standard error."""
    from dwt_jax.eval.paired import paired_error

    rng = np.random.default_rng(3)
    count = rng.integers(5, 60, 400).astype(float)
    hard = rng.normal(5, 1, 400)
    a, b = (PairedDocuments(count * (hard + rng.normal(shift, 0.3, 400)), count) for shift in (0.0, 0.1))
    interval = paired_loss_interval([a], [b])
    assert interval.mean == pytest.approx(a.loss.sum() / count.sum() - b.loss.sum() / count.sum(), abs=1e-12)
    error = paired_error(a[:2], b[:2])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert interval.t_high == np.inf
    assert interval.sign == 0  # a single seed decides nothing


def test_sign_requires_both_intervals():
    seeds = np.array([[1.0, 1.1], [1.2, 0.9], [1.05, 1.0]])
    assert paired_score_interval(seeds, np.zeros_like(seeds)).sign == 1
    assert paired_score_interval(np.zeros_like(seeds), seeds).sign == -1
    wide = np.array([[0.1, 0.1], [2.0, 2.0], [0.3, 0.3]])  # the bootstrap stays above 0, t does not
    interval = paired_score_interval(wide, np.zeros_like(wide))
    assert interval.low > 0 > interval.t_low
    assert interval.sign == 0


def test_no_effect_is_rarely_significant():
    """Three seeds of no effect, two hundred times: signs in at most the 5 % that the interval allows."""
    rng = np.random.default_rng(4)
    signs = [paired_score_interval(rng.normal(size=(3, 3)), rng.normal(size=(3, 3))).sign for _ in range(200)]
    assert np.mean(np.abs(signs)) <= 0.08
    bootstrap_excludes_zero = []
    for _ in range(200):
        interval = paired_score_interval(rng.normal(size=(3, 1)), rng.normal(size=(3, 1)))
        bootstrap_excludes_zero.append(interval.low > 0 or interval.high < 0)
    assert np.mean(bootstrap_excludes_zero) > 0.12  # too narrow for few seeds


def test_paradigms_are_the_same_for_all_seeds():
    """One sample of paradigms a replicate: their variance does not shrink with the number of seeds."""
    difference = np.repeat(np.random.default_rng(5).normal(0, 1, (1, 60)), 8, axis=0)
    crossed = paired_score_interval(difference, np.zeros_like(difference), crossed=True)
    expected = stats.bootstrap(
        (difference[0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(6)
    ).confidence_interval
    width = expected.high - expected.low
    assert crossed.low == pytest.approx(expected.low, abs=0.06 * width)
    assert crossed.high == pytest.approx(expected.high, abs=0.06 * width)
    nested = paired_score_interval(difference, np.zeros_like(difference))
    assert nested.high - nested.low < 0.5 * width


def test_different_documents_raise():
    documents = PairedDocuments(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="different held-out documents"):
        paired_loss_interval([documents], [PairedDocuments(np.ones(4), np.array([1.0, 2, 1, 1]))])
