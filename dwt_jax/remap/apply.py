"""remap: the parameters of one encoder from those of another, by the role table alone.

Every leaf is gathered along each of its axes and scaled:

    W'[j, k] = in(j) · W[g_in(j), g_out(k)] · out(k)

where an axis that a kernel contracts over (`in`) takes the share that a copy has in the work
of its entry, and an `out` axis is copied as it is. Where the other party of a product is
only ever copied (the word table as decoder, the keys), the output side takes the share.

Gradients go the other way: a parameter that enters as f·p has the gradient of p divided by
the shares of the rest, so `out` takes the share and `in` nothing. With even splits that is
1/C, C the number of copies of the output channel: first moments are scaled by it, second
moments by its square.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Model
from dwt_jax.distributed.mesh import shardings
from dwt_jax.models import bert
from dwt_jax.models.common.layers import normal
from dwt_jax.models.common.logical_axes import ROLES, STANDS_IN, Axis, is_matrix, path_name, start
from dwt_jax.remap.methods import Method, Options
from dwt_jax.remap.plan import Plan, divides, plan, sizes
from dwt_jax.remap.report import Report, drift, report
from dwt_jax.remap.width_maps import COPIED, DERIVED, NEW, AxisMap, concrete

Params = bert.Params


def remap(
    params: Params,
    source: Model,
    target: Model,
    method: str | Method,
    key: jax.Array,
    *,
    options: Options = Options(),
    probe: dict[str, Any] | None = None,
) -> tuple[Params, Report]:
    """Parameters of `target` from `params` of `source`, and a report of what came from where.

    params: host arrays (the result is on the host), arrays inside jit, or arrays on a mesh (the
    result is laid out there as the role table says). Heads that they have, the target gets.
    method: a name of METHODS, 'depth+method', or a Method. key: of all that is drawn.
    probe: {tokens, segments} int [B, L], on which the logits of both are compared; not inside
    jit. Raises UserError for what the method cannot do, naming the size.
    """
    todo = plan(method, source, target, key, options)
    grown = apply(todo, params)
    told = report(todo, params, grown)
    if probe is not None:
        told = told.with_drift(drift(params, source, grown, target, probe))
    return grown, told


def apply(todo: Plan, tree: Params, order: int = 0, fresh_copies: bool = False) -> Params:
    """The target's tree from the source's.

    order: 0 for parameters, 1 for gradients and first moments, 2 for second moments.
    fresh_copies: in moments, further copies start at 0 like everything new.
    """

    def build(tree: Params) -> Params:
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        like = next(iter(found.values()))

        def leaf(path: tuple[Any, ...], _: Any) -> Any:
            name = path_name(path)
            x = found.get(name, found.get(STANDS_IN.get(name, "")))
            return _leaf(
                todo, name, _absent(todo, name, like, order) if x is None else x, order, fresh_copies
            )

        return jax.tree_util.tree_map_with_path(leaf, structure(tree, todo.target))

    mesh = _mesh(tree)
    if mesh is None:
        return build(tree)
    layout = shardings(jax.eval_shape(build, tree), mesh)
    return jax.jit(build, out_shardings=layout)(tree)


def structure(tree: Params, target: Model) -> Params:
    """A tree with the target's leaves (what they hold does not matter): the parts that `tree` has."""
    like = bert.abstract(target)
    return {part: like.get(part, tree[part]) for part in tree}


def _mesh(tree: Params) -> jax.sharding.Mesh | None:
    """The mesh that the arrays live on, None on the host, on one device and in a trace."""
    leaf = jax.tree.leaves(tree)[0]
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    found = leaf.sharding
    if not isinstance(found, jax.sharding.NamedSharding) or found.mesh.size == 1:
        return None
    assert isinstance(found.mesh, jax.sharding.Mesh)  # real arrays live on a real mesh
    return found.mesh


def _absent(todo: Plan, name: str, like: Any, order: int) -> Any:
    """A leaf that the source lacks, as what it counts as."""
    shape = tuple(sizes(todo.source)[axis.name] for axis in ROLES[name])
    library = np if isinstance(like, np.ndarray) else jnp
    return library.full(shape, 0.0 if order else start(name), like.dtype)


def _leaf(todo: Plan, name: str, x: Any, order: int, fresh_copies: bool) -> Any:
    axes = ROLES[name]
    maps = [todo.maps.get(axis.name) for axis in axes]
    values = [part for m in maps if m for part in (m.index, m.split)]
    library = np if all(isinstance(part, np.ndarray) for part in (x, *values)) else jnp
    if todo.method.fresh:
        return _fresh(todo, name, _target_shape(todo, axes, x), x.dtype, order, library)
    if 0 in x.shape:  # a table of no rows
        return _fresh(todo, name, _target_shape(todo, axes, x), x.dtype, 1, library)
    y = _gathered(x, maps, library)
    if todo.method.ahead and axes[0].name == "layer":
        ahead = np.minimum(np.arange(len(x)) + 1, len(x) - 1)
        above = _gathered(x[ahead], maps, library)
        y = library.where(_further(axes, maps), above, y)
    for dim, (axis, m) in enumerate(zip(axes, maps, strict=True)):
        if m is not None:
            by = factor(todo, axis, m, order, fresh_copies)
            if by is not None:
                y = y * _along(by, dim, y.ndim).astype(y.dtype)
    if y is x:  # never the source's own memory: what is made of it may be donated
        return library.array(x)
    if order:
        return y
    y = _filled(todo, name, y, axes, maps, library)
    return _noisy(todo, name, y, axes, maps, library)


def _target_shape(todo: Plan, axes: tuple[Axis, ...], x: Any) -> tuple[int, ...]:
    named = sizes(todo.target)
    return tuple(named.get(axis.name, size) for axis, size in zip(axes, x.shape, strict=True))


def _along(values: Any, dim: int, ndim: int) -> Any:
    """[D] or, where each layer has its own, [N, D], shaped to go with axis `dim` of a leaf."""
    shape = [1] * ndim
    shape[dim] = values.shape[-1]
    if values.ndim == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)


def _gathered(x: Any, maps: list[AxisMap | None], library: Any) -> Any:
    """x[g₀, g₁, …]. The layers come first, so that a map for every layer finds its layer."""
    for dim, m in enumerate(maps):
        if m is None:
            continue
        if m.index.ndim == 1:
            x = library.take(x, m.index, axis=dim, mode="clip")
        else:
            x = library.take_along_axis(x, _along(m.index, dim, x.ndim), axis=dim)
    return x


def factor(todo: Plan, axis: Axis, m: AxisMap, order: int, fresh_copies: bool) -> Any:
    """What entries along this axis are multiplied with: [D], [N, D] or None."""
    scale = todo.scores if axis.meets == "keys" else 1.0
    if order == 0:
        return m.split * scale if divides(todo, axis) else None
    share: Any = m.split  # among others, 0 for copies of positions: there they have seen nothing
    if divides(todo, axis):
        share = 1 / scale
    elif axis.name == "layer" and not todo.target.gated_layers:
        share = 1.0
    return (share * (m.kind == COPIED if fresh_copies else m.kind != NEW)) ** order


def _further(axes: tuple[Axis, ...], maps: list[AxisMap | None]) -> Any:
    """Where an output is a further copy: bool, broadcastable to the leaf."""
    masks = [
        _along(m.kind == DERIVED, dim, len(axes))
        for dim, (axis, m) in enumerate(zip(axes, maps, strict=True))
        if m is not None and axis.side == "out"
    ]
    return np.any(np.broadcast_arrays(*masks), axis=0) if masks else np.zeros((1,) * len(axes), bool)


def _filled(todo: Plan, name: str, y: Any, axes: tuple[Axis, ...], maps: list[AxisMap | None], library: Any):
    """y with its new entries. Widths come first, so that whole new layers, tokens and positions are
    all new. Where copies take a share, new entries have the share 0 already."""
    for dim in reversed(range(len(axes))):
        m, axis = maps[dim], axes[dim]
        if m is None or divides(todo, axis) or (m.kind != NEW).all():
            continue
        if m.fill == "mean":
            new = y.take(np.flatnonzero(m.kind == COPIED), axis=dim).mean(axis=dim, keepdims=True)
        elif m.fill == "zero" and is_matrix(axes):
            new = library.zeros((), y.dtype)
        else:
            new = _fresh(todo, f"{name} {dim}", y.shape, y.dtype, 0, library)
        if m.filled >= 0:
            new = library.where(_along(np.arange(len(m.kind)) < m.filled, dim, y.ndim), new, 0)
        y = library.where(_along(m.kind == NEW, dim, y.ndim), new, y).astype(y.dtype)
    return y


def _noisy(todo: Plan, name: str, y: Any, axes: tuple[Axis, ...], maps: list[AxisMap | None], library: Any):
    if not todo.options.noise or not is_matrix(axes):
        return y
    drawn = jax.random.normal(_key(todo, f"{name} noise"), y.shape, jnp.float32)
    by = 1 + todo.options.noise * (concrete(drawn) if library is np else drawn)
    return library.where(_further(axes, maps), y * by, y).astype(y.dtype)


def _fresh(todo: Plan, name: str, shape: tuple[int, ...], dtype: Any, order: int, library: Any) -> Any:
    """As in a new model (functional.init): matrices at random, everything else where it starts."""
    path = name.partition(" ")[0]
    if order:
        return library.zeros(shape, dtype)
    if not is_matrix(ROLES[path]):
        return library.full(shape, start(path), dtype)
    drawn = normal(_key(todo, name), shape, todo.target)
    return (concrete(drawn) if library is np else drawn).astype(dtype)


def _key(todo: Plan, name: str) -> jax.Array:
    return jax.random.fold_in(todo.key, zlib.crc32(name.encode()))
