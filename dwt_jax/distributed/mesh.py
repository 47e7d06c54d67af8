"""The device mesh with axes (data, fsdp, tensor), and transfers of arrays to and from it."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dwt_jax.errors import UserError


class MeshSizes(Protocol):
    """Number of devices on each mesh axis. One axis may be -1: all remaining devices."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


BATCH_AXES = ("data", "fsdp")
"""The mesh axes that shard the rows of a batch."""


def make_mesh(sizes: MeshSizes, microbatch_size: int) -> Mesh:
    """Make the mesh over all devices.

    Args:
        sizes: devices per axis.
        microbatch_size: rows of a microbatch, which the batch axes must divide.

    Raises:
        UserError: as in `mesh_shape`.
    """
    shape = mesh_shape(sizes, jax.device_count(), microbatch_size)
    return jax.make_mesh(tuple(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def mesh_shape(sizes: MeshSizes, num_devices: int, microbatch_size: int) -> list[int]:
    """Return the sizes of the three axes over `num_devices`, with a -1 filled in.

    Raises:
        UserError: the sizes do not fit the devices, or the batch axes do not divide a microbatch.
    """
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
            f"config: train.batch_size / train.gradient_accumulation_steps is {microbatch_size}, "
            f"expected a multiple of the mesh's data x fsdp ({shape[0] * shape[1]})"
        )
    return shape


def replicated_sharding(mesh: Any) -> NamedSharding:
    """Return the sharding that holds an entire array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [B, ...] whose leading axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_global(tree: Any, sharding: Any) -> Any:
    """Put host arrays on the mesh.

    Every process passes the same values, and each copies the shards of its own devices.
    jax.device_put would compare the values between processes, with a collective for each array.

    Args:
        tree: a pytree of host arrays.
        sharding: a sharding for all leaves, or a pytree of shardings like `tree`.

    Returns:
        The pytree with global arrays as leaves.
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
    with jax.transfer_guard_host_to_device("allow"):  # an explicit transfer, as jax.device_put is
        return jax.make_array_from_callback(shape, sharding, get_slice)


def local_row_indices(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return which rows of a batch lie on the devices of this process.

    Returns:
        int [n], sorted.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices if index]))


def make_global_batch(local_batch: Any, row_indices: np.ndarray, mesh: Mesh, batch_size: int) -> Any:
    """Make a global batch from the rows of each process.

    Args:
        local_batch: a pytree of host arrays [n, ...], the rows of this process.
        row_indices: int [n], the result of `local_row_indices`.
        mesh: the mesh to put the batch on.
        batch_size: B, rows over all processes.

    Returns:
        The pytree with global arrays [B, ...] as leaves.
    """
    if len(row_indices) == batch_size:
        return to_global(local_batch, batch_sharding(mesh))

    def make_global_leaf(x: np.ndarray) -> jax.Array:
        def get_slice(index: Any) -> np.ndarray:
            return x[np.searchsorted(row_indices, np.arange(batch_size)[index[0]])]

        return _make_global_array((batch_size, *x.shape[1:]), batch_sharding(mesh), get_slice)

    return jax.tree.map(make_global_leaf, local_batch)


def to_host(tree: Any) -> Any:
    """Copy a pytree of global arrays to host arrays.

    All processes must call this: arrays sharded over processes are all-gathered, one leaf at a time.
    """
    return jax.tree.map(_to_host_array, tree)


def _to_host_array(x: Any) -> np.ndarray:
    is_sharded = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    if is_sharded and isinstance(x.sharding, NamedSharding):
        x = jax.jit(lambda x: x, out_shardings=replicated_sharding(x.sharding.mesh))(x)
    return np.asarray(jax.device_get(x))


def split_microbatches(batch: Any, num_microbatches: int) -> Any:
    """Reshape every leaf [B, ...] to [num_microbatches, B / num_microbatches, ...].

    Rows are strided (row i is in microbatch i mod num_microbatches), so that no sharded row moves
    between devices.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
