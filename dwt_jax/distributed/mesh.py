"""One mesh with the axes (data, fsdp, tensor), and where every array lives on it."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dwt_jax.errors import UserError


class MeshSizes(Protocol):
    """Devices per mesh axis; one axis may be -1: whatever is left."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


BATCH_AXES = ("data", "fsdp")
"""The mesh axes that a batch's rows are spread over."""


def make_mesh(sizes: MeshSizes, microbatch_size: int) -> Mesh:
    """The mesh over all devices. `rows`: of one part of a batch, for the check that they divide."""
    shape = mesh_shape(sizes, jax.device_count(), microbatch_size)
    return jax.make_mesh(tuple(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def mesh_shape(sizes: MeshSizes, num_devices: int, microbatch_size: int) -> list[int]:
    """The sizes of the axes over `count` devices; a -1 is what is left. Raises UserError."""
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    fixed = int(np.prod([size for size in shape if size != -1]))
    shape = [num_devices // fixed if size == -1 else size for size in shape]
    if int(np.prod(shape)) != num_devices:
        raise UserError(
            f"config: mesh is data={sizes.data} fsdp={sizes.fsdp} tensor={sizes.tensor}, "
            f"expected a product that fits the {num_devices} devices found"
        )
    if microbatch_size % (shape[0] * shape[1]):
        raise UserError(
            f"config: train.batch_size / train.gradient_accumulation_steps is {microbatch_size}, expected a multiple of the "
            f"mesh's data x fsdp ({shape[0] * shape[1]})"
        )
    return shape


def replicated_sharding(mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_global(tree: Any, sharding: Any) -> Any:
    """Host arrays on the mesh: `where` is a sharding, or a tree of them like `tree`.

    Every process gives the same global arrays; each takes what its devices hold. jax.device_put
    would compare them between the processes, a collective for each array.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda x: _to_global_array(x, sharding), tree)
    return jax.tree.map(_to_global_array, tree, sharding)


def _to_global_array(x: Any, sharding: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return _make_global_array(x.shape, sharding, lambda index: x[index])


def _make_global_array(
    shape: tuple[int, ...], sharding: NamedSharding, get_slice: Callable[[Any], np.ndarray]
) -> jax.Array:
    with jax.transfer_guard_host_to_device("allow"):  # it is meant, as jax.device_put is
        return jax.make_array_from_callback(shape, sharding, get_slice)


def local_row_indices(mesh: Mesh, batch_size: int) -> np.ndarray:
    """int [n], sorted: which rows of a batch of `rows` lie on the devices of this process."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices if index]))


def make_global_batch(local_batch: Any, row_indices: np.ndarray, mesh: Mesh, batch_size: int) -> Any:
    """A batch of `rows` rows on the mesh, of which this process has `own`, those of `numbers`."""
    if len(row_indices) == batch_size:
        return to_global(local_batch, batch_sharding(mesh))

    def make_global_leaf(x: np.ndarray) -> jax.Array:
        def get_slice(index: Any) -> np.ndarray:
            return x[np.searchsorted(row_indices, np.arange(batch_size)[index[0]])]

        return _make_global_array((batch_size, *x.shape[1:]), batch_sharding(mesh), get_slice)

    return jax.tree.map(make_global_leaf, local_batch)


def to_host(tree: Any) -> Any:
    """Host arrays of a tree on the mesh. All processes must ask: what is spread over them is gathered,
    a leaf at a time."""
    return jax.tree.map(_to_host_array, tree)


def _to_host_array(x: Any) -> np.ndarray:
    is_sharded = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    if is_sharded and isinstance(x.sharding, NamedSharding):
        x = jax.jit(lambda x: x, out_shardings=replicated_sharding(x.sharding.mesh))(x)
    return np.asarray(jax.device_get(x))


def split_microbatches(batch: Any, num_microbatches: int) -> Any:
    """[B, …] → [parts, B / parts, …] of every leaf. Strided (row i goes to part i mod parts), so
    that rows spread over devices stay where they are."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
