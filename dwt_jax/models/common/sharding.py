"""Shardings of a model's arrays on a mesh, from the logical axes of each parameter."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig

_MESH_AXIS = {"embed": "fsdp", "head": "tensor", "kv_head": "tensor", "mlp": "tensor", "vocab": "tensor"}


def policy_for_mesh(mesh: Mesh, policy: Policy) -> Policy:
    """Return the policy of a program on this mesh."""
    return policy._replace(batch_sharding=batch_sharding(mesh)) if mesh.size > 1 else policy


def infer_shardings(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Return a sharding for each leaf of a training state, by the logical axes of the parameters.

    Leaves that mirror a parameter, such as moments, are sharded like it. They are recognised by the end
    of their path and their rank. Everything else is replicated.

    Args:
        tree: parameters, or a state that contains them; arrays or their shapes.
        config: the model config.
        mesh: the mesh, with the axes data, fsdp and tensor.
    """

    param_axes = family(config).param_axes(config)

    def leaf_sharding(path: tuple[Any, ...], array: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            axes = param_axes.get("/".join(parts[start:]))
            if axes is not None and len(axes) == np.ndim(array):
                return NamedSharding(mesh, _spec(axes, np.shape(array), mesh))
        return replicated_sharding(mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def _spec(axes: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Use each mesh axis once, and only where it divides the size."""
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
