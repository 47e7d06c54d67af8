"""One mesh with the axes (data, fsdp, tensor), and where every array lives on it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dwt_jax import config as settings
from dwt_jax.errors import UserError
from dwt_jax.models.common.logical_axes import ROLES, path_name
from dwt_jax.models.common.matmul import Numerics

ROWS = ("data", "fsdp")
"""The mesh axes that a batch's rows are spread over."""

_MESH_AXIS = {"embed": "fsdp", "head": "tensor", "mlp": "tensor", "vocab": "tensor"}


def make_mesh(sizes: settings.Mesh, rows: int) -> Mesh:
    """The mesh over all devices. `rows`: of one part of a batch, for the check that they divide."""
    shape = mesh_shape(sizes, jax.device_count(), rows)
    return jax.make_mesh(tuple(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def mesh_shape(sizes: settings.Mesh, count: int, rows: int) -> list[int]:
    """The sizes of the axes over `count` devices; a -1 is what is left. Raises UserError."""
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    fixed = int(np.prod([size for size in shape if size != -1]))
    shape = [count // fixed if size == -1 else size for size in shape]
    if int(np.prod(shape)) != count:
        raise UserError(
            f"config: mesh is data={sizes.data} fsdp={sizes.fsdp} tensor={sizes.tensor}, "
            f"expected a product that fits the {count} devices found"
        )
    if rows % (shape[0] * shape[1]):
        raise UserError(
            f"config: train.batch_size / train.accumulate is {rows}, expected a multiple of the "
            f"mesh's data x fsdp ({shape[0] * shape[1]})"
        )
    return shape


def replicated(mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def over(mesh: Mesh, numerics: Numerics) -> Numerics:
    """`numerics` of a program on this mesh."""
    return numerics._replace(rows=rows_sharding(mesh)) if mesh.size > 1 else numerics


def put(tree: Any, where: Any) -> Any:
    """Host arrays on the mesh: `where` is a sharding, or a tree of them like `tree`.

    Every process gives the same global arrays; each takes what its devices hold. jax.device_put
    would compare them between the processes, a collective for each array.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: _put(x, where), tree)
    return jax.tree.map(_put, tree, where)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return _made(x.shape, where, lambda index: x[index])


def _made(shape: tuple[int, ...], where: NamedSharding, part: Callable[[Any], np.ndarray]) -> jax.Array:
    with jax.transfer_guard_host_to_device("allow"):  # it is meant, as jax.device_put is
        return jax.make_array_from_callback(shape, where, part)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """int [n], sorted: which rows of a batch of `rows` lie on the devices of this process."""
    places = rows_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places if place]))


def put_rows(own: Any, numbers: np.ndarray, mesh: Mesh, rows: int) -> Any:
    """A batch of `rows` rows on the mesh, of which this process has `own`, those of `numbers`."""
    if len(numbers) == rows:
        return put(own, rows_sharding(mesh))

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return x[np.searchsorted(numbers, np.arange(rows)[index[0]])]

        return _made((rows, *x.shape[1:]), rows_sharding(mesh), part)

    return jax.tree.map(place, own)


def whole(tree: Any) -> Any:
    """Host arrays of a tree on the mesh. All processes must ask: what is spread over them is gathered,
    a leaf at a time."""
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> np.ndarray:
    spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    if spread and isinstance(x.sharding, NamedSharding):
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return np.asarray(jax.device_get(x))


def split_rows(batch: Any, parts: int) -> Any:
    """[B, …] → [parts, B / parts, …] of every leaf. Strided (row i goes to part i mod parts), so
    that rows spread over devices stay where they are."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a state: parameters, and whatever mirrors them (moments),
    by their roles; everything else replicated.

    A leaf belongs to a role when the end of its path and its rank agree.
    """

    def leaf(path: tuple[Any, ...], array: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            axes = ROLES.get("/".join(parts[start:]))
            if axes is not None and len(axes) == np.ndim(array):
                return NamedSharding(mesh, _spec(axes, np.shape(array), mesh))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _spec(axes: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Each mesh axis once, and only where it divides the size."""
    used: set[str] = set()
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        name = _MESH_AXIS.get(axis.name)
        if name and name not in used and size % mesh.shape[name] == 0:
            used.add(name)
            spec.append(name)
        else:
            spec.append(None)
    return PartitionSpec(*spec)
