"""Remap the parameters of one encoder to another size, by the logical axes of the leaves alone.

Every leaf is gathered along each of its axes and scaled:

    W'[j, k] = in(j) · W[g_in(j), g_out(k)] · out(k)

An axis that a kernel contracts over (`in`) is scaled by the share that each copy has in the sum, and an
`out` axis is copied unscaled. If the other operand of a product is also copied unscaled (the output
embedding, the attention keys), the output side is scaled by the share instead. In a model with RMSNorm,
copies of channels of the residual stream have an additional scale (axis_scale.py).

Gradients scale inversely. A parameter that enters the model as f·p has the gradient of p divided by the
shares of the other copies, so `out` is scaled by the share and `in` is not. With even shares that is
1/C, where C is the number of copies of the output channel: first moments are scaled by it, second moments
by its square.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.models import family
from dwt_jax.models.common.layers import normal_init
from dwt_jax.models.common.logical_axes import Axes, init_value, is_matrix, path_name
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.axis_scale import axis_scale, splits_share
from dwt_jax.remap.methods import GrowthOptions, Method
from dwt_jax.remap.plan import Plan, axis_sizes, plan_growth
from dwt_jax.remap.report import RemapReport, logit_drift, remap_report
from dwt_jax.remap.width_maps import COPIED, DUPLICATE, NEW, AxisMap, to_numpy_if_concrete


def remap_params(
    params: Params,
    source: ModelConfig,
    target: ModelConfig,
    method: str | Method,
    key: jax.Array,
    *,
    options: GrowthOptions = GrowthOptions(),
    probe: dict[str, Any] | None = None,
) -> tuple[Params, RemapReport]:
    """Return parameters of `target` made from those of `source`, and a report.

    Args:
        params: host arrays (the result is on the host), arrays inside jit, or arrays on a mesh (the result
            is sharded there by its logical axes). The target has the heads that `params` have.
        source: config of the model of `params`.
        target: config of the model to return, smaller or larger.
        method: a name in METHODS, 'depth+method', or a Method.
        key: random key.
        options: options of the method.
        probe: {tokens, segments} int [B, L] on which the logits of both models are compared. Not
            supported inside jit.

    Returns:
        The parameters, and a report of where each entry comes from.

    Raises:
        UserError: the method does not support the pair of models; the message names the size.
    """
    _check_heads(params, source, target)
    growth_plan = plan_growth(method, source, target, key, options)
    if not set(family(source).LM_HEADS) <= set(params):  # nothing reads the word table a second time
        growth_plan = growth_plan._replace(tied=False)
    target_params = grow_params(growth_plan, params)
    report = remap_report(growth_plan, params, target_params)
    if probe is not None:
        report = report.with_logit_drift(logit_drift(params, source, target_params, target, probe))
    return target_params, report


def _check_heads(params: Params, source: ModelConfig, target: ModelConfig) -> None:
    """Reject a wider model whose LM head and classifier share a part: each needs a different scale of it."""
    module = family(source)
    read_by_classifier = {*module.ENCODER_PARTS, *module.CLASSIFIER_HEADS}
    shared = {
        path.split("/")[0]
        for path, axes in module.param_axes(source).items()
        if any(axis.contracted_with.endswith("output_embedding") for axis in axes)
    } & read_by_classifier
    has_both = {*module.LM_HEADS, *module.CLASSIFIER_HEADS} <= set(params)
    if shared and has_both and source.hidden_size != target.hidden_size:
        raise UserError(
            f"an LM head and a classifier that share {', '.join(sorted(shared))}, expected one of them "
            f"to grow hidden_size from {source.hidden_size} to {target.hidden_size}"
        )


def grow_params(growth_plan: Plan, tree: Params, order: int = 0, zero_duplicates: bool = False) -> Params:
    """Return the target's tree, grown from the source's.

    Args:
        growth_plan: from `plan_growth`.
        tree: parameters of the source, or a tree of moments like them.
        order: 0 for parameters, 1 for gradients and first moments, 2 for second moments.
        zero_duplicates: in moments, set duplicated entries to 0, like new ones.
    """

    def build(tree: Params) -> Params:
        source_leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        reference = next(iter(source_leaves.values()))

        def leaf(path: tuple[Any, ...], _: Any) -> Any:
            name = path_name(path)
            x = source_leaves.get(name, source_leaves.get(growth_plan.tied_to.get(name, "")))
            if x is None:
                x = _absent_leaf(growth_plan, name, reference, order)
            return _grow_leaf(growth_plan, name, x, order, zero_duplicates)

        return jax.tree_util.tree_map_with_path(leaf, target_structure(tree, growth_plan.target))

    mesh = _mesh_of(tree)
    if mesh is None:
        return build(tree)
    layout = infer_shardings(jax.eval_shape(build, tree), growth_plan.target, mesh)
    return jax.jit(build, out_shardings=layout)(tree)


def target_structure(tree: Params, target: ModelConfig) -> Params:
    """Return a tree with the target's leaves, for the parts that `tree` has. The values do not matter."""
    target_params = family(target).abstract_params(target)
    return {part: target_params.get(part, tree[part]) for part in tree}


def _mesh_of(tree: Params) -> jax.sharding.Mesh | None:
    """The mesh that the arrays are on. None on the host, on one device and in a trace."""
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return None
    assert isinstance(sharding.mesh, jax.sharding.Mesh)  # concrete arrays are on a concrete mesh
    return sharding.mesh


def _absent_leaf(growth_plan: Plan, name: str, reference: Any, order: int) -> Any:
    """A leaf that the source lacks, filled with the value that is equivalent to its absence."""
    shape = tuple(axis_sizes(growth_plan.source)[axis.name] for axis in growth_plan.param_axes[name])
    xp = np if isinstance(reference, np.ndarray) else jnp
    return xp.full(shape, 0.0 if order else init_value(name), reference.dtype)


def _grow_leaf(growth_plan: Plan, name: str, x: Any, order: int, zero_duplicates: bool) -> Any:
    axes = growth_plan.param_axes[name]
    maps = [growth_plan.maps.get(axis.name) for axis in axes]
    values = [part for m in maps if m for part in (m.index, m.split)]
    xp = np if all(isinstance(part, np.ndarray) for part in (x, *values)) else jnp
    if growth_plan.method.random_init:
        return _init_leaf(growth_plan, name, _target_shape(growth_plan, axes, x), x.dtype, order, xp)
    if 0 in x.shape:  # a table without rows
        return _init_leaf(growth_plan, name, _target_shape(growth_plan, axes, x), x.dtype, 1, xp)
    y = _gather_entries(x, maps, xp)
    if growth_plan.method.from_next_layer and axes[0].name == "layer":
        next_layer = np.minimum(np.arange(len(x)) + 1, len(x) - 1)
        from_next = _gather_entries(x[next_layer], maps, xp)
        y = xp.where(_duplicate_mask(axes, maps), from_next, y)
    for dim, (axis, m) in enumerate(zip(axes, maps, strict=True)):
        if m is not None:
            scale = axis_scale(growth_plan, axis, m, order, zero_duplicates)
            if scale is not None:
                y = y * _broadcast_along(scale, dim, y.ndim).astype(y.dtype)
    if y is x:  # copy: the result may be donated, and the source's buffer must survive
        return xp.array(x)
    if order:
        return y
    y = _fill_new(growth_plan, name, y, axes, maps, xp)
    return _zero_new_layers(growth_plan, _add_noise(growth_plan, name, y, axes, maps, xp), axes)


def _target_shape(growth_plan: Plan, axes: Axes, x: Any) -> tuple[int, ...]:
    target_sizes = axis_sizes(growth_plan.target)
    return tuple(target_sizes.get(axis.name, size) for axis, size in zip(axes, x.shape, strict=True))


def _broadcast_along(values: Any, dim: int, ndim: int) -> Any:
    """Reshape [D] (or [N, D], one row per layer) to broadcast along axis `dim` of a leaf."""
    shape = [1] * ndim
    shape[dim] = values.shape[-1]
    if values.ndim == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def _gather_entries(x: Any, maps: list[AxisMap | None], xp: Any) -> Any:
    """x[g₀, g₁, …]. The layer axis comes first, so that a map per layer indexes the target's layers."""
    for dim, m in enumerate(maps):
        if m is None:
            continue
        if m.index.ndim == 1:
            x = xp.take(x, m.index, axis=dim, mode="clip")
        else:
            x = xp.take_along_axis(x, _broadcast_along(m.index, dim, x.ndim), axis=dim)
    return x


def _duplicate_mask(axes: Axes, maps: list[AxisMap | None]) -> Any:
    """Where an output is a duplicate: bool, broadcastable to the leaf."""
    masks = [
        _broadcast_along(m.kind == DUPLICATE, dim, len(axes))
        for dim, (axis, m) in enumerate(zip(axes, maps, strict=True))
        if m is not None and axis.fan == "out"
    ]
    return np.any(np.broadcast_arrays(*masks), axis=0) if masks else np.zeros((1,) * len(axes), bool)


def _fill_new(growth_plan: Plan, name: str, y: Any, axes: Axes, maps: list[AxisMap | None], xp: Any) -> Any:
    """Fill new entries, width axes first so that new layers, tokens and positions overwrite them.

    Axes that split a share already hold 0 in new entries.
    """
    for dim in reversed(range(len(axes))):
        m, axis = maps[dim], axes[dim]
        if m is None or splits_share(growth_plan, axis) or (m.kind != NEW).all():
            continue
        if m.fill == "mean":
            new = y.take(np.flatnonzero(m.kind == COPIED), axis=dim).mean(axis=dim, keepdims=True)
        elif m.fill == "zero" and is_matrix(axes):
            new = xp.zeros((), y.dtype)
        else:
            new = _init_leaf(growth_plan, f"{name} {dim}", y.shape, y.dtype, 0, xp)
        if m.valid_size >= 0:
            new = xp.where(_broadcast_along(np.arange(len(m.kind)) < m.valid_size, dim, y.ndim), new, 0)
        y = xp.where(_broadcast_along(m.kind == NEW, dim, y.ndim), new, y).astype(y.dtype)
    return y


def _add_noise(growth_plan: Plan, name: str, y: Any, axes: Axes, maps: list[AxisMap | None], xp: Any) -> Any:
    """Multiply duplicated entries of a matrix with 1 + noise·N(0, 1)."""
    if not growth_plan.options.noise or not is_matrix(axes):
        return y
    noise = jax.random.normal(_leaf_key(growth_plan, f"{name} noise"), y.shape, jnp.float32)
    scale = 1 + growth_plan.options.noise * (to_numpy_if_concrete(noise) if xp is np else noise)
    return xp.where(_duplicate_mask(axes, maps), y * scale, y).astype(y.dtype)


def _zero_new_layers(growth_plan: Plan, y: Any, axes: Axes) -> Any:
    """Set the residual output of added layers to 0, if the plan requires it."""
    layers = growth_plan.maps.get("layer")
    writes_residual = any(axis.contracted_with == "residual" for axis in axes)
    is_layered = axes[0].name == "layer"
    if layers is None or not growth_plan.zero_new_layers or not (writes_residual and is_layered):
        return y
    return y * _broadcast_along(layers.kind == COPIED, 0, y.ndim).astype(y.dtype)


def _init_leaf(growth_plan: Plan, name: str, shape: tuple[int, ...], dtype: Any, order: int, xp: Any) -> Any:
    """As init_params of the family: matrices random, other leaves at their initial value."""
    path = name.partition(" ")[0]
    if order:
        return xp.zeros(shape, dtype)
    if not is_matrix(growth_plan.param_axes[path]):
        return xp.full(shape, init_value(path), dtype)
    values = normal_init(_leaf_key(growth_plan, name), shape, growth_plan.target)
    return (to_numpy_if_concrete(values) if xp is np else values).astype(dtype)


def _leaf_key(growth_plan: Plan, name: str) -> jax.Array:
    return jax.random.fold_in(growth_plan.key, zlib.crc32(name.encode()))
