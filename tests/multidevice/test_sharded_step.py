"""The training step on meshes of eight devices against one device."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config import Mesh
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models import bert
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.remap.optimizer_state import moment_states
from helpers.train_step import OPTIMIZER, B, one_device, place, run, spec


def step_losses(tiny, mesh):
    """float [5, 4]: loss, hard loss, soft loss and gradient norm of five steps."""
    student = dataclasses.replace(tiny, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    small = dataclasses.replace(student, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    params = bert.init_params(student, jax.random.key(0))
    teacher = place(bert.init_params(small, jax.random.key(1)), mesh)
    _, metrics = run(spec(student, small), params, teacher, 5, mesh=mesh)
    names = ("loss", "hard_loss", "soft_loss", "grad_norm")
    return np.array([[step_metrics[name] for name in names] for step_metrics in metrics])


@pytest.fixture(scope="module")
def expected(tiny):
    return step_losses(tiny, one_device())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_train_step_on_eight_devices_equals_one_device(tiny, expected, sizes):
    """With dropout: a run that resumes on another mesh must continue with the same losses."""
    losses = step_losses(tiny, make_mesh(Mesh(*sizes), B))
    assert len(set(losses[:, 0])) == 5
    np.testing.assert_allclose(losses[:, :2], expected[:, :2], rtol=1e-6)
    np.testing.assert_allclose(losses[:, 2], expected[:, 2], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(losses[:, 3], expected[:, 3], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
def test_optimizer_on_eight_devices_equals_one_device(tiny, kind):
    """Parameters after three steps; the momentum lies where the parameters do."""
    optimizer, mesh = dataclasses.replace(OPTIMIZER, kind=kind), make_mesh(Mesh(2, 2, 2), B)
    params = bert.init_params(tiny, jax.random.key(0))
    single, _ = run(spec(tiny, optimizer=optimizer), params, None, 3)
    state, _ = run(spec(tiny, optimizer=optimizer), params, None, 3, mesh=mesh)
    for (path, x), y, start in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(single.params),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6, err_msg=path_name(path))
        assert np.abs(x - start).max() > 1e-4 or path[-1].key != "kernel"
    expected = {path_name(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    momentum = moment_states(state.opt_state)[-1].mu
    found = {path_name(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(momentum)}
    assert found == {name: expected[name] for name in found}
    assert len(found) == (7 if kind == "muon" else len(expected))
    if kind == "muon":
        assert not any(sharding.is_fully_replicated for sharding in found.values())
        kernel = momentum["layers"]["attention"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size / 4  # over fsdp and tensor
