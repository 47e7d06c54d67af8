"""Leaves that are no parameters: the weights of norms and the gates of layers that remapping sets.

They begin where the remapped model computes what the small one did, and end at 1, where the
model is an ordinary one. The model takes no gradient by them, so the optimiser leaves them
as they were set: the leaf holds the beginning m₀, and a training step computes with
`anneal(params, share)`, where share is a function of the step.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.models.common.logical_axes import is_gate, path_name
from dwt_jax.models.protocol import ModelConfig


def has_gates(model: ModelConfig) -> bool:
    return model.weighted_norm or model.gated_layers


def open_gates(params: Any, progress: Any) -> Any:
    """`params` with every annealed leaf at m₀ + (1 − m₀)·share; exactly 1 where share is 1.

    share: from 0 (as remapped) to 1 (an ordinary model), a scalar. (MSG, Yao et al. 2024,
    arXiv 2305.02869: masks that grow from 0 to 1.)
    """

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        return progress + (1 - progress) * x if is_gate(path_name(path)) else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def gate_schedule(step: Any, steps: int, warmup: float, start: int = 0) -> Any:
    """float32 like `step` (an int or an array): the share of `open_gates` after that many of a run's
    `steps`. 0 at the step `begin`, linear, 1 from where `open_gates` of the steps after `begin` are done."""
    length = warmup * (steps - start)
    if length <= 0:
        return np.ones_like(step, np.float32)
    return np.clip((np.asarray(step) - start) / length, 0, 1).astype(np.float32)


def fold_gates(params: Any, model: ModelConfig) -> tuple[Any, ModelConfig]:
    """The same model without annealed leaves, which must all be 1: what can be exported.

    Raises UserError naming the first leaf that is not there yet.
    """
    if not has_gates(model):
        return params, model
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_gate(path_name(path)) and (np.asarray(leaf) != 1).any():
            low, high = np.min(leaf), np.max(leaf)
            raise UserError(
                f"model: {path_name(path)} is from {low:.3g} to {high:.3g}, expected 1 throughout: weighted "
                "norms and gated layers are no part of the exported model and must be annealed away before an export"
            )
    return drop_gates(params), dataclasses.replace(model, weighted_norm=False, gated_layers=False)


def drop_gates(tree: Any, path: str = "") -> Any:
    """A tree like the parameters, its annealed leaves left out."""
    if not isinstance(tree, dict):
        return tree
    return {
        key: drop_gates(item, f"{path}/{key}") for key, item in tree.items() if not is_gate(f"{path}/{key}")
    }
