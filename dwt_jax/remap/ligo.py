"""LiGO (Wang et al. 2023, arXiv 2303.00980): the maps themselves are learned.

    W'_l = Σ_k w_lk · B · W_k · Aᵀ

for every layered leaf, B and A matrices that widen its sides and w one that mixes layers; the
learned numbers are `Maps`, a tree that an optimiser can hold. As in the paper, the residual
stream has one pair of matrices for the whole model and every module its own for heads and
MLP, and its own w. Unlike there, B and A of the stream are two matrices, so that the
beginning can be a function preserving one, and matrices are shared by the layers.
Vocabulary, positions, types and annealed leaves are not learned.
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
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.plan import Plan, axis_sizes, plan_growth, splits_share
from dwt_jax.remap.width_maps import NEW

Maps = dict[str, dict[str, Any]]
"""{module: {'layer' [new, old], 'head' [old, new], 'mlp' [old, new]}}, and the residual stream's
under STREAM: {'in', 'out'} [old, new]. Heads and their channels are one axis."""

RESIDUAL = ""


def init_maps(
    params: Any,
    source: ModelConfig,
    target: ModelConfig,
    key: jax.Array,
    noise: float = 0.01,
    options: GrowthOptions = GrowthOptions(),
) -> tuple[Maps, Plan]:
    """The maps to begin with, fp32: those of method `ligo` plus noise·N(0, 1) on the matrices' scale
    (without it copies would stay equal), and the plan for what is not learned.

    Raises UserError for models that the method cannot do.
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
    """The target's parameters from the source's `params`: differentiable by `maps`, to be jitted.

    todo: from `init_maps`.
    """
    fixed_maps = {name: m for name, m in growth_plan.maps.items() if name not in _LEARNED_AXES}
    default = apply.grow_params(growth_plan, params)
    sources = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def leaf(path: tuple[Any, ...], x: Any, default: Any) -> Any:
        name = path_name(path)
        if not _is_learned(growth_plan, name, sources):
            return default
        return _contract(maps, name, jnp.asarray(x), default.shape, growth_plan)

    return jax.tree_util.tree_map_with_path(
        leaf, apply.grow_params(growth_plan._replace(maps=fixed_maps), params), default
    )


_LEARNED_AXES = ("layer", "embed", "head", "head_dim", "mlp")


def _is_learned(growth_plan: Plan, name: str, sources: set[str]) -> bool:
    """Whether a leaf is made by the maps, where the source has the leaves `sources`."""
    return not is_gate(name) and (name in sources or name in growth_plan.tied_to)


def _map_key(growth_plan: Plan, name: str, axis: Axis) -> tuple[str, str] | None:
    """Where the matrix for this axis of a leaf is found in Maps. None: not learned, or, as head_dim,
    part of another."""
    if axis.name == "embed":
        return RESIDUAL, "in" if splits_share(growth_plan, axis) else "out"
    return (name.rpartition("/")[0], axis.name) if axis.name in ("layer", "head", "mlp") else None


def _initial_matrices(growth_plan: Plan, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """(module, axis, matrix) for the axes of a leaf."""
    axes = growth_plan.param_axes[name]
    for dim, axis in enumerate(axes):
        map_key = _map_key(growth_plan, name, axis)
        if map_key:
            matrix = _to_matrix(growth_plan, axis)
            if axis.name == "head":
                matrix = np.kron(matrix, _to_matrix(growth_plan, axes[dim + 1]))
            yield *map_key, matrix.T if axis.name == "layer" else matrix


def _to_matrix(growth_plan: Plan, axis: Axis) -> np.ndarray:
    """An index map as a matrix [old, new]."""
    m = growth_plan.maps.get(axis.name)
    if m is None:
        return np.eye(axis_sizes(growth_plan.target)[axis.name])
    scale = apply.axis_scale(growth_plan, axis, m, 0, False)
    matrix = np.zeros((m.old, len(m.kind)))
    matrix[m.index, np.arange(len(m.kind))] = (m.kind != NEW) * (1.0 if scale is None else scale)
    return matrix


def _contract(maps: Maps, name: str, x: jax.Array, shape: tuple[int, ...], growth_plan: Plan) -> jax.Array:
    """x contracted with a matrix along every learned axis, to `shape`."""
    for dim, axis in enumerate(growth_plan.param_axes[name]):
        map_key = _map_key(growth_plan, name, axis)
        if map_key is None:
            continue
        matrix = maps[map_key[0]][map_key[1]].astype(x.dtype)
        matrix = matrix.T if axis.name == "layer" else matrix
        if axis.name == "head":  # [..., H, K, ...] → [..., H·K, ...] and back
            x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
        x = jnp.moveaxis(jnp.tensordot(x, matrix, axes=(dim, 0)), -1, dim)
        if axis.name == "head":
            x = x.reshape(*x.shape[:dim], *shape[dim : dim + 2], *x.shape[dim + 1 :])
    return x


def apply_maps_flops(params: Any, growth_plan: Plan) -> float:
    """Of `apply_maps` once: 2·m·k·n for each product, in the order in which it takes them."""
    old, new = axis_sizes(growth_plan.source), axis_sizes(growth_plan.target)
    sources = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(apply.target_structure(params, growth_plan.target)):
        name = path_name(path)
        if not _is_learned(growth_plan, name, sources):
            continue
        axes = growth_plan.param_axes[name]
        shape = [
            (old if axis.name in _LEARNED_AXES else new).get(axis.name, size)
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        for dim, axis in enumerate(axes):
            if _map_key(growth_plan, name, axis):
                input_size, end = math.prod(shape), dim + (2 if axis.name == "head" else 1)
                shape[dim:end] = [new[part.name] for part in axes[dim:end]]
                total += 2.0 * input_size * math.prod(shape[dim:end])
    return total
