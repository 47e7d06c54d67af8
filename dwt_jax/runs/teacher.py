"""Load the teacher: one frozen model with the student's vocabulary, or several as an ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Teacher
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import to_global
from dwt_jax.errors import UserError
from dwt_jax.models import family, flops
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.runs.pretrained import PretrainedModel, load_pretrained

TeacherParams = tuple[Any, ...]
"""Parameters of the teacher's models, one tree each."""


@dataclass(frozen=True)
class TeacherConfig:
    """What the compiled step depends on.

    Attributes:
        models: one model, or several whose probabilities are averaged.
        weights: of the models in that mean; their sum is 1.
    """

    models: tuple[ModelConfig, ...]
    weights: tuple[float, ...] = (1.0,)

    def abstract_params(self) -> TeacherParams:
        """Return shapes of the parameters, fp32."""
        return tuple(family(model).abstract_params(model) for model in self.models)

    def shardings(self, mesh: jax.sharding.Mesh) -> TeacherParams:
        """Return shardings of the parameters by their logical axes, like a student's."""
        trees = zip(self.abstract_params(), self.models, strict=True)
        return tuple(infer_shardings(params, model, mesh) for params, model in trees)

    def forward_flops(self, rows: int, length: int, predictions: int) -> float:
        """Return the FLOPs of a forward pass of all models, see `flops.forward_flops`."""
        return sum(flops.forward_flops(model, rows, length, predictions) for model in self.models)


@dataclass(frozen=True)
class LoadedTeacher:
    """A loaded teacher.

    Attributes:
        config: of its models.
        params: of its models, host arrays.
        digests: of the parameters of its models.
        training_flops: of the pre-training of all models; None if unknown.
    """

    config: TeacherConfig
    params: TeacherParams
    digests: tuple[str, ...]
    training_flops: float | None

    @property
    def digest(self) -> str:
        """Digest of the only model, or the digests of several with their weights."""
        if len(self.digests) == 1:
            return self.digests[0]
        terms = zip(self.config.weights, self.digests, strict=True)
        return " + ".join(f"{weight:.6g} * {digest}" for weight, digest in terms)


def make_teacher_config(models: Sequence[ModelConfig], weights: Sequence[float]) -> TeacherConfig:
    """Return the config of a teacher.

    Args:
        models: configs of its models.
        weights: of the models, relative; empty: equal.
    """
    weights = weights or (1.0,) * len(models)
    return TeacherConfig(tuple(models), tuple(weight / sum(weights) for weight in weights))


def load_teacher(
    keys: Teacher, student_vocab: Vocabulary, sequence_length: int, dtype: jnp.dtype
) -> LoadedTeacher:
    """Load a teacher from the model or run directories that the config names.

    Args:
        keys: section `teacher` of the config.
        student_vocab: vocabulary of the data.
        sequence_length: tokens per row.
        dtype: dtype in which its parameters are stored.

    Raises:
        UserError: the vocabulary of a model differs from the data's (the message names the first
            difference), or it has fewer positions than a row has tokens.
    """
    models = [_load_model(keys.path_key, path, student_vocab, sequence_length) for path in keys.model_paths]
    return LoadedTeacher(
        make_teacher_config([x.model for x in models], keys.weights),
        tuple(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), x.params) for x in models),
        tuple(x.digest for x in models),
        sum_or_none(*(x.training_flops for x in models)),
    )


def _load_model(name: str, path: str, student_vocab: Vocabulary, sequence_length: int) -> PretrainedModel:
    model = load_pretrained(name, path, student_vocab)
    if model.model.max_length < sequence_length:
        raise UserError(
            f"{name}: {path} has {model.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    return model


def shard_params(teacher: LoadedTeacher, mesh: jax.sharding.Mesh) -> TeacherParams:
    """Return the teacher's parameters on the mesh, sharded like a student's."""
    return to_global(teacher.params, teacher.config.shardings(mesh))
