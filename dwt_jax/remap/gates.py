"""Gates: weights of norms and gates of layers. These leaves follow a schedule and are not trained.

Remapping sets them so that the grown model computes the same function as the source. They end at 1, which
gives an ordinary model. No gradient reaches them and the optimizer does not change them: the leaf holds its
initial value m₀, and a training step uses `open_gates(params, progress)`, where progress depends on the step.

Source: MSG, Yao et al. 2024, arXiv 2305.02869 (masks that grow from 0 to 1).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.models.common.logical_axes import is_gate, path_name
from dwt_jax.models.protocol import ModelConfig


def has_gates(model: ModelConfig) -> bool:
    """Return whether a model has weighted norms or gated layers."""
    return model.weighted_norm or model.gated_layers


def open_gates(params: Any, progress: Any) -> Any:
    """Return `params` with every gate at m₀ + (1 − m₀)·progress.

    Args:
        params: parameters with the gates as remapping set them.
        progress: scalar from 0 (as remapped) to 1 (an ordinary model: the gates are exactly 1).
    """

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        return progress + (1 - progress) * x if is_gate(path_name(path)) else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def gate_schedule(step: Any, steps: int, warmup: float, start: int = 0) -> Any:
    """Return the progress of `open_gates` after `step` steps: 0 at `start`, then linear up to 1.

    Args:
        step: int or int array.
        steps: training steps of the run.
        warmup: share of the steps after `start` over which the gates open.
        start: step at which the model was grown.

    Returns:
        float32 like `step`.
    """
    length = warmup * (steps - start)
    if length <= 0:
        return np.ones_like(step, np.float32)
    return np.clip((np.asarray(step) - start) / length, 0, 1).astype(np.float32)


def fold_gates(params: Any, model: ModelConfig) -> tuple[Any, ModelConfig]:
    """Return the same model without gates, which can be exported.

    Raises:
        UserError: a gate is not 1 yet; the message names the first such leaf.
    """
    if not has_gates(model):
        return params, model
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_gate(path_name(path)) and (np.asarray(leaf) != 1).any():
            low, high = np.min(leaf), np.max(leaf)
            raise UserError(
                f"model: {path_name(path)} is from {low:.3g} to {high:.3g}, expected 1 throughout: weighted "
                "norms and gated layers are not part of an exported model and must be open (1) before an "
                "export"
            )
    return drop_gates(params), dataclasses.replace(model, weighted_norm=False, gated_layers=False)


def drop_gates(tree: Any, path: str = "") -> Any:
    """Return a tree like the parameters without its gates."""
    if not isinstance(tree, dict):
        return tree
    return {
        key: drop_gates(item, f"{path}/{key}") for key, item in tree.items() if not is_gate(f"{path}/{key}")
    }
