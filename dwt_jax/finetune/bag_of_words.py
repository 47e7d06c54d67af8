"""Logistic regression on bags of words: the baseline of a classification task without pre-training."""

from typing import Any

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.finetune.datasets import ExampleSplit, TaskData
from dwt_jax.finetune.metrics import compute_metrics

MIN_EXAMPLES = 2  # of the training examples that must have a word


def bag_of_words_score(data: TaskData, split: str = "dev") -> float:
    """Train on `train` and return the mean of the task's metrics on `split`, 0 to 1.

    The features mark the words of an example, separately for each text of a pair, scaled to norm 1. The
    classifier is scikit-learn's LogisticRegression with its defaults.

    Raises:
        UserError: for a task whose labels are numbers.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    if not data.labels:
        raise UserError("a task whose labels are numbers has no bag-of-words score, expected classes")
    train, evaluated = data.splits["train"], data.splits[split]
    vectorizers = [
        CountVectorizer(binary=True, token_pattern=r"\w+", min_df=min(MIN_EXAMPLES, len(train))).fit(texts)
        for texts in _text_columns(train)
    ]

    def features(examples: ExampleSplit) -> Any:
        columns = zip(vectorizers, _text_columns(examples), strict=True)
        counts = sparse.hstack([vectorizer.transform(texts) for vectorizer, texts in columns])
        return normalize(counts.astype(np.float64))

    classifier = LogisticRegression(max_iter=1000).fit(features(train), train.labels)
    predictions = classifier.predict(features(evaluated))
    return compute_metrics(data.metrics, predictions, np.asarray(evaluated.labels))[0]["score"]


def _text_columns(examples: ExampleSplit) -> list[list[str]]:
    return [examples.texts, *([] if examples.text_pairs is None else [examples.text_pairs])]
