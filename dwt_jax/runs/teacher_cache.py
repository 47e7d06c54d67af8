"""The teacher's answers on disk: the format, and how a run reads them. See docs/teacher_cache.md.

A cache holds, for the predictions of each row of each step, in their order: some tokens of the teacher's
distribution with the numbers of their draws (or their probabilities), log p(label) and the entropy.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from safetensors.numpy import load, save

from dwt_jax.config_loader import build_dataclass
from dwt_jax.distributed.mesh import batch_sharding
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, read_json_object, user_path
from dwt_jax.models import model_config_type
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives.teacher_sample import SampleKind, TeacherSample
from dwt_jax.runs.teacher import LoadedTeacher, TeacherConfig

FORMAT_VERSION = 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class CacheConfig:
    """What the compiled step depends on, where a cache takes the place of the teacher.

    Attributes:
        teacher: of the teacher whose answers they are.
        kind: how the tokens were chosen.
        count: K, tokens of a prediction at most.
    """

    teacher: TeacherConfig
    kind: SampleKind
    count: int

    def shardings(self, mesh: jax.sharding.Mesh) -> Any:
        """Return the sharding of a `TeacherSample`: by rows."""
        return batch_sharding(mesh)

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Configs of the teacher's models."""
        return self.teacher.models

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the models in the mean of their probabilities."""
        return self.teacher.weights

    def forward_flops(self, rows: int, length: int, predictions: int) -> float:
        """Return the FLOPs that the answers of some rows cost, when the cache was written."""
        return self.teacher.forward_flops(rows, length, predictions)


@dataclass(frozen=True)
class RowsOfSamples:
    """Samples of some rows, as they are stored. R rows, P predictions a row.

    Attributes:
        ids: uint [n], the tokens of all predictions one after the other.
        values: uint8 [n], numbers of draws, or float16 [n], probabilities.
        num_tokens: uint8 [R, P], how many of them each prediction has; 0: no prediction.
        label_log_prob: float32 [R, P].
        entropy: float32 [R, P].
    """

    ids: np.ndarray
    values: np.ndarray
    num_tokens: np.ndarray
    label_log_prob: np.ndarray
    entropy: np.ndarray

    @functools.cached_property
    def _row_starts(self) -> np.ndarray:
        """Index of the first token of each row, and n: int64 [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_tokens.sum(axis=1, dtype=np.int64))])

    def select(self, rows: np.ndarray, config: CacheConfig) -> TeacherSample:
        """Return the samples of some rows, padded to K tokens a prediction."""
        spans = zip(self._row_starts[rows], self._row_starts[rows + 1], strict=True)
        entries = np.concatenate([np.arange(start, stop) for start, stop in spans])
        is_token = np.arange(config.count) < self.num_tokens[rows][..., None]
        ids, weights = np.zeros(is_token.shape, np.int32), np.zeros(is_token.shape, np.float32)
        ids[is_token] = self.ids[entries]
        weights[is_token] = self.values[entries]
        if config.kind == "draws":
            weights /= np.float32(config.count)
        return TeacherSample(
            cast(jax.Array, ids),
            cast(jax.Array, weights),
            cast(jax.Array, self.label_log_prob[rows]),
            cast(jax.Array, self.entropy[rows]),
            config.kind,
        )


def write_shard(path: Path, rows: RowsOfSamples) -> str:
    """Write a file of the cache under a temporary name, and rename it. Return its SHA-256."""
    names = [field.name for field in fields(rows)]
    content = save({name: np.ascontiguousarray(getattr(rows, name)) for name in names})
    with atomic_write(path) as partial:
        partial.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


class CachedTeacher:
    """A cache in place of a loaded teacher.

    Attributes:
        path: its directory.
        config: what the step depends on.
        steps: number of steps that it has.
        digest: of the teacher, as `LoadedTeacher.digest`.
        cache_digest: of its content.
        digests: of the parameters of the teacher's models.
        training_flops: of the pre-training of the teacher's models; None if unknown.
        identity: what must be equal in a run, see `train.setup.cache_identity`.
    """

    def __init__(self, path: str):
        """Open a cache.

        Raises:
            UserError: it is not complete, damaged, or of another version.
        """
        self.path = user_path(path)
        if not (self.path / INDEX_NAME).exists():
            problem = "is not complete" if (self.path / "cache.json").exists() else "holds no cache"
            raise UserError(f"teacher.cache: {path} {problem}, expected what dwt cache writes to --out")
        index = read_json_object(self.path / INDEX_NAME, "JSON that dwt cache wrote")
        if index.get("format") != FORMAT_VERSION:
            raise UserError(
                f"teacher.cache: {path} has format {index.get('format')}, expected {FORMAT_VERSION}"
            )
        try:
            teacher = index["teacher"]
            models = tuple(_model_config(model) for model in teacher["models"])
            teacher_config = TeacherConfig(models, tuple(teacher["weights"]))
            self.config = CacheConfig(teacher_config, index["kind"], int(index["count"]))
            self.digest: str = teacher["digest"]
            self.digests: tuple[str, ...] = tuple(teacher["digests"])
            self.training_flops: float | None = teacher["training_flops"]
            self.identity: Mapping[str, Any] = index["identity"]
            self._batch_sizes = np.asarray(index["identity"]["batch_sizes"], np.int64)
            if self.config.kind not in get_args(SampleKind) or not index["shards"]:
                raise ValueError("kind or shards")
            self._shards = [(int(x["first_step"]), str(x["file"]), str(x["sha256"])) for x in index["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path / INDEX_NAME}: damaged ({error!r}), expected what dwt cache wrote"
            ) from None
        self.steps = len(self._batch_sizes)
        self.cache_digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        self._loaded: tuple[int, RowsOfSamples] | None = None

    def sample(self, step: int, rows: np.ndarray) -> TeacherSample:
        """Return the samples of some rows of a step's batch, host arrays.

        Raises:
            UserError: a file is lost or damaged.
        """
        number = max(i for i, (first_step, _, _) in enumerate(self._shards) if first_step <= step)
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = number, self._load(number)
        first_row = int(self._batch_sizes[self._shards[number][0] : step].sum())
        return self._loaded[1].select(first_row + rows, self.config)

    def _load(self, number: int) -> RowsOfSamples:
        _, name, digest = self._shards[number]
        path = self.path / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, expected a file of the cache") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{path}: damaged, expected the file that dwt cache wrote (its SHA-256 differs)")
        return RowsOfSamples(**load(content))


def _model_config(record: dict[str, Any]) -> ModelConfig:
    return build_dataclass(model_config_type(record["model_type"]), record)


def reject_cache_of_another_run(cache: CachedTeacher, identity: Mapping[str, Any], steps: int) -> None:
    """Raise UserError unless a cache has the predictions of a run.

    Args:
        cache: the cache.
        identity: of the run, see `train.setup.cache_identity`.
        steps: number of steps of the run that use the teacher.
    """
    for key, expected in identity.items():
        value: Any = cache.identity.get(key)
        if key == "batch_sizes":
            num_steps = min(steps, cache.steps)
            value, expected = value[:num_steps], expected[:num_steps]
        if value != expected:
            name, cached_value, expected_value = _first_difference(key, value, expected)
            raise UserError(
                f"teacher.cache: {cache.path} was written for another {name}, {cached_value}, expected "
                f"{expected_value}"
            )
    if cache.steps < steps:
        raise UserError(
            f"teacher.cache: {cache.path} has the predictions of {cache.steps:,} steps, expected {steps:,}"
        )


def _first_difference(key: str, value: Any, expected: Any) -> tuple[str, str, str]:
    """Return the dotted key of the first difference of two JSON values, and both values there."""
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = {**value, **expected}
    elif isinstance(value, list) and isinstance(expected, list) and len(value) == len(expected):
        return next(
            _first_difference(f"{key}.{i}", *pair)
            for i, pair in enumerate(zip(value, expected, strict=True))
            if pair[0] != pair[1]
        )
    else:
        return key, json.dumps(value), json.dumps(expected)
    name = next(name for name in keys if value.get(name) != expected.get(name))
    return _first_difference(f"{key}.{name}", value.get(name), expected.get(name))


def open_cached_teacher(path: str, teacher: LoadedTeacher | None) -> CachedTeacher:
    """Open a cache.

    Args:
        path: `teacher.cache`.
        teacher: the teacher that the config names beside it; None: it names none.

    Raises:
        UserError: the cache is not complete or damaged, or has the answers of another teacher.
    """
    cache = CachedTeacher(path)
    if teacher is not None and teacher.digest != cache.digest:
        raise UserError(
            f"teacher.cache: {path} has the answers of another teacher than teacher.path, expected those of "
            "the same one (or teacher.path empty)"
        )
    return cache
