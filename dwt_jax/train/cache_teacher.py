"""Write the teacher's answers for the rows of a run to disk (`dwt cache`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Config
from dwt_jax.config_checks import cache_problems
from dwt_jax.data.batch import Batch
from dwt_jax.data.data_cache import get_prepared
from dwt_jax.data.dataset import batch_iterator
from dwt_jax.distributed.mesh import (
    batch_sharding,
    make_global_batch,
    replicated_sharding,
    to_global,
    to_host,
)
from dwt_jax.errors import UserError
from dwt_jax.files import acquire_lock, list_directory, read_intact_json, read_json_object, write_json
from dwt_jax.logs import logger
from dwt_jax.models.common.lm_head import map_positions
from dwt_jax.models.common.sharding import policy_for_mesh
from dwt_jax.objectives.distillation import entropy, mix_logits
from dwt_jax.objectives.fused_lm_loss import head_logits
from dwt_jax.objectives.targets import row_keys
from dwt_jax.objectives.teacher_sample import SampleKind, draw_tokens
from dwt_jax.progress import Progress
from dwt_jax.runs.teacher import LoadedTeacher, TeacherConfig, TeacherParams, shard_params
from dwt_jax.runs.teacher_cache import FORMAT_VERSION, INDEX_NAME, RowsOfSamples, write_shard
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.setup import build_run, cache_identity, check_environment
from dwt_jax.train.step import StepConfig, make_lm_head, make_microbatch
from dwt_jax.train.step_schedules import StepSchedules

ROWS_PER_SHARD = 4096
_DRAW_KEY = 0x7EAC  # the draws of a row have another key than its masks


@dataclass(frozen=True)
class SampleSettings:
    """How the tokens of a prediction are chosen: `count` draws, or the `count` most probable ones."""

    kind: SampleKind
    count: int


def write_cache(config: Config, out: Path, settings: SampleSettings, part: tuple[int, int] = (0, 1)) -> bool:
    """Write the answers of the teacher for all steps of a run that use it. Files that are there stay.

    Args:
        config: of the run, with a teacher.
        out: a new directory, or one in which the same cache was begun.
        settings: how tokens are chosen.
        part: (i, n): write the files i, i + n, … only, counted from 0.

    Returns:
        Whether the cache is complete now.

    Raises:
        UserError: the config names no teacher or does not use it, or `out` holds anything else.
    """
    if not config.teacher.model_paths:
        raise UserError("config: teacher.path is empty, expected the teacher whose answers are cached")
    for problem in cache_problems(config):  # else no run could use it
        raise UserError(f"config: {problem}")
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, cache=""))
    config = check_environment(config, out)
    run, run_identity = build_run(config, out, get_prepared(config.data), lambda *_: None)
    if not run.teacher_end_step:
        raise UserError("config: distill.alpha_soft is 0 at every step, expected a run that uses its teacher")
    if settings.kind == "top_k" and settings.count > run.config.model.vocab_size:
        raise UserError(f"cache: --top-k is {settings.count}, expected at most the vocabulary's size")
    record = _describe_cache(run, settings, run_identity["data_digest"])
    with _lock(out):
        _claim(out, record)
    shards = _shard_steps(run.batch_sizes[: run.teacher_end_step])
    local = [number for number in range(part[0], len(shards), part[1]) if not _has_shard(out, number)]
    total = sum(int(run.batch_sizes[slice(*shards[number])].sum()) for number in local)
    with Progress("cache", total, "rows") as progress:
        sample = _make_sampler(run, settings) if local else None
        for number in local:
            assert sample is not None
            rows = _compute_rows(run, settings.kind, sample, *shards[number], progress)
            digest = write_shard(out / _shard_name(number), rows)
            write_json(_digest_path(out, number), {"sha256": digest})
    complete = sum(_has_shard(out, number) for number in range(len(shards)))
    if complete < len(shards):
        logger.info(f"cache: {complete} of {len(shards)} files are in {out}; index.json needs all of them")
        return False
    _write_index(out, record, shards)
    return True


def _describe_cache(run: RunContext, settings: SampleSettings, data_digest: str) -> dict[str, Any]:
    """Return the content of `cache.json`, as JSON represents it."""
    teacher = run.teacher
    assert isinstance(teacher, LoadedTeacher)
    identity = cache_identity(run, data_digest)
    identity["batch_sizes"] = identity["batch_sizes"][: run.teacher_end_step]
    record = {
        "format": FORMAT_VERSION,
        **dataclasses.asdict(settings),
        "temperature": 1.0,
        "compute_dtype": str(run.policy.compute_dtype),
        "teacher_dtype": str(jax.tree.leaves(teacher.params)[0].dtype),
        "rows_per_file": ROWS_PER_SHARD,
        "identity": identity,
        "teacher": {
            "digest": teacher.digest,
            "digests": teacher.digests,
            "weights": teacher.config.weights,
            "models": [dataclasses.asdict(model) for model in teacher.config.models],
            "training_flops": teacher.training_flops,
        },
    }
    return json.loads(json.dumps(record))


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Create a directory, and lock it against processes that start on it at the same time."""
    out.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(out / ".lock", wait=True)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Write `cache.json`, or compare it: a directory holds one cache."""
    path = out / "cache.json"
    if path.exists():
        before = read_json_object(path, "JSON that dwt cache wrote")
        if different := [key for key in record if before.get(key) != record[key]]:
            raise UserError(f"{out}: holds a cache with another {different[0]}, expected a new --out")
        return
    if any(not child.name.startswith(".") for child in list_directory(out)):
        raise UserError(f"{out}: holds other files, expected a new or empty --out")
    write_json(path, record)


def _write_index(out: Path, record: dict[str, Any], shards: list[tuple[int, int]]) -> None:
    """Write index.json, which makes the cache complete."""
    entries = [
        {
            "file": _shard_name(number),
            "first_step": shard[0],
            **read_json_object(_digest_path(out, number), "JSON that dwt cache wrote"),
        }
        for number, shard in enumerate(shards)
    ]
    write_json(out / INDEX_NAME, {**record, "shards": entries})
    size = sum((out / entry["file"]).stat().st_size for entry in entries)
    logger.info(f"cache: the answers for {shards[-1][1]:,} steps, {size / 1e6:.1f} MB, are in {out}")


def _shard_name(number: int) -> str:
    return f"{number:05}.safetensors"


def _digest_path(out: Path, number: int) -> Path:
    return out / f"{number:05}.json"


def _has_shard(out: Path, number: int) -> bool:
    """Whether a file is complete and intact. Its checksum is written last."""
    path, record = out / _shard_name(number), read_intact_json(_digest_path(out, number))
    return path.exists() and (record or {}).get("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()


def _shard_steps(batch_sizes: np.ndarray) -> list[tuple[int, int]]:
    """Return (first step, step to stop before) of each file, of about ROWS_PER_SHARD rows."""
    numbers = (np.cumsum(batch_sizes) - batch_sizes) // ROWS_PER_SHARD
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(batch_sizes)], strict=True))


# Samples

_Sampler = Callable[[int, Batch], tuple[np.ndarray, ...]]
"""(step, its rows) → what `_sample_step` returns, on the host."""


def _make_sampler(run: RunContext, settings: SampleSettings) -> _Sampler:
    assert isinstance(run.teacher, LoadedTeacher)
    params, replicated = shard_params(run.teacher, run.mesh), replicated_sharding(run.mesh)
    seed = to_global(np.uint32(run.config.seed), replicated)
    config = dataclasses.replace(run.step_config, policy=policy_for_mesh(run.mesh, run.step_config.policy))
    sample_step = jax.jit(
        functools.partial(_sample_step, config, settings), out_shardings=batch_sharding(run.mesh)
    )

    def sample(step: int, batch: Batch) -> tuple[np.ndarray, ...]:
        rows = len(batch.tokens)
        device_batch = make_global_batch(batch, np.arange(rows), run.mesh, rows)
        schedules, step_array = to_global((run.schedules[step], np.uint32(step)), replicated)
        return to_host(sample_step(params, device_batch, schedules, seed, step_array))

    return sample


def _sample_step(
    config: StepConfig,
    settings: SampleSettings,
    params: TeacherParams,
    batch: Batch,
    schedules: StepSchedules,
    seed: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return tokens, probabilities, log p(label), entropy and weights of the predictions of a step.

    int32 [B, P, K] (increasing, with repetitions, for draws), float16 [B, P, K], then float32 [B, P].
    """
    assert isinstance(config.teacher, TeacherConfig)
    keys = row_keys(seed, step, jnp.arange(batch.tokens.shape[0]))
    (targets, segment_ids), _ = make_microbatch(config, batch, keys, schedules)
    shape = (targets.labels.shape[1],)
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _DRAW_KEY), shape))(keys)
    heads = tuple(
        make_lm_head(model, model_params, targets, segment_ids, config.policy)
        for model, model_params in zip(config.teacher.models, params, strict=True)
    )
    weights, vocab_size, policy = config.teacher.weights, config.model.vocab_size, config.policy

    def sample(inputs: tuple[tuple[jax.Array, ...], jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        features, labels, uniform = inputs
        models = zip(heads, features, strict=True)
        logits = [head_logits(head, x, vocab_size, policy).reshape(*labels.shape, -1) for head, x in models]
        log_p = jax.nn.log_softmax(mix_logits(logits, weights))
        if settings.kind == "draws":
            ids = draw_tokens(log_p, uniform, settings.count)
            values = jnp.zeros(ids.shape, jnp.float16)
        else:
            log_values, ids = jax.lax.top_k(log_p, settings.count)
            values = jnp.exp(log_values).astype(jnp.float16)
        label_log_prob = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
        return ids.astype(jnp.int32), values, label_log_prob, entropy(log_p)

    inputs = tuple(head.features for head in heads), targets.labels, uniform
    return (*map_positions(sample, inputs, vocab_size, policy), targets.weights)


def _compute_rows(
    run: RunContext, kind: SampleKind, sample: _Sampler, first_step: int, stop: int, progress: Progress
) -> RowsOfSamples:
    """Return the samples of all rows of some steps."""
    steps = []
    for step, batch in enumerate(
        batch_iterator(run.rows, run.config.seed, run.batch_sizes[:stop], first_step, stop), first_step
    ):
        steps.append(sample(step, batch))
        progress.advance(len(batch.tokens))
    ids, values, label_log_prob, entropies, weights = (np.concatenate(x) for x in zip(*steps, strict=True))
    vocab_size = run.config.model.vocab_size
    return pack_samples(kind, ids, values, label_log_prob, entropies, weights > 0, vocab_size)


def pack_samples(
    kind: SampleKind,
    ids: np.ndarray,
    values: np.ndarray,
    label_log_prob: np.ndarray,
    entropy: np.ndarray,
    is_prediction: np.ndarray,
    vocab_size: int,
) -> RowsOfSamples:
    """Return samples as they are stored: each token once, with the number of its draws or its probability.

    Args:
        kind: how the tokens were chosen.
        ids: int [R, P, K]; those of draws are increasing.
        values: float16 [R, P, K], probabilities; of no meaning for draws.
        label_log_prob: float32 [R, P].
        entropy: float32 [R, P].
        is_prediction: bool [R, P].
        vocab_size: of the data; decides the type of the ids.
    """
    is_first = np.ones(ids.shape, bool)
    if kind == "draws":
        is_first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    is_first &= is_prediction[..., None]
    start = np.flatnonzero(is_first)
    count = ids.shape[-1]
    following = np.append(start[1:], is_first.size)
    draws = np.minimum(following, (start // count + 1) * count) - start
    return RowsOfSamples(
        ids=ids[is_first].astype(np.uint16 if vocab_size <= 2**16 else np.uint32),
        values=draws.astype(np.uint8) if kind == "draws" else values[is_first],
        num_tokens=is_first.sum(-1).astype(np.uint8),
        label_log_prob=np.where(is_prediction, label_log_prob, 0).astype(np.float32),
        entropy=np.where(is_prediction, entropy, 0).astype(np.float32),
    )
