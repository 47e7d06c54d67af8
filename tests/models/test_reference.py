"""Every custom backward pass against its plain form, which JAX differentiates itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.models.common.attention import (
    dot_product_attention,
    dot_product_attention_reference,
    segment_mask,
)
from dwt_jax.models.common.matmul import Policy, matmul, matmul_reference

POLICIES = {
    "float32": (Policy(), 1e-5),
    "float32 on one CPU": (Policy(single_cpu_layout=True), 1e-5),
    "bfloat16": (Policy(compute_dtype=jnp.dtype("bfloat16")), 3e-2),
    "bfloat16 on one CPU": (Policy(compute_dtype=jnp.dtype("bfloat16"), single_cpu_layout=True), 3e-2),
}


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(function, weights, *arguments):
    """Σ weights · function(arguments) and its gradients by all arguments."""
    return jax.jit(
        jax.value_and_grad(lambda *x: (function(*x) * weights).sum(), argnums=range(len(arguments)))
    )(*arguments)


def assert_close(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def test_matmul(policy):
    policy, tolerance = policy
    x, kernel, weights = random(6, 5), random(5, 7, seed=1), random(6, 7, seed=2)
    found = value_and_gradients(lambda *args: matmul(*args, policy), weights, x, kernel)
    expected = value_and_gradients(lambda *args: matmul_reference(*args, policy), weights, x, kernel)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_attention(policy, num_queries, with_dropout):
    policy, tolerance = policy
    batch, length, heads, head_size = 2, 5, 3, 4
    segment_ids = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    if num_queries is None:
        projections = (random(batch, length, 3, heads, head_size),)
        ids = segment_ids, segment_ids
    else:
        projections = (
            random(batch, num_queries, 1, heads, head_size),
            random(batch, length, 2, heads, head_size, seed=1),
        )
        ids = segment_ids[:, :num_queries], segment_ids
    queries = ids[0].shape[1]
    keep, scale = None, 1.0
    if with_dropout:
        keep = jnp.asarray(np.random.default_rng(3).random((batch, heads, queries, length)) < 0.7)
        scale = 1 / 0.7
    weights = random(batch, queries, heads, head_size, seed=2)

    def apply(function):
        return value_and_gradients(
            lambda *parts: function(parts, segment_mask(*ids), policy, keep, scale), weights, *projections
        )

    assert_close(apply(dot_product_attention), apply(dot_product_attention_reference), tolerance)
