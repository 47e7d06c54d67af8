"""The optimizer state of a remapped model, compared with autodiff and with training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dwt_jax.config import Optimizer
from dwt_jax.models.common.logical_axes import is_gate, path_name
from dwt_jax.remap.apply import grow_params, remap_params
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.optimizer_state import (
    copied_entry_mask,
    grow_opt_state,
    moment_states,
    new_entry_mask,
    scale_new_updates,
)
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs import optimizer as optimizers
from helpers.reference import batch, parameters
from helpers.remapping import KEY, SMALL, mlm_loss, random_labels, small_with, train_steps

jit_gradient = jax.jit(jax.grad(mlm_loss), static_argnums=(1, 4))


def gradient(params, model, seed=1):
    inputs = batch(SMALL, seed=seed)
    with jax.enable_x64(True):
        gradients = jit_gradient(params, model, inputs, random_labels(inputs), np.float64)
        return jax.tree.map(np.asarray, gradients)


@pytest.fixture(scope="module")
def source():
    params = parameters(SMALL)
    return params, gradient(params, SMALL)


WIDER = small_with(hidden_size=12, num_attention_heads=3, intermediate_size=17, weighted_norm=True)


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERYTHING = dataclasses.replace(WIDER, gated_layers=True, num_hidden_layers=3, vocab_size=300)
CHAIN_RULE_CASES = {
    "twice": (
        "hyperclone",
        small_with(hidden_size=16, num_attention_heads=4, intermediate_size=24),
        GrowthOptions(),
    ),
    "larger heads": slow_case("hyperclone", small_with(hidden_size=16), GrowthOptions()),
    "half as wide again": slow_case("net2net", WIDER, GrowthOptions()),
    "everything": ("middle+net2net", EVERYTHING, GrowthOptions(new_positions="tiled")),
    "uneven": slow_case("lemon", WIDER, GrowthOptions()),
    "uneven inside": slow_case("net2net", small_with(intermediate_size=17), GrowthOptions(split="uneven")),
    "hidden": slow_case("masked", EVERYTHING, GrowthOptions()),
}


@pytest.mark.parametrize(
    ("method", "target", "options"),
    CHAIN_RULE_CASES.values(),
    ids=CHAIN_RULE_CASES,
)
def test_moments_follow_chain_rule(source, method, target, options):
    """The mapped gradient of the small model equals the gradient of the grown one by autodiff."""
    check_chain_rule(SMALL, *source, method, target, options)


@pytest.mark.slow
def test_moments_of_untied_decoder_follow_chain_rule():
    source, target = (dataclasses.replace(model, tie_word_embeddings=False) for model in (SMALL, WIDER))
    params = parameters(source)
    check_chain_rule(source, params, gradient(params, source), "lemon", target, GrowthOptions())


def check_chain_rule(source, params, source_gradient, method, target, options):
    grown, report = remap_params(params, source, target, method, KEY, options=options)
    assert report.function_preserving
    plan = plan_growth(method, source, target, KEY, options)
    first_moments, second_moments = (
        grow_params(plan, source_gradient, 1),
        grow_params(plan, jax.tree.map(np.square, source_gradient), 2),
    )
    new_mask = new_entry_mask(copied_entry_mask(plan), grown, plan.param_axes)
    for (path, expected), m, v, new in zip(
        jax.tree_util.tree_leaves_with_path(gradient(grown, target)),
        jax.tree.leaves(first_moments),
        jax.tree.leaves(second_moments),
        jax.tree.leaves(new_mask),
        strict=True,
    ):
        name = path_name(path)
        if is_gate(name):
            assert not expected.any()
            continue
        if method == "masked":  # its new entries have gradients without a source
            assert not m[np.broadcast_to(new, m.shape)].any()
            expected = np.where(new, 0, expected)
        np.testing.assert_allclose(m, expected, rtol=1e-8, atol=1e-13, err_msg=name)
        np.testing.assert_allclose(v, expected**2, rtol=1e-8, atol=1e-13, err_msg=name)


def state_after(optimizer, params, model, batches=3):
    """The optimizer state after gradients of several batches at the same parameters, in float64."""
    chain = optimizers.make_optimizer(optimizer, model)
    gradients = [gradient(params, model, seed) for seed in range(batches)]
    with jax.enable_x64(True):
        state, update = chain.init(params), jax.jit(chain.update)
        for g in gradients:
            _, state = update(g, state, params)
        return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("method", "target", "options"),
    [CHAIN_RULE_CASES["twice"], CHAIN_RULE_CASES["everything"]],
    ids=["twice", "everything"],
)
def test_grown_state_is_that_of_the_grown_model(source, kind, method, target, options):
    """Moments are means of gradients and of their squares: growth and training commute while the
    parameters stand still. Without clipping, since the norm of the gradient is another."""
    params, optimizer = source[0], Optimizer(kind, clip_norm=0.0)
    plan = plan_growth(method, SMALL, target, KEY, options)
    state = state_after(optimizer, params, SMALL)
    expected = state_after(optimizer, grow_params(plan, params), target)
    found = grow_opt_state(plan, state)
    assert len(moment_states(found)) == (2 if kind == "muon" else 1)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-13), found, expected)
    for moments, count in (("reset", 0), ("asymmetric", 3)):
        other = grow_opt_state(plan, state, moments)
        assert jax.tree.structure(other) == jax.tree.structure(expected)
        for node in moment_states(other):
            assert node.count == count
            assert any(np.any(x) for x in jax.tree.leaves(node.mu)) == (count > 0)


def copy_distance(params):
    """The largest difference between the two copies of the MLP's units."""
    kernel, bias = (np.asarray(params["layers"]["mlp"]["input"][leaf]) for leaf in ("kernel", "bias"))
    return max(np.abs(x[..., 12:] - x[..., :12]).max() for x in (kernel, bias))


@pytest.fixture(scope="module")
def trained():
    params = jax.tree.map(jnp.asarray, parameters(SMALL, dtype=np.float32))
    return train_steps(params, optimizers.make_optimizer(Optimizer(), SMALL).init(params), SMALL, 3)


@pytest.mark.parametrize(
    ("moments", "split", "diverges"),
    [
        ("reset", "even", False),
        ("carry", "even", False),
        ("asymmetric", "even", True),
        ("carry", "uneven", True),
    ],
)
def test_copies_stay_equal_unless_symmetry_is_broken(trained, moments, split, diverges):
    params, state = trained
    target = small_with(intermediate_size=24)
    plan = plan_growth("hyperclone", SMALL, target, KEY, GrowthOptions(split=split))
    grown, grown_state = grow_params(plan, params), grow_opt_state(plan, state, moments)
    assert copy_distance(grown) == 0
    count = int(optax.tree.get(grown_state, "count"))
    assert count == (0 if moments == "reset" else 3)
    assert jax.tree.structure(grown_state) == jax.tree.structure(
        optimizers.make_optimizer(Optimizer(), SMALL).init(grown)
    )
    after, _ = train_steps(grown, grown_state, target, 6)
    assert (copy_distance(after) > 1e-3) if diverges else (copy_distance(after) < 1e-5)


def test_moments_have_shapes_of_params(trained):
    params, state = trained
    target = dataclasses.replace(WIDER, gated_layers=True, num_hidden_layers=4, vocab_size=300)
    plan = plan_growth("masked", SMALL, target, KEY)
    grown = grow_params(plan, params)
    new = new_entry_mask(copied_entry_mask(plan), grown, plan.param_axes)
    for moments in ("reset", "carry", "asymmetric"):
        adam = grow_opt_state(plan, state, moments)[1]
        for part in (adam.mu, adam.nu):
            assert jax.tree.map(np.shape, part) == jax.tree.map(np.shape, grown)
            assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part)) == (moments != "reset")
        if moments == "asymmetric":
            for moment, mask in zip(jax.tree.leaves(adam.nu), jax.tree.leaves(new), strict=True):
                assert not np.where(mask, moment, 0).any()


def test_scale_new_updates_scales_new_entries_only():
    target = small_with(intermediate_size=20)
    plan = plan_growth("net2net", SMALL, target, KEY)
    params = parameters(SMALL, dtype=np.float32)
    ones = jax.tree.map(np.ones_like, grow_params(plan, params))
    new = new_entry_mask(copied_entry_mask(plan), ones, plan.param_axes)
    scaled = scale_new_updates(ones, new, 0.25)
    np.testing.assert_array_equal(scaled["layers"]["mlp"]["input"]["kernel"][..., :12], 1)
    np.testing.assert_array_equal(scaled["layers"]["mlp"]["input"]["kernel"][..., 12:], 0.25)
    np.testing.assert_array_equal(scaled["layers"]["mlp"]["output"]["kernel"][:, 12:], 0.25)
    np.testing.assert_array_equal(scaled["embeddings"]["word"]["embedding"], 1)
