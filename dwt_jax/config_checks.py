"""Check the values of a `Config`, alone (`limits.py`) and in combination. Does not import jax."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields

from dwt_jax.config import Config, Data, Init, Optimizer, Schedule, Teacher, Train
from dwt_jax.errors import UserError
from dwt_jax.limits import limit_problems
from dwt_jax.remap.methods import get_method


def check(config: Config) -> Config:
    """Return `config` if its values are valid, alone and in combination.

    Raises:
        UserError: the first problem, with the key, its value and what was expected.
    """
    for problem in _problems(config):
        raise UserError(f"config: {problem}")
    return config


def check_data(data: Data) -> Data:
    """Return `data` if its values are valid.

    Raises:
        UserError: the first problem, as for `check`.
    """
    for problem in (*limit_problems(data, "data"), *_data_problems(data)):
        raise UserError(f"config: {problem}")
    return data


def _problems(config: Config) -> Iterator[str]:
    """Yield one line for each problem, in the order of the sections."""
    yield from limit_problems(config, "")
    for problem in config.model.problems():
        yield f"model.{problem}"
    if config.model.pad_token_id < 0:  # -1 is for models that are read
        yield f"model.pad_token_id is {config.model.pad_token_id}, expected at least 0"
    if config.model.initializer_range == 0:
        yield "model.initializer_range is 0, expected more than 0"
    if config.data.sequence_length > config.model.max_length:
        yield (
            f"data.sequence_length is {config.data.sequence_length}, expected at most the model's "
            f"{config.model.max_length} positions (model.max_position_embeddings)"
        )
    yield from _data_problems(config.data)
    if config.model.objective == "mlm":
        yield from _mlm_problems(config)
    yield from _init_problems(config)
    yield from _teacher_problems(config.teacher)
    yield from _objective_problems(config)
    yield from _training_problems(config)


MAX_STEPS = 10**8
"""Largest number of steps: every schedule is an array with the values of all steps."""


def _data_problems(data: Data) -> Iterator[str]:
    if not data.sources:
        yield "data.sources is empty, expected at least one source"
    for i, source in enumerate(data.sources):
        if source.kind != "builtin" and not source.path:
            yield f"data.sources.{i}.path is empty, expected a path for kind '{source.kind}'"
    if not data.tokenizer.path:
        for key, minimum in (("vocab_size", 100), ("alphabet_size", 0)):
            if (value := getattr(data.tokenizer, key)) < minimum:
                yield f"data.tokenizer.{key} is {value}, expected at least {minimum}"


def _mlm_problems(config: Config) -> Iterator[str]:
    data, mlm = config.data, config.mlm
    yield from _schedule_problems(mlm.probability, "mlm.probability")
    prefix = f"mlm.probability {'is' if mlm.probability.kind == 'constant' else 'goes to'}"
    for probability in mlm.probability.stage_values():
        if not 0 < probability < 1:
            yield f"{prefix} {probability}, expected a share above 0 and below 1"
        if round(probability * data.sequence_length) < 1:
            yield f"{prefix} {probability}, expected at least one prediction in {data.sequence_length} tokens"
    if mlm.mask_token_share + mlm.random_token_share > 1 + 1e-9:
        total = mlm.mask_token_share + mlm.random_token_share
        yield f"mlm.mask_token_share + mlm.random_token_share is {total}, expected at most 1"


def _init_problems(config: Config) -> Iterator[str]:
    init = config.init
    if init.method:
        try:
            get_method(init.method)
        except UserError as error:
            yield f"init.{error}"
        if init.method.endswith("+ligo"):
            yield f"init.method is {init.method!r}, expected 'ligo': it learns the depth map too"
        if init.method == "ligo" and init.step:
            yield "init.method is 'ligo', expected another: LiGO cannot grow a run at init.step"
        if not (init.from_ or config.teacher.path):
            yield f"init.method is {init.method!r}, expected init.from or teacher.path to name a model"
    elif init != Init():
        key = next(f.name for f in fields(init) if getattr(init, f.name) != f.default)
        yield f"init.{key.rstrip('_')} is set, expected init.method to name a method (it is empty)"
    if init.step and config.train.steps and init.step >= config.train.steps:
        yield f"init.step is {init.step}, expected less than train.steps ({config.train.steps})"


def _schedule_problems(schedule: Schedule, name: str) -> Iterator[str]:
    if schedule.kind == "until_matched" and name != "distill.alpha_soft":
        yield f"{name}.kind is 'until_matched', expected another kind (it is for distill.alpha_soft only)"
    if schedule.kind in ("linear", "cosine", "warmup_stable_decay"):
        start = max(schedule.decay_start, schedule.warmup_fraction)
        if schedule.decay_end <= start:
            yield (
                f"{name}.decay_end is {schedule.decay_end}, expected more than its decay_start or "
                f"warmup_fraction ({start})"
            )
    if schedule.decay_type != "linear" and schedule.kind != "warmup_stable_decay":
        yield f"{name}.decay_type is {schedule.decay_type!r}, expected kind 'warmup_stable_decay' with it"
    yield from _stage_problems(schedule, name)


def _stage_problems(schedule: Schedule, name: str) -> Iterator[str]:
    """Yield one line for each problem of `boundaries` and `boundary_values`."""
    boundaries, values = schedule.boundaries, schedule.boundary_values
    if len(boundaries) != len(values):
        yield (
            f"{name}.boundary_values has {len(values)} entries, expected as many as {name}.boundaries "
            f"({len(boundaries)})"
        )
    if boundaries and schedule.kind != "piecewise":
        yield f"{name}.kind is {schedule.kind!r}, expected 'piecewise' with boundaries"
    if boundaries and (schedule.end, schedule.decay_start) != (Schedule.end, Schedule.decay_start):
        yield f"{name}.end or decay_start is set, expected neither together with boundaries"
    is_increasing = all(a < b for a, b in itertools.pairwise((0, *boundaries, 1)))
    if boundaries and not is_increasing:
        yield f"{name}.boundaries is {list(boundaries)}, expected increasing shares above 0 and below 1"
    if min(values, default=0) < 0:
        yield f"{name}.boundary_values is {list(values)}, expected at least 0"


TEACHER_WEIGHTS = (1e-30, 1e30)
"""Smallest and largest weight of a teacher: no sum of them overflows, and no share of it is rounded to 0."""


def _teacher_problems(teacher: Teacher) -> Iterator[str]:
    if teacher.path and teacher.paths:
        yield f"teacher.paths is {list(teacher.paths)}, expected only one of teacher.path and teacher.paths"
    if not all(teacher.paths):
        yield f"teacher.paths is {list(teacher.paths)}, expected model or run directories"
    if teacher.weights and len(teacher.weights) != len(teacher.paths):
        yield (
            f"teacher.weights has {len(teacher.weights)} entries, expected as many as teacher.paths "
            f"({len(teacher.paths)})"
        )
    low, high = TEACHER_WEIGHTS
    if not all(low <= weight <= high for weight in teacher.weights):
        yield f"teacher.weights is {list(teacher.weights)}, expected numbers from {low:g} to {high:g}"


def _objective_problems(config: Config) -> Iterator[str]:
    distill = config.distill
    if distill.preset != "custom" and not config.teacher.is_set:
        yield f"distill.preset is {distill.preset!r}, expected teacher.path to name a teacher (it is empty)"
    hard = distill.alpha_hard
    if config.teacher.cache:
        yield from cache_problems(config)
    if not config.teacher.is_set and distill.alpha_soft != Schedule():
        yield "distill.alpha_soft is set, expected teacher.path to name a teacher (it is empty)"
    nonzero_weight = "a non-zero loss weight at the end of training"
    if hard.stage_values()[-1] == 0:
        if not config.teacher.is_set and hard.value == 0:
            yield f"distill.alpha_hard is 0 and teacher.path is empty, expected {nonzero_weight}"
        soft = distill.alpha_soft
        if soft.stage_values()[-1] == 0 or soft.kind == "until_matched":
            yield f"distill.alpha_hard and distill.alpha_soft both end at 0, expected {nonzero_weight}"
    for key in ("alpha_hard", "alpha_soft", "temperature"):
        yield from _schedule_problems(getattr(distill, key), f"distill.{key}")
    if (lowest := min(distill.temperature.stage_values())) <= 0:
        yield f"distill.temperature goes down to {lowest}, expected more than 0"


def cache_problems(config: Config) -> Iterator[str]:
    """Yield one line for each setting that the samples of `teacher.cache` cannot serve."""
    temperature, divergence = config.distill.temperature, config.distill.divergence
    if (temperature.kind, temperature.value, temperature.warmup_fraction) != ("constant", 1.0, 0.0):
        yield "distill.temperature is set, expected 1 with teacher.cache: its answers are at temperature 1"
    if divergence != "forward_kl":
        yield (
            f"distill.divergence is {divergence!r}, expected 'forward_kl' with teacher.cache: the others "
            "need the probabilities of all tokens"
        )
    if config.init.method == "ligo":
        yield "init.method is 'ligo', expected another with teacher.cache: LiGO needs the teacher"


def optimizer_problems(optimizer: Optimizer, name: str) -> Iterator[str]:
    """Yield one line for each problem of an optimizer.

    Args:
        optimizer: the section to check.
        name: its dotted key, with which each line begins.
    """
    yield from _schedule_problems(optimizer.learning_rate, f"{name}.learning_rate")
    if optimizer.eps < 1e-30:  # else 0/0 where a gradient is 0: embeddings of tokens that never occur
        yield f"{name}.eps is {optimizer.eps}, expected more than 0 (at least 1e-30: it is in float32)"
    for key in ("b1", "b2", "momentum"):
        if not 0 <= getattr(optimizer, key) <= 1 - 2**-24:
            yield f"{name}.{key} is {getattr(optimizer, key)}, expected at least 0 and, as a float32, below 1"


def _training_problems(config: Config) -> Iterator[str]:
    train = config.train
    if not train.steps and not train.epochs:
        yield "train.steps is 0, expected at least 1 (or train.epochs above 0)"
    if train.steps > MAX_STEPS:
        yield f"train.steps is {train.steps}, expected at most {MAX_STEPS:,}"
    scheme = re.match(r"[a-z0-9]{2,}:/", train.checkpoint_path)
    if scheme and scheme[0] != "gs:/":
        yield f"train.checkpoint_path begins with {scheme[0]}, expected a directory or gs://…"
    elif train.checkpoint_path and not train.checkpoint_path.startswith(("/", "~", "gs://")):
        yield f"train.checkpoint_path is {train.checkpoint_path!r}, expected an absolute path (from / or ~)"
    yield from optimizer_problems(config.optimizer, "optimizer")
    yield from _learning_rate_problems(config.optimizer)
    yield from _batch_problems(config)


def _learning_rate_problems(optimizer: Optimizer) -> Iterator[str]:
    """Yield one line for each value with which an update may overflow; the step relies on finite updates."""
    rate, key = max(optimizer.learning_rate.stage_values()), "optimizer.learning_rate"
    if optimizer.kind == "muon" and optimizer.adam_lr_ratio > 1:
        rate, key = rate * optimizer.adam_lr_ratio, f"{key} x optimizer.adam_lr_ratio"
    if rate > 1e6:
        yield f"{key} goes up to {rate}, expected at most 1e6"
    elif rate * optimizer.weight_decay > 1:
        yield f"optimizer.weight_decay is {optimizer.weight_decay}, expected at most 1 / {key} ({rate})"


def _batch_problems(config: Config) -> Iterator[str]:
    train, mesh = config.train, config.mesh
    if train.batch_size % train.gradient_accumulation_steps:
        yield (
            f"train.batch_size is {train.batch_size}, expected a multiple of "
            f"train.gradient_accumulation_steps ({train.gradient_accumulation_steps})"
        )
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        yield f"mesh is {sizes}, expected sizes of at least 1, at most one of them -1"
    num_shards = max(mesh.data, 1) * max(mesh.fsdp, 1)
    microbatch_size = train.batch_size // max(train.gradient_accumulation_steps, 1)
    if microbatch_size % num_shards:
        yield (
            f"train.batch_size / train.gradient_accumulation_steps is {microbatch_size}, expected a "
            f"multiple of the mesh's data x fsdp ({num_shards})"
        )
    yield from _batch_ramp_problems(train, num_shards)


def _batch_ramp_problems(train: Train, num_shards: int) -> Iterator[str]:
    ramp, fraction = list(train.batch_ramp), train.batch_ramp_fraction
    if not ramp and fraction:
        yield f"train.batch_ramp_fraction is {fraction}, expected train.batch_ramp with it (it is empty)"
    if ramp and not 0 < fraction <= 1:
        yield (
            f"train.batch_ramp_fraction is {fraction}, expected a share above 0 and at most 1 with "
            f"train.batch_ramp ({ramp})"
        )
    if not all(a < b for a, b in itertools.pairwise((0, *ramp, train.batch_size))):
        yield (
            f"train.batch_ramp is {ramp}, expected increasing numbers of rows above 0 and below "
            f"train.batch_size ({train.batch_size})"
        )
    if any(size % (train.gradient_accumulation_steps * num_shards) for size in ramp):
        yield (
            f"train.batch_ramp is {ramp}, expected multiples of train.gradient_accumulation_steps x the "
            f"mesh's data x fsdp ({train.gradient_accumulation_steps} x {num_shards})"
        )
