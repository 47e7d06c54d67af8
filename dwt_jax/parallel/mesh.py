"""One mesh with the axes (data, fsdp, tensor), and where every array lives on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dwt_jax import config as settings
from dwt_jax.errors import UserError
from dwt_jax.model.roles import ROLES, path_name

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


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


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
