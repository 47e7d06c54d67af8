"""The report of a growth."""

import json

import jax
import numpy as np
import pytest

from dwt_jax.models import bert as models_bert
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.report import probe_batch
from helpers.reference import parameters
from helpers.remapping import KEY, SMALL, small_with


def test_report_contents():
    target = small_with(hidden_size=16, num_attention_heads=4, intermediate_size=24, vocab_size=300)
    params = parameters(SMALL, dtype=np.float32)
    probe = probe_batch(SMALL, KEY)
    _, report = remap_params(params, SMALL, target, "hyperclone", KEY, probe=probe)
    assert report.function_preserving
    assert report.logit_drift["max"] < 1e-4 < report.logit_drift["spread"]
    leaves = {leaf.path: leaf for leaf in report.leaves}
    table = leaves["embeddings/word/embedding"]
    assert (table.copied, table.derived, table.new) == (60 * 8, 60 * 8, 240 * 16)
    kernel = leaves["layers/mlp/input/kernel"]
    assert (kernel.copied, kernel.derived, kernel.new) == (0, 2 * 16 * 24, 0)
    assert (leaves["layers/mlp/input/bias"].copied, leaves["layers/mlp/input/bias"].derived) == (24, 24)
    assert sum(report.shares().values()) == pytest.approx(1)
    size = sum(x.size for x in jax.tree.leaves(models_bert.abstract_params(target))) - (512 - 300) * 17
    assert report.parameters[1] == size
    assert report.flops[1] > 3 * report.flops[0]
    record = report.to_dict()
    assert json.loads(json.dumps(record)) == record
    text = report.table()
    for part in (
        "layers/mlp/input/kernel",
        "in:embed 8→16 copies × share",
        "preserved exactly",
        "vocab 60→300 new: mean",
        "drift",
    ):
        assert part in text
    _, report = remap_params(params, SMALL, small_with(num_hidden_layers=5), "stack", KEY, probe=probe)
    assert report.layers == (0, 1, 0, 1, 0)
    assert report.logit_drift["max"] > 0.1
    assert "not preserved: num_hidden_layers 2 → 5" in report.table()
    assert {leaf.path: leaf for leaf in report.leaves}["layers/mlp/input/bias"].copied == 24
