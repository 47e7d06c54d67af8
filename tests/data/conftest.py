"""A small tokenizer and a small corpus, for the tests that prepare data."""

import json
import random
from pathlib import Path

import pytest

from dwt_jax.config import Source
from dwt_jax.data import tokenizer
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import iter_documents
from dwt_jax.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    texts = [*iter_documents(Source())][::40]
    tokenizer.save_tokenizer(train_tokenizer(lambda: texts, 1000, True), path, True)
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """60 documents of 1 to 40 sentences, some without a token, one pair of duplicates."""
    sentences = split_sentences([*iter_documents(Source())][100])
    draw = random.Random(0)
    documents = [" ".join(draw.choices(sentences, k=draw.randint(1, 40))) for _ in range(57)]
    return [*documents[:20], "\u200b", *documents[20:], "\u0003 \u200b", documents[3]]


@pytest.fixture
def corpus(texts, tmp_path) -> Source:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(kind="jsonl", path=str(path))
