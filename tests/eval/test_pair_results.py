"""Accuracies, ties, bootstrap intervals, and the file of scores."""

import json

import numpy as np
import pytest
from scipy import stats

from dwt_jax.errors import UserError
from dwt_jax.eval.minimal_pairs import MinimalPair, Paradigm
from dwt_jax.eval.pair_results import (
    PairScores,
    ScoreFile,
    bootstrap_interval,
    format_pair_results,
    summarize_pairs,
)


def paradigm(name, term, count):
    return Paradigm(name, term, "", (MinimalPair("a", "b", "", ""),) * count)


def pair_scores(good, bad):
    return PairScores(np.array(good, float), np.array(bad, float))


PARADIGMS = [paradigm("x-1", "x", 4), paradigm("y-1", "y", 2), paradigm("x-2", "x", 1)]
SCORES = {
    "x-1": pair_scores([-1, -2, -3, -4], [-2, -2, -2, -9]),  # 1, ½, 0, 1
    "x-2": pair_scores([-1], [-2]),
    "y-1": pair_scores([-1, -5], [-1, -4]),
}


def test_a_tie_counts_half_and_means_are_over_paradigms():
    results = summarize_pairs(PARADIGMS, SCORES)
    assert {name: row["accuracy"] for name, row in results["by_paradigm"].items()} == {
        "x-1": 62.5,
        "x-2": 100,
        "y-1": 25,
    }
    assert {term: row["accuracy"] for term, row in results["by_term"].items()} == {"x": 81.25, "y": 25}
    assert results["accuracy"] == (62.5 + 100 + 25) / 3
    assert (results["paradigms"], results["pairs"]) == (3, 7)
    assert results["by_term"]["x"]["pairs"] == 5
    assert results["by_term"]["y"]["interval"] is None
    json.dumps(results)


def test_the_table_has_all_then_terms_with_their_paradigms():
    lines = format_pair_results(summarize_pairs(PARADIGMS, SCORES)).splitlines()
    assert [line.split("  ")[0] or line.split()[0] for line in lines[1:]] == [
        "all (mean of paradigms)", "x", "x-1", "x-2", "y", "y-1",
    ]  # fmt: skip
    assert lines[3].split() == ["x-1", "62.5", "4"]


def test_interval_equals_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).uniform(40, 100, 20)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    np.testing.assert_allclose(bootstrap_interval(values), expected.confidence_interval, atol=0.4)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values[:1]) is None
    assert bootstrap_interval(np.array([60.0, 60.0])) == (60, 60)


IDENTITY = {"model": "m", "pll": "word-l2r", "normalize_length": False}


def test_scores_are_read_back_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "scores.json"
    scores = pair_scores(np.random.default_rng(0).normal(size=4), np.random.default_rng(1).normal(size=4))
    file = ScoreFile(path, IDENTITY, PARADIGMS)
    assert not file.scores
    file.add("x-1", scores)
    again = ScoreFile(path, IDENTITY, PARADIGMS)
    assert [*again.scores] == ["x-1"]
    np.testing.assert_array_equal(again.scores["x-1"], scores)
    again.finish({"accuracy": 1.5})
    assert json.loads(path.read_text())["results"] == {"accuracy": 1.5}
    assert [x.name for x in path.parent.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"identity": {**IDENTITY, "model": "n"}, "scores": {}},
            "scores with model 'n', expected 'm' or a new",
        ),
        ({"identity": {**IDENTITY, "pll": "original"}}, "with pll 'original', expected 'word-l2r'"),
        ({"loss": 3}, "no identity, expected scores of dwt evaluate --pairs"),
        ([], "holds a JSON list, expected the scores of an earlier"),
        ({"identity": IDENTITY}, "has no scores"),
        ({"identity": IDENTITY, "scores": {"z": {}}}, "scores.z is damaged"),
        ({"identity": IDENTITY, "scores": {"x-2": {"good": [1], "bad": [1, 2]}}}, "scores.x-2 is damaged"),
        ({"identity": IDENTITY, "scores": {"x-2": {"good": [1], "bad": [None]}}}, "scores.x-2 is damaged"),
    ],
)
def test_a_file_of_something_else_is_refused_and_not_changed(content, says, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        ScoreFile(path, IDENTITY, PARADIGMS)
    assert says in str(error.value)
    assert path.read_text() == json.dumps(content)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a directory, expected a file"):
        ScoreFile(tmp_path, IDENTITY, PARADIGMS)
