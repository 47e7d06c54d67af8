"""Evaluation: ties and NaN, losses by document, and the standard error of a ratio."""

import jax
import numpy as np
import pytest

from dwt_jax.config import Data, Mesh, Source, Tokenizer
from dwt_jax.config_loader import load_config
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.eval import likelihood
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.prepared_data import hash_fraction
from helpers.runs import make_project


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm")
    prepare_data(load_config(str(make_project(folder))).data, folder / "rows", workers=1)
    return folder / "rows"


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_ties_and_nan_count_against_the_label(rows, value):
    """All logits are equal, or NaN."""
    size = len(load_vocabulary(rows / "tokenizer"))
    model = BertConfig(
        vocab_size=size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    params = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), bert.abstract_params(model))
    metrics = likelihood.summarize_losses(
        likelihood.losses_per_document(params, model, rows, mesh=make_mesh(Mesh(), 1))
    )
    assert metrics["top1_accuracy"] == metrics["top5_accuracy"] == 0
    if value == 0:
        assert metrics["held_out_loss"] == pytest.approx(np.log(size), rel=1e-6)
        assert metrics["standard_error"] == pytest.approx(0, abs=1e-6)
    else:
        assert np.isnan(metrics["held_out_loss"])


def test_standard_error_matches_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    count = rng.integers(5, 60, 400)
    loss = count * (3 + 0.4 * rng.normal(size=400))
    metrics = likelihood.summarize_losses(likelihood.DocumentLosses(loss, 0 * loss, 0 * loss, count))
    draws = rng.integers(0, 400, (4000, 400))
    means = loss[draws].sum(1) / count[draws].sum(1)
    assert metrics["held_out_loss"] == pytest.approx(loss.sum() / count.sum())
    assert metrics["standard_error"] == pytest.approx(means.std(), rel=0.05)


@pytest.mark.parametrize("row_mode", ["wrapped", "packed"])
def test_losses_belong_to_their_documents(tmp_path, row_mode):
    """A document consists of one word, so its labels tell which it is.

    All parameters are 0 but the output bias b: the loss of a label is log Σ exp(b) − b[label], whatever the
    input. Most rows begin with the rest of a document, or with that and further documents.
    """
    words = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECE_TOKENS, *words]))
    sizes = np.random.default_rng(0).integers(20, 70, len(words))
    texts = [
        ". ".join([" ".join([word] * 5).capitalize()] * (n // 5))
        for word, n in zip(words, sizes, strict=True)
    ]
    (tmp_path / "text").write_text("\n".join(texts))
    source = Source(kind="text", path=str(tmp_path / "text"), documents="lines")
    data = Data(
        sources=(source,),
        tokenizer=Tokenizer(path=str(tmp_path / "vocab.txt")),
        sequence_length=32,
        row_mode=row_mode,
        validation_fraction=0.8,
    )
    prepare_data(data, tmp_path / "rows", workers=1)
    held_out = [i for i, text in enumerate(texts) if hash_fraction(text) < 0.8]
    size = len(load_vocabulary(tmp_path / "rows" / "tokenizer"))
    model = BertConfig(
        vocab_size=size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), bert.abstract_params(model))
    bias = np.zeros_like(params["mlm"]["bias"])
    bias[:size] = np.random.default_rng(1).normal(size=size)
    bias[size:] = -1e9
    params["mlm"]["bias"] = bias
    losses = likelihood.losses_per_document(params, model, tmp_path / "rows", mesh=make_mesh(Mesh(), 1))
    special = len(WORDPIECE_TOKENS)
    expected = np.log(np.exp(bias[:size]).sum()) - bias[special:size][held_out]
    np.testing.assert_allclose(losses.loss / losses.predictions, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "predictions", "problem"),
    [
        (2.5, 9, ""),
        (100.0, 9, ""),
        (0.0, 9, "the held-out loss is 0"),
        (np.nan, 9, "the held-out loss is nan"),
        (np.inf, 9, "the held-out loss is inf"),
        (6.978e13, 9, "the held-out loss is 6.978e+13"),  # of a run that diverged to finite parameters
        (-1.0, 9, "the held-out loss is -1"),
        (np.nan, 0, "no token of the held-out rows can be predicted"),
    ],
)
def test_losses_that_cannot_be_right(loss, predictions, problem):
    assert likelihood.loss_problem({"held_out_loss": loss, "predictions": predictions}) == problem
