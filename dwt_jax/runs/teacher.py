"""The teacher: any model with the student's vocabulary, frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import to_global
from dwt_jax.errors import UserError
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.runs.pretrained import PretrainedModel, load_pretrained


def load_teacher(
    path: str, student_vocab: Vocabulary, sequence_length: int, dtype: jnp.dtype
) -> PretrainedModel:
    """Read a teacher from a model or run directory, its parameters in the storage `dtype`.

    Raises UserError if its vocabulary differs from the data's, naming the first difference,
    or if it has fewer positions than the rows have tokens.
    """
    teacher = load_pretrained("teacher.path", path, student_vocab)
    if teacher.model.max_length < sequence_length:
        raise UserError(
            f"teacher.path: {path} has {teacher.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    return teacher._replace(params=jax.tree.map(lambda x: np.asarray(x).astype(dtype), teacher.params))


def shard_params(teacher: PretrainedModel, mesh: jax.sharding.Mesh) -> Any:
    """Its parameters on the devices, laid out like a student's."""
    return to_global(teacher.params, infer_shardings(teacher.params, teacher.model, mesh))
