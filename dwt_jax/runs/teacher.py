"""Load the teacher: a frozen model with the student's vocabulary."""

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
    """Load a teacher from a model directory or a run directory.

    Args:
        path: the directory.
        student_vocab: vocabulary of the data.
        sequence_length: tokens per row.
        dtype: dtype in which its parameters are stored.

    Raises:
        UserError: the vocabulary differs from the data's (the message names the first difference), or the
            teacher has fewer positions than a row has tokens.
    """
    teacher = load_pretrained("teacher.path", path, student_vocab)
    if teacher.model.max_length < sequence_length:
        raise UserError(
            f"teacher.path: {path} has {teacher.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    return teacher._replace(params=jax.tree.map(lambda x: np.asarray(x).astype(dtype), teacher.params))


def shard_params(teacher: PretrainedModel, mesh: jax.sharding.Mesh) -> Any:
    """Return the teacher's parameters on the mesh, sharded like a student's."""
    return to_global(teacher.params, infer_shardings(teacher.params, teacher.model, mesh))
