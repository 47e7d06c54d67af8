"""Load the teacher: one frozen model with the student's vocabulary, or several as an ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Config
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import to_global
from dwt_jax.errors import UserError
from dwt_jax.models import family, flops
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import OBJECTIVE_LABELS
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.runs.pretrained import PretrainedModel, load_pretrained

TeacherParams = tuple[Any, ...]
"""Parameters of the teacher's models, one tree each."""


@dataclass(frozen=True)
class TeacherConfig:
    """The static config of a teacher, on which the compiled step depends.

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


def load_teacher(config: Config, student_vocab: Vocabulary, dtype: jnp.dtype) -> LoadedTeacher:
    """Load a teacher from the model or run directories that the config names.

    Args:
        config: of the run.
        student_vocab: vocabulary of the data.
        dtype: dtype in which its parameters are stored.

    Raises:
        UserError: the vocabulary of a model differs from the data's (the message names the first
            difference), it has another objective than the student, or fewer positions than a row has tokens.
    """
    models = [_load_model(config, path, student_vocab) for path in config.teacher.model_paths]
    return LoadedTeacher(
        make_teacher_config([x.model for x in models], config.teacher.weights),
        tuple(jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), x.params) for x in models),
        tuple(x.digest for x in models),
        sum_or_none(*(x.training_flops for x in models)),
    )


def _load_model(config: Config, path: str, student_vocab: Vocabulary) -> PretrainedModel:
    key, sequence_length = config.teacher.path_key, config.data.sequence_length
    model = load_pretrained(key, path, student_vocab)
    check_teacher_objective(key, path, model.model, config.model)
    if model.model.max_length < sequence_length:
        raise UserError(
            f"{key}: {path} has {model.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    return model


def check_teacher_objective(key: str, path: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise UserError if a teacher predicts something else than the student at the same position.

    Args:
        key: config key that names the teacher, for the message.
        path: of the teacher, for the message.
        teacher: its config.
        student: config of the student.
    """
    if teacher.objective != student.objective:
        raise UserError(
            f"{key}: {path} is a {teacher.model_type}, which has the {OBJECTIVE_LABELS[teacher.objective]} "
            f"loss, expected a model with the student's {OBJECTIVE_LABELS[student.objective]} loss"
        )


def shard_params(teacher: LoadedTeacher, mesh: jax.sharding.Mesh) -> TeacherParams:
    """Return the teacher's parameters on the mesh, sharded like a student's."""
    return to_global(teacher.params, teacher.config.shardings(mesh))
