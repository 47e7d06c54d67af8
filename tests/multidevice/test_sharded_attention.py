"""Back ends of attention on eight devices: each device computes its own rows and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dwt_jax.config import Mesh
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models.common import attention_backends
from dwt_jax.models.common.attention_backends import AttentionMask, attend
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import policy_for_mesh

B, L, H, K = 8, 64, 4, 8


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "heads"), [(2, "tensor"), (1, None)])
def test_splash_on_eight_devices_equals_the_reference_on_one(monkeypatch, kv_heads, heads):
    """A single head of keys, which the axis `tensor` does not divide, is computed by all of its devices."""
    make_kernel = functools.partial(attention_backends.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention_backends, "make_splash_mha", make_kernel)
    random = np.random.default_rng(0)
    projections = tuple(
        random.normal(size=shape).astype(np.float32) for shape in ((B, L, 1, H, K), (B, L, 2, kv_heads, K))
    )
    weights = random.normal(size=(B, L, H, K)).astype(np.float32)
    segment_ids = np.sort(random.integers(0, 4, (B, L)), axis=1).astype(np.int32)

    def gradients(policy):
        def loss(projections, segment_ids, has_window):
            mask = AttentionMask(segment_ids, window=9, has_window=has_window)
            context = attend(projections, mask, policy)
            return (context * weights).sum(), context

        return jax.jit(jax.grad(loss, has_aux=True))

    mesh = make_mesh(Mesh(2, 2, 2), B)
    rows = ("data", "fsdp")
    by_head, by_row, everywhere = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((rows, None, None, heads), (rows,), ())
    )
    arguments = projections, segment_ids, np.True_
    placed = jax.device_put(arguments, ((by_head, by_head), by_row, everywhere))
    found = gradients(policy_for_mesh(mesh, Policy(attention="splash")))
    if heads:
        assert "all-gather" not in found.lower(*placed).compile().as_text()
    expected = gradients(Policy())(*(jax.tree.map(jnp.asarray, arguments)))
    for a, b in zip(jax.tree.leaves(found(*placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
