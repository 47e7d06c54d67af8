"""The teacher: any model with the student's vocabulary, frozen."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Model
from dwt_jax.data.tokenizer import Vocabulary, vocabulary
from dwt_jax.errors import UserError
from dwt_jax.model.layers import padded_vocabulary
from dwt_jax.model.roles import Axis, map_with_roles
from dwt_jax.parallel.mesh import shardings
from dwt_jax.train.workdir import load_model, read_json


class Teacher(NamedTuple):
    params: Any  # host arrays in the storage dtype
    model: Model
    digest: str  # of its parameters
    training_flops: float | None  # what its own pre-training cost, where it says so


def load(path: str, student: Vocabulary, sequence_length: int, dtype: jnp.dtype) -> Teacher:
    """Read a teacher from a model or run directory.

    Raises UserError if its vocabulary differs from the data's, naming the first difference,
    or if it has fewer positions than the rows have tokens.
    """
    loaded = load_model(path)
    _same_vocabulary(path, vocabulary(loaded.tokenizer), student)
    if loaded.model.vocab_size < len(student.tokens):
        raise UserError(
            f"teacher.path: {path} has vocab_size {loaded.model.vocab_size}, expected at least the "
            f"tokenizer's {len(student.tokens)}"
        )
    if loaded.model.max_length < sequence_length:
        raise UserError(
            f"teacher.path: {path} has {loaded.model.max_length} positions, expected at "
            f"least data.sequence_length ({sequence_length})"
        )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(loaded.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), loaded.params)
    params, model = _cut_vocabulary(params, loaded.model, len(student.tokens))
    return Teacher(params, model, digest.hexdigest()[:16], _training_flops(Path(path).expanduser()))


def _cut_vocabulary(params: Any, model: Model, size: int) -> tuple[Any, Model]:
    """Without the rows that no token owns: many checkpoints pad their tables."""
    rows = padded_vocabulary(size)

    def cut(axes: tuple[Axis, ...], leaf: np.ndarray) -> np.ndarray:
        return leaf[:rows] if axes[0].name == "vocab" else leaf

    return map_with_roles(cut, params), dataclasses.replace(model, vocab_size=size)


def on_mesh(teacher: Teacher, mesh: jax.sharding.Mesh) -> Any:
    """Its parameters on the devices, laid out like a student's."""
    return jax.device_put(teacher.params, shardings(teacher.params, mesh))


def _same_vocabulary(path: str, teacher: Vocabulary, student: Vocabulary) -> None:
    pairs = zip(teacher.tokens, student.tokens, strict=False)
    for i, (theirs, ours) in enumerate(pairs):
        if theirs != ours:
            raise UserError(
                f"teacher.path: {path} has another vocabulary, token {i} is {theirs!r}, expected {ours!r}"
            )
    if len(teacher.tokens) != len(student.tokens):
        raise UserError(
            f"teacher.path: {path} has another vocabulary, of {len(teacher.tokens)} tokens, "
            f"expected the data's {len(student.tokens)}"
        )


def _training_flops(path: Path) -> float | None:
    """Of its own run and of its teachers' before it, None where that is not known."""
    summary = (path.parent if path.name == "model" else path) / "summary.json"
    if not summary.exists():
        return None
    found = read_json(summary).get("flops") or {}
    own, before = found.get("total"), found.get("teacher_training")
    return None if own is None or before is None else own + before
