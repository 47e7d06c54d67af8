"""Check the values of a `Config`, alone and in combination. This module does not import jax."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import fields

from dwt_jax.config import Config, Data, Init, Optimizer, Schedule, Teacher, Train
from dwt_jax.errors import UserError
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
    for problem in _data_problems(data):
        raise UserError(f"config: {problem}")
    return data


def _problems(config: Config) -> Iterator[str]:
    """Yield one line for each problem, in the order of the sections."""
    if not 0 <= config.seed < 2**32:
        yield f"seed is {config.seed}, expected at least 0 and less than 2**32"
    for problem in config.model.problems():
        yield f"model.{problem}"
    yield from _check_minimum(config.model, "model", 0, "pad_token_id")  # -1 is for models that are read
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


def _check_minimum(group: object, prefix: str, minimum: float, *keys: str) -> Iterator[str]:
    for key in keys:
        if getattr(group, key) < minimum:
            yield f"{prefix}.{key} is {getattr(group, key)}, expected at least {minimum}"


def _check_fraction(group: object, prefix: str, *keys: str) -> Iterator[str]:
    for key in keys:
        if not 0 <= getattr(group, key) <= 1:
            yield f"{prefix}.{key} is {getattr(group, key)}, expected a share from 0 to 1"


def _data_problems(data: Data) -> Iterator[str]:
    yield from _check_minimum(data, "data", 8, "sequence_length")
    yield from _check_minimum(data, "data", 1, "sentence_stride", "prefetch")
    if not 0 < data.validation_fraction < 1:
        yield f"data.validation_fraction is {data.validation_fraction}, expected a share above 0 and below 1"
    yield from _check_fraction(data, "data", "max_lost_share")
    if not data.sources:
        yield "data.sources is empty, expected at least one source"
    for i, source in enumerate(data.sources):
        if source.kind != "builtin" and not source.path:
            yield f"data.sources.{i}.path is empty, expected a path for kind '{source.kind}'"
        if source.weight <= 0:
            yield f"data.sources.{i}.weight is {source.weight}, expected more than 0"
        yield from _check_minimum(source, f"data.sources.{i}", 1, "blank_lines")
    if not data.tokenizer.path:
        yield from _check_minimum(data.tokenizer, "data.tokenizer", 100, "vocab_size")
        yield from _check_minimum(data.tokenizer, "data.tokenizer", 0, "alphabet_size")
    if data.tokenizer.sample_megabytes <= 0:
        yield f"data.tokenizer.sample_megabytes is {data.tokenizer.sample_megabytes}, expected more than 0"


def _mlm_problems(config: Config) -> Iterator[str]:
    data, mlm = config.data, config.mlm
    yield from _schedule_problems(mlm.probability, "mlm.probability")
    prefix = f"mlm.probability {'is' if mlm.probability.kind == 'constant' else 'goes to'}"
    for probability in mlm.probability.stage_values():
        if not 0 < probability < 1:
            yield f"{prefix} {probability}, expected a share above 0 and below 1"
        if round(probability * data.sequence_length) < 1:
            yield f"{prefix} {probability}, expected at least one prediction in {data.sequence_length} tokens"
    yield from _check_fraction(mlm, "mlm", "mask_token_share", "random_token_share")
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
        yield f"init.{key.rstrip('_')} is set, expected init.method to say how (it is empty)"
    yield from _check_minimum(init, "init", 0, "noise", "step")
    yield from _check_minimum(init, "init", 1, "learning_steps")
    yield from _check_fraction(init, "init", "gate_warmup", "new_param_warmup")
    if init.step and config.train.steps and init.step >= config.train.steps:
        yield f"init.step is {init.step}, expected less than train.steps ({config.train.steps})"


def _schedule_problems(schedule: Schedule, name: str) -> Iterator[str]:
    if schedule.kind == "until_matched" and name != "distill.alpha_soft":
        yield f"{name}.kind is 'until_matched', expected that for distill.alpha_soft only"
    yield from _check_minimum(schedule, name, 0, "value", "end")
    yield from _check_fraction(schedule, name, "warmup_fraction", "decay_start", "decay_end")
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
        yield f"{name}.end or decay_start is set, expected neither beside boundaries"
    is_increasing = all(a < b for a, b in itertools.pairwise((0, *boundaries, 1)))
    if boundaries and not is_increasing:
        yield f"{name}.boundaries is {list(boundaries)}, expected increasing shares above 0 and below 1"
    if min(values, default=0) < 0:
        yield f"{name}.boundary_values is {list(values)}, expected at least 0"


TEACHER_WEIGHTS = (1e-30, 1e30)
"""Smallest and largest weight of a teacher: no sum of them overflows, and no share of it is rounded to 0."""


def _teacher_problems(teacher: Teacher) -> Iterator[str]:
    if teacher.path and teacher.paths:
        yield f"teacher.paths is {list(teacher.paths)}, expected teacher.path to be empty beside it"
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
    if distill.preset != "custom" and not config.teacher.model_paths:
        yield f"distill.preset is {distill.preset!r}, expected teacher.path to name a teacher (it is empty)"
    hard = distill.alpha_hard
    if not config.teacher.model_paths and distill.alpha_soft != Schedule():
        yield "distill.alpha_soft is set, expected teacher.path to name a teacher (it is empty)"
    nonzero_weight = "a non-zero loss weight at the end of training"
    if hard.stage_values()[-1] == 0:
        if not config.teacher.model_paths and hard.value == 0:
            yield f"distill.alpha_hard is 0 and teacher.path is empty, expected {nonzero_weight}"
        soft = distill.alpha_soft
        if soft.stage_values()[-1] == 0 or soft.kind == "until_matched":
            yield f"distill.alpha_hard and distill.alpha_soft both end at 0, expected {nonzero_weight}"
    for key in ("alpha_hard", "alpha_soft", "temperature"):
        yield from _schedule_problems(getattr(distill, key), f"distill.{key}")
    if (lowest := min(distill.temperature.stage_values())) <= 0:
        yield f"distill.temperature goes down to {lowest}, expected more than 0"
    yield from _check_fraction(distill, "distill", "drop_fraction")
    yield from _check_minimum(distill, "distill", 0, "loss_chunk_rows")
    if distill.match_margin <= 0:
        yield f"distill.match_margin is {distill.match_margin}, expected more than 0"
    if not 0 <= distill.gap_ema_decay < 1:
        yield f"distill.gap_ema_decay is {distill.gap_ema_decay}, expected at least 0 and less than 1"


def optimizer_problems(optimizer: Optimizer, name: str) -> Iterator[str]:
    """Yield one line for each problem of an optimizer.

    Args:
        optimizer: the section to check.
        name: its dotted key, with which each line begins.
    """
    yield from _schedule_problems(optimizer.learning_rate, f"{name}.learning_rate")
    yield from _check_minimum(optimizer, name, 0, "weight_decay", "clip_norm", "adam_lr_ratio")
    yield from _check_minimum(optimizer, name, 1, "ns_steps")
    if optimizer.eps < 1e-30:  # else 0/0 where a gradient is 0: embeddings of tokens that never occur
        yield f"{name}.eps is {optimizer.eps}, expected more than 0 (at least 1e-30: it is in float32)"
    for key in ("b1", "b2", "momentum"):
        if not 0 <= getattr(optimizer, key) <= 1 - 2**-24:
            yield f"{name}.{key} is {getattr(optimizer, key)}, expected at least 0 and, as a float32, below 1"


def _training_problems(config: Config) -> Iterator[str]:
    train = config.train
    yield from _check_minimum(train, "train", 0, "steps", "epochs", "eval_every", "watchdog")
    if not train.steps and not train.epochs:
        yield "train.steps is 0, expected at least 1 (or train.epochs above 0)"
    if train.steps > MAX_STEPS:
        yield f"train.steps is {train.steps}, expected at most {MAX_STEPS:,}"
    yield from _check_minimum(
        train,
        "train",
        1,
        "batch_size",
        "gradient_accumulation_steps",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "max_consecutive_nonfinite",
    )
    scheme = re.match(r"[a-z0-9]{2,}:/", train.checkpoint_path)
    if scheme and scheme[0] != "gs:/":
        yield f"train.checkpoint_path begins with {scheme[0]}, expected a directory or gs://…"
    elif train.checkpoint_path and not train.checkpoint_path.startswith(("/", "~", "gs://")):
        yield f"train.checkpoint_path is {train.checkpoint_path!r}, expected a whole path, from / or ~ on"
    yield from optimizer_problems(config.optimizer, "optimizer")
    yield from _learning_rate_problems(config.optimizer)
    yield from _batch_problems(config)


def _learning_rate_problems(optimizer: Optimizer) -> Iterator[str]:
    """The step relies on updates that cannot overflow."""
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
