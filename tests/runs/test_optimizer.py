"""AdamW against torch.optim.AdamW on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.config import Optimizer
from dwt_jax.hf.checkpoint import to_hf_tensors
from dwt_jax.runs import optimizer as optimizers

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
