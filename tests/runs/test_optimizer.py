"""AdamW against torch, Muon against Optax and NumPy, StableAdamW against NumPy, on the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dwt_jax.config import Optimizer
from dwt_jax.hf.checkpoint import to_hf_tensors
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.runs import optimizer as optimizers
from helpers.jaxprs import count_flops

torch = pytest.importorskip("torch")
RATES = [1e-3, 5e-3, 0.0, 2e-3, 1e-3]


def decays(name):
    return not (name.endswith("bias") or "LayerNorm" in name)


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(),
        Optimizer(b1=0.8, b2=0.98, eps=1e-3, weight_decay=0.3, clip_norm=0.5),
        Optimizer(weight_decay=0.0, clip_norm=0.0),
    ],
    ids=["default", "other", "plain"],
)
def test_steps_are_torchs(tiny, randomised, settings):
    params = randomised(tiny)
    # The first gradient is far above the clipping norm, the last ones below.
    gradients = [
        jax.tree.map(lambda x, s=s: x * s, randomised(tiny, 10 + i))
        for i, s in enumerate([9, 1, 1e-3, 1e-4, 1e-5])
    ]
    start = to_hf_tensors(params, tiny)
    there = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in start.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [x for n, x in there.items() if decays(n)], "weight_decay": settings.weight_decay},
            {"params": [x for n, x in there.items() if not decays(n)], "weight_decay": 0.0},
        ],
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
    )
    # Padding of the vocabulary has no gradient in training; here it must not count in the norm.
    gradients = [cut(gradient, tiny) for gradient in gradients]

    chain = optimizers.make_optimizer(settings, tiny)
    state, update = chain.init(params), jax.jit(chain.update)
    for gradient, rate in zip(gradients, RATES, strict=True):
        direction, state = update(gradient, state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, direction)
        for name, x in to_hf_tensors(gradient, tiny).items():
            there[name].grad = torch.tensor(x, dtype=torch.float64)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(there.values(), settings.clip_norm)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        for name, x in to_hf_tensors(params, tiny).items():
            np.testing.assert_allclose(x, there[name].detach(), rtol=1e-6, atol=1e-6, err_msg=name)
    moved = max(np.abs(x - start[name]).max() for name, x in to_hf_tensors(params, tiny).items())
    assert moved > 1e-3


def cut(gradient, model):
    word = gradient["embeddings"]["word"]["embedding"].at[model.vocab_size :].set(0)
    bias = gradient["mlm"]["bias"].at[model.vocab_size :].set(0)
    return {
        **gradient,
        "embeddings": {**gradient["embeddings"], "word": {"embedding": word}},
        "mlm": {**gradient["mlm"], "bias": bias},
    }


def test_padding_of_the_vocabulary_shrinks_and_nothing_else(tiny, randomised):
    """Its gradient is 0: Adam leaves it alone, decay pulls it towards 0."""
    params = randomised(tiny)
    chain = optimizers.make_optimizer(Optimizer(weight_decay=0.5), tiny)
    zero = jax.tree.map(jnp.zeros_like, params)
    direction, _ = jax.jit(chain.update)(zero, chain.init(params), params)
    np.testing.assert_allclose(
        direction["embeddings"]["word"]["embedding"],
        0.5 * params["embeddings"]["word"]["embedding"],
        rtol=1e-6,
    )
    assert not np.any(direction["mlm"]["bias"])
    assert not np.any(direction["layers"]["mlp"]["norm"]["scale"])


def test_the_state_of_adamw_is_optaxs(tiny, randomised):
    """Checkpoints of before the other kinds must be read as before."""
    params = randomised(tiny)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=jax.tree.map(lambda x: x.ndim > 1, params)),
    )
    found = optimizers.make_optimizer(Optimizer(), tiny).init(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected.init(params))


KERNELS = {
    "layers/attention/query/kernel": ((1,), (2, 3)),
    "layers/attention/key/kernel": ((1,), (2, 3)),
    "layers/attention/value/kernel": ((1,), (2, 3)),
    "layers/attention/output/kernel": ((1, 2), (3,)),
    "layers/mlp/input/kernel": ((1,), (2,)),
    "layers/mlp/output/kernel": ((1,), (2,)),
    "mlm/transform/kernel": ((0,), (1,)),
}
"""Muon's leaves of a BERT: (dimensions of the inputs, of the outputs)."""


def by_path(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def several_updates(chain, params, gradients):
    """What the optimizer returns for each of these gradients, by path, with the same parameters."""
    state, update, found = chain.init(params), jax.jit(chain.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(by_path(updates))
    return found


def test_muon_is_optaxs_with_adamw_for_the_rest(tiny, randomised):
    settings = Optimizer(
        "muon", b1=0.8, b2=0.98, weight_decay=0.3, clip_norm=0.0, momentum=0.9, ns_steps=3, adam_lr_ratio=0.25
    )
    params, gradients = randomised(tiny), [randomised(tiny, 10 + i) for i in range(4)]
    dims = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            optax.contrib.MuonDimensionNumbers(*KERNELS[path_name(path)])
            if path_name(path) in KERNELS
            else None
        ),
        params,
    )
    muon = optax.contrib.muon(
        1.0,
        ns_steps=3,
        beta=0.9,
        weight_decay=0.3,
        muon_weight_dimension_numbers=dims,
        consistent_rms=0.2,
    )
    is_table = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "embedding", params)
    adamw = optax.adamw(0.25, 0.8, 0.98, weight_decay=0.3, mask=is_table)
    found, muons, adamws = (
        several_updates(chain, params, gradients)
        for chain in (optimizers.make_optimizer(settings, tiny), muon, adamw)
    )
    for step in range(4):
        for name, update in found[step].items():
            expected = muons[step][name] if name in KERNELS else adamws[step][name]
            np.testing.assert_allclose(update, -expected, rtol=1e-5, atol=1e-6, err_msg=name)


def newton_schulz(matrix, steps):
    """Jordan et al. 2024, in float64."""
    x = matrix / np.linalg.norm(matrix)
    x = x.T if len(x) > len(x.T) else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > len(matrix.T) else x


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize(
    ("leaf", "shape"),
    [
        (("layers", "attention", "query", "kernel"), (32, 4 * 8)),
        (("layers", "attention", "output", "kernel"), (4 * 8, 32)),
        (("layers", "mlp", "output", "kernel"), (48, 32)),
    ],
)
def test_muon_is_newton_schulz_of_each_layer_and_nesterovs_momentum(tiny, randomised, leaf, shape, steps):
    settings = Optimizer("muon", weight_decay=0.0, clip_norm=0.0, ns_steps=steps)
    gradients = [randomised(tiny, i) for i in (1, 2)]
    found = several_updates(optimizers.make_optimizer(settings, tiny), randomised(tiny), gradients)[1]
    first, second = (by_path(gradient)["/".join(leaf)].astype(float) for gradient in gradients)
    momentum = 0.95 * 0.05 * first + 0.05 * second  # a mean of gradients, then Nesterov's look ahead
    momentum = 0.95 * momentum / (1 - 0.95**3) + 0.05 * second / (1 - 0.95**2)
    for layer in range(2):
        expected = newton_schulz(momentum[layer].reshape(shape), steps) * 0.2 * np.sqrt(max(shape))
        np.testing.assert_allclose(found["/".join(leaf)][layer].reshape(shape), expected, atol=2e-4)
        if steps == 5:  # as large as AdamW's
            assert np.sqrt((expected**2).mean()) == pytest.approx(0.2, rel=0.2)


def stable_adamw(x, gradients, settings, decays):
    """The last update of one tensor, Wortsman et al. 2023, algorithm 2, and by what it was divided."""
    v = u = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (settings.b1, settings.b2))
        v, u = b1 * v + (1 - b1) * g, b2 * u + (1 - b2) * g**2
        rms = np.sqrt((g**2 / np.maximum(u, settings.eps**2)).mean())
    update = v / (np.sqrt(u) + settings.eps) + settings.weight_decay * decays * x
    return update / max(1, rms), rms


def test_stable_adamw_is_the_papers_for_each_tensor_of_each_layer(tiny, randomised):
    settings = Optimizer("stable_adamw", b2=0.98, eps=1e-6, weight_decay=0.3, clip_norm=0.0)
    params, gradients = randomised(tiny), [randomised(tiny, 10 + i) for i in range(3)]
    factors = iter(np.exp(np.random.default_rng(0).normal(size=99)))  # of the last gradient, by layer
    gradients[2] = jax.tree.map(
        lambda g: (
            g * np.array([next(factors), next(factors)]).reshape(2, *(1,) * (g.ndim - 1))
            if len(g) == 2
            else g * next(factors)
        ),
        gradients[2],
    )
    # A leaf that no gradient reaches, e.g. a gate, must not become 0 / 0.
    gradients = [{**g, "mlm": {**g["mlm"], "bias": jnp.zeros_like(g["mlm"]["bias"])}} for g in gradients]
    found = several_updates(optimizers.make_optimizer(settings, tiny), params, gradients)[-1]
    start, history = by_path(params), [by_path(gradient) for gradient in gradients]
    clipped = 0
    for name, update in found.items():
        is_stacked = name.startswith("layers/")
        for tensor in range(2) if is_stacked else [...]:
            x, *gs = (tree[name][tensor].astype(float) for tree in (start, *history))
            expected, rms = stable_adamw(x, gs, settings, name.endswith(("kernel", "embedding")))
            np.testing.assert_allclose(update[tensor], expected, rtol=2e-5, atol=1e-6, err_msg=name)
            clipped += rms > 1.2
    assert 5 < clipped < 30
    assert not found["mlm/bias"].any()


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("inner", [17, 48])
def test_the_flops_are_those_of_the_products(tiny, randomised, steps, inner):
    model = dataclasses.replace(tiny, intermediate_size=inner)
    params = randomised(model)
    for kind, has_products in (("muon", True), ("adamw", False), ("stable_adamw", False)):
        settings = Optimizer(kind, ns_steps=steps)
        chain = optimizers.make_optimizer(settings, model)
        program = jax.make_jaxpr(chain.update)(params, chain.init(params), params)
        assert optimizers.optimizer_flops(settings, model) == count_flops(program.jaxpr)
        assert (count_flops(program.jaxpr) > 0) == has_products
