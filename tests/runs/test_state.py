"""The training state as a tree: its paths, and that a checkpoint gives back the same tree, bit by bit."""

import jax
import numpy as np

from dwt_jax.config import Optimizer
from dwt_jax.models import bert
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.state import TrainState, abstract_state, init_train_state


def test_abstract_state_has_the_tree_of_the_state(tiny):
    state = init_train_state(bert.init_params(tiny, jax.random.key(0)), tiny, Optimizer())
    abstract = abstract_state(tiny, Optimizer())
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, abstract)


def test_paths_are_slash_separated_names(tiny):
    paths = {
        path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state(tiny, Optimizer()))
    }
    assert {"step", "skipped/longest", "teacher_gap/matched_step", "params/mlm/bias"} <= paths
    assert any(path.startswith("opt_state/") and path.endswith("/nu/mlm/bias") for path in paths)


def test_checkpoint_restores_the_state(tiny, randomised, tmp_path):
    state = jax.tree.map(jax.numpy.asarray, init_train_state(randomised(tiny), tiny, Optimizer()))
    for read_only in (False, True):
        checkpoints = Checkpoints(tmp_path / "checkpoints", 3, read_only=read_only)
        if not read_only:
            checkpoints.save(7, state)
        else:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            restored, step = checkpoints.restore(target)
        checkpoints.wait()
        checkpoints.close()
    assert step == 7
    assert isinstance(restored, TrainState)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
