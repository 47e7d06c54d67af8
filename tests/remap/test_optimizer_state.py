"""The optimiser's state of a remapped model, against autodiff and against training."""

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
from dwt_jax.remap.optimizer_state import copied_entry_mask, grow_opt_state, new_entry_mask, scale_new_updates
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs import optimizer as optimizers
from helpers.reference import batch, parameters
from helpers.remapping import KEY, SMALL, mlm_loss, random_labels, small_with, train_steps


def gradient(params, model):
    inputs = batch(SMALL)
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(mlm_loss), static_argnums=(1, 4))(
            params, model, inputs, random_labels(inputs), np.float64
        )
        return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def source():
    params = parameters(SMALL)
    return params, gradient(params, SMALL)


WIDER = small_with(hidden_size=12, num_attention_heads=3, intermediate_size=17, weighted_norm=True)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERYTHING = dataclasses.replace(WIDER, gated_layers=True, num_hidden_layers=3, vocab_size=300)
CHAINS = {
    "twice": (
        "hyperclone",
        small_with(hidden_size=16, num_attention_heads=4, intermediate_size=24),
        GrowthOptions(),
    ),
    "larger heads": slow("hyperclone", small_with(hidden_size=16), GrowthOptions()),
    "half as wide again": slow("net2net", WIDER, GrowthOptions()),
    "everything": ("middle+net2net", EVERYTHING, GrowthOptions(new_positions="tiled")),
    "uneven": slow("lemon", WIDER, GrowthOptions()),
    "uneven inside": slow("net2net", small_with(intermediate_size=17), GrowthOptions(split="uneven")),
    "hidden": slow("masked", EVERYTHING, GrowthOptions()),
}


@pytest.mark.parametrize(
    ("method", "target", "options"),
    CHAINS.values(),
    ids=CHAINS,
)
def test_moments_are_carried_by_the_chain_rule(source, method, target, options):
    """The mapped gradient of the small model is the gradient of the grown one, taken by autodiff."""
    carried_by_the_chain_rule(SMALL, *source, method, target, options)


@pytest.mark.slow
def test_moments_of_a_decoder_of_its_own():
    source, target = (dataclasses.replace(model, tie_word_embeddings=False) for model in (SMALL, WIDER))
    params = parameters(source)
    carried_by_the_chain_rule(source, params, gradient(params, source), "lemon", target, GrowthOptions())


def carried_by_the_chain_rule(source, params, small, method, target, options):
    grown, report = remap_params(params, source, target, method, KEY, options=options)
    assert report.exact
    todo = plan_growth(method, source, target, KEY, options)
    first, second = grow_params(todo, small, 1), grow_params(todo, jax.tree.map(np.square, small), 2)
    unread = new_entry_mask(copied_entry_mask(todo), grown, todo.param_axes)
    for (path, expected), m, v, new in zip(
        jax.tree_util.tree_leaves_with_path(gradient(grown, target)),
        jax.tree.leaves(first),
        jax.tree.leaves(second),
        jax.tree.leaves(unread),
        strict=True,
    ):
        name = path_name(path)
        if is_gate(name):
            assert not expected.any()
            continue
        if method == "masked":  # its new entries have a gradient of their own
            assert not m[np.broadcast_to(new, m.shape)].any()
            expected = np.where(new, 0, expected)
        np.testing.assert_allclose(m, expected, rtol=1e-8, atol=1e-13, err_msg=name)
        np.testing.assert_allclose(v, expected**2, rtol=1e-8, atol=1e-13, err_msg=name)


def apart(params):
    """How far the two copies of the MLP's units are from each other."""
    kernel, bias = (np.asarray(params["layers"]["mlp"]["input"][leaf]) for leaf in ("kernel", "bias"))
    return max(np.abs(x[..., 12:] - x[..., :12]).max() for x in (kernel, bias))


@pytest.fixture(scope="module")
def trained():
    params = jax.tree.map(jnp.asarray, parameters(SMALL, dtype=np.float32))
    return train_steps(params, optimizers.make_optimizer(Optimizer(), SMALL).init(params), SMALL, 3)


@pytest.mark.parametrize(
    ("moments", "split", "parted"),
    [
        ("reset", "even", False),
        ("carry", "even", False),
        ("asymmetric", "even", True),
        ("carry", "uneven", True),
    ],
)
def test_copies_stay_locked_unless_something_parts_them(trained, moments, split, parted):
    params, state = trained
    target = small_with(intermediate_size=24)
    todo = plan_growth("hyperclone", SMALL, target, KEY, GrowthOptions(split=split))
    grown, grown_state = grow_params(todo, params), grow_opt_state(todo, state, moments)
    assert apart(grown) == 0
    count = int(optax.tree.get(grown_state, "count"))
    assert count == (0 if moments == "reset" else 3)
    assert jax.tree.structure(grown_state) == jax.tree.structure(
        optimizers.make_optimizer(Optimizer(), SMALL).init(grown)
    )
    after, _ = train_steps(grown, grown_state, target, 6)
    assert (apart(after) > 1e-3) if parted else (apart(after) < 1e-5)


def test_moments_have_the_shapes_of_what_they_belong_to(trained):
    params, state = trained
    target = dataclasses.replace(WIDER, gated_layers=True, num_hidden_layers=4, vocab_size=300)
    todo = plan_growth("masked", SMALL, target, KEY)
    grown = grow_params(todo, params)
    new = new_entry_mask(copied_entry_mask(todo), grown, todo.param_axes)
    for moments in ("reset", "carry", "asymmetric"):
        adam = grow_opt_state(todo, state, moments)[1]
        for part in (adam.mu, adam.nu):
            assert jax.tree.map(np.shape, part) == jax.tree.map(np.shape, grown)
            assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(part)) == (moments != "reset")
        if moments == "asymmetric":
            for moment, mask in zip(jax.tree.leaves(adam.nu), jax.tree.leaves(new), strict=True):
                assert not np.where(mask, moment, 0).any()


def test_new_entries_are_warmed_up_alone():
    target = small_with(intermediate_size=20)
    todo = plan_growth("net2net", SMALL, target, KEY)
    params = parameters(SMALL, dtype=np.float32)
    ones = jax.tree.map(np.ones_like, grow_params(todo, params))
    new = new_entry_mask(copied_entry_mask(todo), ones, todo.param_axes)
    found = scale_new_updates(ones, new, 0.25)
    np.testing.assert_array_equal(found["layers"]["mlp"]["input"]["kernel"][..., :12], 1)
    np.testing.assert_array_equal(found["layers"]["mlp"]["input"]["kernel"][..., 12:], 0.25)
    np.testing.assert_array_equal(found["layers"]["mlp"]["output"]["kernel"][:, 12:], 0.25)
    np.testing.assert_array_equal(found["embeddings"]["word"]["embedding"], 1)
