"""Remapping on eight simulated devices, in a process of its own."""

import subprocess
import sys

import pytest

from helpers.paths import PYTHONPATH
from helpers.runs import environment

PROGRAM = """
import dataclasses, jax, numpy as np
from helpers.reference import parameters
from dwt_jax.config import Mesh, Optimizer
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.remap.apply import grow_params, remap_params
from dwt_jax.remap.optimizer_state import grow_opt_state
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs import optimizer as optimizers

assert jax.device_count() == 8
small = BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=12, max_position_embeddings=12)
large = dataclasses.replace(small, hidden_size=16, num_attention_heads=4, num_hidden_layers=3,
                            vocab_size=300, intermediate_size=20, weighted_norm=True, gated_layers=True)
mesh, key = make_mesh(Mesh(data=2, fsdp=2, tensor=2), 8), jax.random.key(3)
host = parameters(small, dtype=np.float32)
placed = jax.device_put(host, infer_shardings(host, small, mesh))
state = optimizers.make_optimizer(Optimizer(), small).init(placed)
for method in ("net2net", "masked", "aki", "random"):
    grown, report = remap_params(placed, small, large, method, key)
    expected, _ = remap_params(host, small, large, method, key)
    shardings = jax.tree.leaves(infer_shardings(grown, large, mesh))
    for leaf, where in zip(jax.tree.leaves(grown), shardings, strict=True):
        assert leaf.sharding == where, (leaf.sharding, where)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grown, expected)
split = [leaf for leaf in jax.tree.leaves(grown) if not leaf.sharding.is_fully_replicated]
assert len(split) > 20
moments = grow_opt_state(plan_growth("net2net", small, large, key), state)
shardings = jax.tree.leaves(infer_shardings(grown, large, mesh))
for leaf, where in zip(jax.tree.leaves(moments[1].mu), shardings, strict=True):
    assert leaf.sharding == where
"""


@pytest.mark.slow
def test_the_result_lies_where_the_target_does():
    flags = environment(XLA_FLAGS="--xla_force_host_platform_device_count=8", PYTHONPATH=PYTHONPATH)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=flags, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
