"""The teacher: any model with the student's vocabulary, frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import put, shardings
from dwt_jax.errors import UserError
from dwt_jax.runs.pretrained import Borrowed, borrow


def load(path: str, student: Vocabulary, sequence_length: int, dtype: jnp.dtype) -> Borrowed:
    """Read a teacher from a model or run directory, its parameters in the storage `dtype`.

    Raises UserError if its vocabulary differs from the data's, naming the first difference,
    or if it has fewer positions than the rows have tokens.
    """
    teacher = borrow("teacher.path", path, student)
    if teacher.model.max_length < sequence_length:
        raise UserError(
            f"teacher.path: {path} has {teacher.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    return teacher._replace(params=jax.tree.map(lambda x: np.asarray(x).astype(dtype), teacher.params))


def on_mesh(teacher: Borrowed, mesh: jax.sharding.Mesh) -> Any:
    """Its parameters on the devices, laid out like a student's."""
    return put(teacher.params, shardings(teacher.params, mesh))
