"""Logistic regression on bags of words."""

import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.finetune.bag_of_words import bag_of_words_score
from dwt_jax.finetune.datasets import ExampleSplit, TaskData


def split(texts, labels, pairs=None):
    return ExampleSplit(texts, pairs, np.array(labels), [str(i) for i in range(len(texts))])


def test_words_decide_and_order_does_not():
    train = split(["good day", "fine good", "bad day", "sad bad"] * 5, [1, 1, 0, 0] * 5)
    dev = split(["day good", "bad !", "GOOD", "unseen bad"], [1, 0, 1, 0])
    data = TaskData({"train": train, "dev": dev}, ("0", "1"), ("accuracy",))
    assert bag_of_words_score(data) == 1
    reversed_data = data._replace(splits={"train": train, "dev": split(dev.texts, [0, 1, 0, 1])})
    assert bag_of_words_score(reversed_data) == 0


def test_the_score_is_the_tasks_metric():
    """All predictions are class 0: accuracy is its share, Matthews' coefficient is 0/0 and counts 0."""
    train = split(["a", "a", "a", "a"], [0, 0, 0, 1])
    dev = split(["a", "a", "a"], [0, 1, 1])
    data = TaskData({"train": train, "dev": dev}, ("0", "1"), ("accuracy",))
    assert bag_of_words_score(data) == pytest.approx(1 / 3)
    assert bag_of_words_score(data._replace(metrics=("matthews",))) == 0


def test_texts_of_a_pair_are_kept_apart():
    """The label says in which of the two texts a word is."""
    train = split(["x a", "b y"] * 10, [0, 1] * 10, ["c d", "x a"] * 10)
    dev = split(["x", "q"], [0, 1], ["q", "x"])
    data = TaskData({"train": train, "dev": dev}, ("0", "1"), ("accuracy",))
    assert bag_of_words_score(data) == 1


def test_a_regression_is_refused():
    numbers = split(["a", "b"], [0.5, 1.5])
    with pytest.raises(UserError, match="labels are numbers"):
        bag_of_words_score(TaskData({"train": numbers, "dev": numbers}, (), ("pearson",)))
