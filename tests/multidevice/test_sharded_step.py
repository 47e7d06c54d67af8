"""The training step on meshes of eight devices against one device."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config import Mesh
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models import bert
from helpers.train_step import B, one_device, place, run, spec


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
