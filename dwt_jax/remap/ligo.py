"""LiGO: learned linear maps from the parameters of one model to those of a larger one.

    W'_l = Σ_k w_lk · B · W_k · Aᵀ

for every leaf with a layer axis. B and A are matrices that widen its output and input, w is a matrix that
mixes layers. The learned values are `Maps`, a pytree for an optimizer. As in the paper, the residual
stream has one pair of matrices for the entire model, and every module has its own matrices for heads and
MLP and its own w. Unlike the paper, B and A of the residual stream are two matrices, so that the initial
maps can preserve the function, and the layers share their matrices.
Vocabulary, positions, token types and gates are not learned.

Source: Wang et al. 2023, arXiv 2303.00980.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.models.common.logical_axes import Axis, is_gate, path_name
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap import apply
from dwt_jax.remap.axis_scale import axis_scale, splits_share
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.plan import Plan, axis_sizes, plan_growth
from dwt_jax.remap.width_maps import NEW

Maps = dict[str, dict[str, Any]]
"""{module: {'layer' [new, old], 'head' or 'kv_head' [old, new], 'mlp' [old, new]}}, and for the residual
stream {RESIDUAL: {'in' [old, new], 'out' [old, new]}}. Heads and their channels are one axis."""

RESIDUAL = ""
"""Key of the residual stream in `Maps`."""

_HEAD_AXES = ("head", "kv_head")
_LEARNED_AXES = ("layer", "embed", *_HEAD_AXES, "head_dim", "mlp")


def init_maps(
    params: Any,
    source: ModelConfig,
    target: ModelConfig,
    key: jax.Array,
    noise: float = 0.01,
    options: GrowthOptions = GrowthOptions(),
) -> tuple[Maps, Plan]:
    """Return the initial maps, and the plan for the leaves that are not learned.

    The maps are those of method `ligo` plus noise, without which copies would stay equal.

    Args:
        params: parameters of the source.
        source: config of the model of `params`.
        target: config of the larger model.
        key: random key.
        noise: standard deviation of the noise, relative to the largest entry of each matrix.
        options: options of the method.

    Returns:
        The maps (fp32) and the plan.

    Raises:
        UserError: the method does not support the pair of models.
    """
    growth_plan = plan_growth("ligo", source, target, key, options)
    maps: Maps = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(apply.target_structure(params, target)):
        name = path_name(path)
        if not is_gate(name):
            for module, axis_name, matrix in _initial_matrices(growth_plan, name):
                maps.setdefault(module, {})[axis_name] = matrix
    leaves, treedef = jax.tree.flatten(maps)
    keys = jax.random.split(jax.random.fold_in(key, 2), len(leaves))
    initial_leaves = [
        jnp.asarray(leaf, jnp.float32) + noise * jax.random.normal(k, leaf.shape) * np.abs(leaf).max()
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, initial_leaves), growth_plan


def apply_maps(maps: Maps, params: Any, growth_plan: Plan) -> Any:
    """Return the target's parameters made from the source's. Differentiable in `maps`; to be jitted.

    Args:
        maps: from `init_maps`.
        params: parameters of the source.
        growth_plan: from `init_maps`.
    """
    fixed_maps = {name: m for name, m in growth_plan.maps.items() if name not in _LEARNED_AXES}
    default = apply.grow_params(growth_plan, params)
    source_paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def leaf(path: tuple[Any, ...], x: Any, default: Any) -> Any:
        name = path_name(path)
        if not _is_learned(growth_plan, name, source_paths):
            return default
        return _contract(maps, name, jnp.asarray(x), default.shape, growth_plan)

    return jax.tree_util.tree_map_with_path(
        leaf, apply.grow_params(growth_plan._replace(maps=fixed_maps), params), default
    )


def _is_learned(growth_plan: Plan, name: str, source_paths: set[str]) -> bool:
    """Whether the maps make a leaf of the target."""
    return not is_gate(name) and (name in source_paths or name in growth_plan.tied_to)


def _map_key(growth_plan: Plan, name: str, axis: Axis) -> tuple[str, str] | None:
    """The keys in Maps of the matrix for an axis of a leaf. None: not learned, or part of another axis
    (head_dim)."""
    if axis.name == "embed":
        return RESIDUAL, "in" if splits_share(growth_plan, axis) else "out"
    return (name.rpartition("/")[0], axis.name) if axis.name in ("layer", *_HEAD_AXES, "mlp") else None


def _initial_matrices(growth_plan: Plan, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (module, axis, matrix) for the axes of a leaf."""
    axes = growth_plan.param_axes[name]
    for dim, axis in enumerate(axes):
        map_key = _map_key(growth_plan, name, axis)
        if map_key:
            matrix = _to_matrix(growth_plan, axis)
            if axis.name in _HEAD_AXES:
                matrix = np.kron(matrix, _to_matrix(growth_plan, axes[dim + 1]))
            yield *map_key, matrix.T if axis.name == "layer" else matrix


def _to_matrix(growth_plan: Plan, axis: Axis) -> np.ndarray:
    """An index map as a matrix [old, new]."""
    m = growth_plan.maps.get(axis.name)
    if m is None:
        return np.eye(axis_sizes(growth_plan.target)[axis.name])
    scale = axis_scale(growth_plan, axis, m, 0, False)
    matrix = np.zeros((m.old, len(m.kind)))
    matrix[m.index, np.arange(len(m.kind))] = (m.kind != NEW) * (1.0 if scale is None else scale)
    return matrix


def _contract(maps: Maps, name: str, x: jax.Array, shape: tuple[int, ...], growth_plan: Plan) -> jax.Array:
    """Contract x with a matrix along every learned axis, to `shape`."""
    for dim, axis in enumerate(growth_plan.param_axes[name]):
        map_key = _map_key(growth_plan, name, axis)
        if map_key is None:
            continue
        matrix = maps[map_key[0]][map_key[1]].astype(x.dtype)
        matrix = matrix.T if axis.name == "layer" else matrix
        if axis.name in _HEAD_AXES:  # [..., H, K, ...] → [..., H·K, ...] and back
            x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
        x = jnp.moveaxis(jnp.tensordot(x, matrix, axes=(dim, 0)), -1, dim)
        if axis.name in _HEAD_AXES:
            x = x.reshape(*x.shape[:dim], *shape[dim : dim + 2], *x.shape[dim + 1 :])
    return x


def apply_maps_flops(params: Any, growth_plan: Plan) -> float:
    """Return the FLOPs of one `apply_maps`: 2·m·k·n for each product, in its order of products."""
    old, new = axis_sizes(growth_plan.source), axis_sizes(growth_plan.target)
    source_paths = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(apply.target_structure(params, growth_plan.target)):
        name = path_name(path)
        if not _is_learned(growth_plan, name, source_paths):
            continue
        axes = growth_plan.param_axes[name]
        shape = [
            (old if axis.name in _LEARNED_AXES else new).get(axis.name, size)
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        for dim, axis in enumerate(axes):
            if _map_key(growth_plan, name, axis):
                end = dim + (2 if axis.name in _HEAD_AXES else 1)
                input_size = math.prod(shape)
                shape[dim:end] = [new[part.name] for part in axes[dim:end]]
                total += 2.0 * input_size * math.prod(shape[dim:end])
    return total
