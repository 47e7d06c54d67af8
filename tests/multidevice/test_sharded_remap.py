"""Growing sharded parameters and moments on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config import Mesh, Optimizer
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models import bert
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.optimizer_state import grow_opt_state
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs.optimizer import make_optimizer
from helpers.reference import parameters

SMALL = bert.Config(
    vocab_size=60,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=12,
)
LARGE = dataclasses.replace(
    SMALL,
    hidden_size=16,
    num_attention_heads=4,
    num_hidden_layers=3,
    vocab_size=300,
    intermediate_size=20,
    weighted_norm=True,
    gated_layers=True,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh(data=2, fsdp=2, tensor=2), 8)


def assert_sharded_as_inferred(leaves, shardings):
    for leaf, sharding in zip(jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding


@pytest.mark.slow
@pytest.mark.parametrize("method", ["net2net", "masked", "aki", "random"])
def test_remap_params_of_sharded_source_is_sharded_and_equal_to_that_of_host_arrays(mesh, method):
    host, key = parameters(SMALL, dtype=np.float32), jax.random.key(3)
    sharded = jax.device_put(host, infer_shardings(host, SMALL, mesh))
    grown, _ = remap_params(sharded, SMALL, LARGE, method, key)
    expected, _ = remap_params(host, SMALL, LARGE, method, key)
    assert_sharded_as_inferred(grown, infer_shardings(grown, LARGE, mesh))
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(grown)) > 20
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grown, expected)


@pytest.mark.slow
def test_grown_moments_are_sharded_as_the_parameters(mesh):
    host, key = parameters(SMALL, dtype=np.float32), jax.random.key(3)
    sharded = jax.device_put(host, infer_shardings(host, SMALL, mesh))
    opt_state = make_optimizer(Optimizer(), SMALL).init(sharded)
    grown = grow_opt_state(plan_growth("net2net", SMALL, LARGE, key), opt_state)
    moments = grown[1].mu
    assert_sharded_as_inferred(moments, infer_shardings(moments, LARGE, mesh))
