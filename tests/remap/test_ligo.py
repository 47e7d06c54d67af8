"""LiGO: the initial maps, and that they can be learned."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from dwt_jax.models import bert
from dwt_jax.remap import ligo
from dwt_jax.remap.apply import remap_params
from helpers.reference import batch, logits, parameters
from helpers.remapping import KEY, SMALL, mlm_loss, random_labels, small_with

TARGET = small_with(
    hidden_size=16, num_attention_heads=4, num_hidden_layers=3, intermediate_size=20, vocab_size=300
)
WIDER = small_with(hidden_size=12, num_attention_heads=3, num_hidden_layers=3)
SIZES = {
    "grown": TARGET,
    "larger heads": small_with(hidden_size=16, intermediate_size=17),
    "weighted": dataclasses.replace(WIDER, weighted_norm=True, gated_layers=True),
    "shrunk": small_with(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=5),
}


@pytest.mark.parametrize("target", SIZES.values(), ids=SIZES)
def test_initial_maps_without_noise_equal_method_ligo(target):
    params = parameters(SMALL, dtype=np.float32)
    maps, plan = ligo.init_maps(params, SMALL, target, KEY, noise=0)
    expected, _ = remap_params(params, SMALL, target, "ligo", KEY)
    grown = ligo.apply_maps(maps, params, plan)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, bert.abstract_params(target))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grown), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


def test_initial_maps_of_doubled_width_preserve_function():
    params, inputs = parameters(SMALL), batch(SMALL)
    target = small_with(hidden_size=16, intermediate_size=20)
    maps, plan = ligo.init_maps(params, SMALL, target, KEY, noise=0)
    grown_logits = logits(ligo.apply_maps(maps, params, plan), target, *inputs)
    assert np.abs(grown_logits - logits(params, SMALL, *inputs)).max() < 1e-4


def test_every_map_has_gradient_and_loss_falls():
    params = parameters(SMALL, dtype=np.float32)
    maps, plan = ligo.init_maps(params, SMALL, TARGET, KEY)
    inputs = batch(SMALL)

    @jax.jit
    def value_and_gradient(maps):
        def loss(maps):
            return mlm_loss(
                ligo.apply_maps(maps, params, plan), TARGET, inputs, random_labels(inputs), np.float32
            )

        return jax.value_and_grad(loss)(maps)

    first, gradients = value_and_gradient(maps)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    chain = optax.adam(3e-3)
    state = chain.init(maps)
    for _ in range(20):
        _, gradients = value_and_gradient(maps)
        updates, state = chain.update(gradients, state)
        maps = optax.apply_updates(maps, updates)
    assert value_and_gradient(maps)[0] < 0.9 * first
