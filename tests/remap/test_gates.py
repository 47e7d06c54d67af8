"""Weighted norms and gated layers: optional parts of the model that end at 1."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config import Optimizer
from dwt_jax.errors import UserError
from dwt_jax.hf import checkpoint
from dwt_jax.models import bert
from dwt_jax.models.common.logical_axes import is_gate, path_name
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.gates import fold_gates, open_gates
from dwt_jax.runs import optimizer as optimizers
from helpers.reference import batch, parameters
from helpers.remapping import KEY, SMALL, mlm_loss, model_logits, small_with, train_steps

GATED = small_with(weighted_norm=True, gated_layers=True)
GROWN = dataclasses.replace(GATED, hidden_size=12, num_attention_heads=3, num_hidden_layers=4)


def split_gates(params):
    """({path: gate}, {path: other leaf})"""
    flat = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return tuple({name: x for name, x in flat.items() if is_gate(name) == gates} for gates in (True, False))


def test_gates_exist_only_in_gated_models():
    assert split_gates(bert.init_params(SMALL, KEY))[0] == {}
    gates, ordinary = split_gates(bert.init_params(GATED, KEY))
    assert sorted(ordinary) == sorted(split_gates(bert.init_params(SMALL, KEY))[1])
    assert {x.shape for x in gates.values()} == {(8,), (2, 8), (2,)}
    assert all((x == 1).all() for x in gates.values())


def test_open_gates_fold_to_ordinary_model():
    params = parameters(GATED)
    opened = open_gates(params, 1)
    plain, model = fold_gates(opened, GATED)
    assert model == SMALL
    assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, bert.abstract_params(SMALL))
    inputs = batch(SMALL)
    expected = model_logits(plain, SMALL, inputs, np.float64)
    np.testing.assert_allclose(model_logits(opened, GATED, inputs, np.float64), expected, atol=1e-12)


def test_open_gates_starts_as_remapped_and_ends_at_one():
    params, _ = remap_params(parameters(SMALL, dtype=np.float32), SMALL, GROWN, "masked", KEY)
    initial_gates = split_gates(params)[0]
    for progress in (0, 0.25, 1):
        gates, ordinary = split_gates(open_gates(params, np.float32(progress)))
        for name, x in gates.items():
            np.testing.assert_allclose(
                x, initial_gates[name] + (1 - initial_gates[name]) * progress, rtol=1e-6
            )
            assert progress != 1 or (x == 1).all()
        for name, x in split_gates(params)[1].items():
            np.testing.assert_array_equal(ordinary[name], x)


def test_optimizer_does_not_change_gates():
    params, _ = remap_params(parameters(SMALL, dtype=np.float32), SMALL, GROWN, "masked", KEY)
    inputs = batch(SMALL)
    labels = np.zeros_like(inputs[0])
    gradients = jax.jit(jax.grad(mlm_loss), static_argnums=(1, 4))(params, GROWN, inputs, labels, np.float32)
    gates, ordinary = split_gates(gradients)
    assert not any(x.any() for x in gates.values())
    assert all(np.isfinite(x).all() for x in ordinary.values())
    after, _ = train_steps(params, optimizers.make_optimizer(Optimizer(), GROWN).init(params), GROWN, 2)
    for name, x in split_gates(after)[0].items():
        np.testing.assert_array_equal(x, split_gates(params)[0][name])


def test_export_requires_open_gates(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    params, _ = remap_params(parameters(SMALL, dtype=np.float32), SMALL, GROWN, "masked", KEY)
    with pytest.raises(UserError, match=r"norm/weight is from 0 to 1, expected 1") as error_info:
        checkpoint.save_checkpoint(params, GROWN, tmp_path / "tokenizer", tmp_path / "model")
    assert "\n" not in str(error_info.value)
    assert not (tmp_path / "model").exists()
    opened = open_gates(params, 1)
    checkpoint.save_checkpoint(opened, GROWN, tmp_path / "tokenizer", tmp_path / "model")
    loaded = checkpoint.load_checkpoint(tmp_path / "model")
    assert loaded.model == dataclasses.replace(GROWN, weighted_norm=False, gated_layers=False)
    np.testing.assert_array_equal(
        loaded.params["layers"]["mlp"]["input"]["kernel"], opened["layers"]["mlp"]["input"]["kernel"]
    )
