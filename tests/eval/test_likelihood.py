"""Evaluation: ties and NaN, and the standard error of a ratio."""

import jax
import numpy as np
import pytest

from dwt_jax.config import Mesh
from dwt_jax.config_loader import load_config
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.eval import likelihood
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from helpers.runs import make_project


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm")
    prepare_data(load_config(str(make_project(folder))).data, folder / "rows", workers=1, log=lambda _: None)
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
