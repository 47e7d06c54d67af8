"""Training of LiGO's maps on eight devices against one device."""

import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.config_loader import load_config
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.train.loop import train
from helpers.ligo import SOURCE_SIZES, TARGET_SIZES, learn_maps, make_run, model_overrides
from helpers.runs import make_project
from helpers.train_step import one_device


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(folder with a trained source model, path of its config)"""
    folder = tmp_path_factory.mktemp("ligo")
    config = str(make_project(folder))
    short = {"train.steps": "60", "train.eval_every": "0", "train.save_every": "60"}
    train(load_config(config, model_overrides(SOURCE_SIZES, **short)), folder / "source")
    return folder, config


@pytest.mark.slow
def test_maps_trained_on_eight_devices_equal_those_of_one_device(project):
    folder, config = project
    mesh_sizes = {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2"}
    run = make_run(folder / "target", load_config(config, model_overrides(TARGET_SIZES, **mesh_sizes)))
    grown, record = learn_maps(project, run)
    shardings = infer_shardings(grown, run.step_config.model, run.mesh)
    for leaf, sharding in zip(jax.tree.leaves(grown), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(grown)) > 10

    expected, expected_record = learn_maps(project, dataclasses.replace(run, mesh=one_device()))
    losses = record.loss_before, record.loss_after
    np.testing.assert_allclose(losses, (expected_record.loss_before, expected_record.loss_after), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grown, expected)
