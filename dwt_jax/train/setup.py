"""Resolve a config to a run, i.e. to everything that is fixed before the first step."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_backend

from dwt_jax import __version__
from dwt_jax.config import Config, Init, Precision
from dwt_jax.config_checks import check
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.data.batch_ramp import rows_per_step, steps_for_rows
from dwt_jax.data.data_cache import get_prepared, recorded_config
from dwt_jax.data.dataset import PackedDataset, get_batch, open_dataset, rows_per_epoch
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json, read_json, user_path
from dwt_jax.logs import logger
from dwt_jax.model_files import describe_missing_path
from dwt_jax.models.common.attention_backends import choose_backend
from dwt_jax.models.common.matmul import AttentionBackend, Policy
from dwt_jax.objectives import objective_module, schedules
from dwt_jax.objectives.targets import row_keys
from dwt_jax.runs.metric_writer import wandb_problem
from dwt_jax.runs.run_dir import init_run_dir, read_run_config, read_run_record, wait_for_file
from dwt_jax.runs.state import STATE_FORMAT
from dwt_jax.runs.teacher import LoadedTeacher, load_teacher
from dwt_jax.runs.teacher_cache import CachedTeacher, open_cached_teacher, reject_cache_of_another_run
from dwt_jax.runtime_env import cpu_has_bf16_products, precision_environment
from dwt_jax.train.accounting import flops_by_step
from dwt_jax.train.initialize import GrowthSource, load_growth_source
from dwt_jax.train.more_steps import LENGTH_KEYS, describe_more_steps
from dwt_jax.train.run_context import ResolvedConfig, RunContext
from dwt_jax.train.step import make_step_config
from dwt_jax.train.step_schedules import schedule_table

_PATH_KEYS = ("data.path", "data.sources", "data.tokenizer", "teacher.path", "teacher.cache", "init.from")


def setup_run(
    config: Config,
    workdir: Path,
    load_source: Callable[..., GrowthSource | None] = load_growth_source,
) -> RunContext:
    """Resolve a config, load the data and models that it names, and initialise the work directory.

    With several processes, all of them compare the config before any work, and the digests of data and
    models before anything is written. Only process 0 prepares data and initialises the directory.

    Args:
        config: as the user wrote it.
        workdir: of the run.
        load_source: (resolved config, vocabulary, workdir) → the source that the student is grown from.

    Raises:
        UserError: the config, or data or a model that it names, is invalid in any of the processes.
    """
    coordination.assert_equal_across_processes(_comparable_config(config))
    config = coordination.run_on_all(lambda: check_environment(config, workdir))
    data = _prepare_data(config)
    run, identity = coordination.run_on_all(lambda: build_run(config, workdir, data, load_source))
    coordination.assert_equal_across_processes(identity)

    def claim() -> None:
        more_steps = describe_more_steps(run)
        changed_keys = LENGTH_KEYS if more_steps else ()
        init_run_dir(workdir, run.config, data / "tokenizer", identity, changed_keys=changed_keys)
        if more_steps:
            logger.info(more_steps)

    coordination.run_on_main(claim)
    coordination.run_on_all(lambda: wait_for_file(workdir / "config.json"))
    return run


def _comparable_config(config: Config) -> dict[str, Any]:
    """The config that must be equal on all processes. Paths may differ: digests compare their contents."""
    config_values = {
        key: x for key, x in flatten_dict(config_to_dict(config)).items() if not key.startswith(_PATH_KEYS)
    }
    return {"versions of dwt-jax and jax": [__version__, jax.__version__], **config_values}


def check_environment(config: Config, workdir: Path) -> Config:
    """Return the config, with the `init` of an existing run, if this machine can run it.

    Raises:
        UserError: a directory, device or package that the config needs is missing.
    """
    is_resume = (workdir / "config.json").exists()
    if read_intact_json(workdir / "config.json") is not None:
        config = _inherit_growth_config(config, read_run_config(workdir).init)
    elif is_resume and (workdir / "init.json").exists() and not config.init.method:
        raise UserError(
            f"{workdir / 'config.json'}: damaged, expected the config of a run that was grown: give its "
            "`init` with --config.init.method and the like, see init.json"
        )
    backend = jax.default_backend()
    if config.platform not in ("any", backend):
        raise UserError(f"config: platform is {config.platform!r}, but JAX found {backend!r}")
    source_path = "" if config.init.step else config.init.from_  # a grown run has a record instead
    teacher_paths = [(config.teacher.path_key, path) for path in config.teacher.model_paths]
    for key, path in (*teacher_paths, ("init.from", source_path)):
        # Checked before a corpus is prepared.
        if path and not is_resume and not user_path(path).is_dir():
            raise UserError(
                f"config: {key}: {describe_missing_path(path)}, expected a model or run directory"
            )
    if (cache := config.teacher.cache) and not user_path(cache).is_dir():
        raise UserError(f"config: teacher.cache: {cache} is no directory, expected one that dwt cache wrote")
    is_main = coordination.process_index() == 0
    if config.train.wandb_project and is_main and (missing := wandb_problem()):
        raise UserError(f"config: train.wandb_project is {config.train.wandb_project!r}, expected {missing}")
    return config


def _prepare_data(config: Config) -> Path:
    """Process 0 prepares the data if needed. The others read the shared cache or prepare a copy."""
    data_path = coordination.run_on_main(
        lambda: str(get_prepared(config.data)), "process 0 to have the data prepared"
    )
    if coordination.process_index() == 0:
        return coordination.run_on_all(lambda: Path(data_path))
    return coordination.run_on_all(lambda: get_prepared(config.data))


def build_run(
    config: Config, workdir: Path, data: Path, load_source: Callable[..., GrowthSource | None]
) -> tuple[RunContext, dict[str, Any]]:
    """Load what a config names. Writes nothing.

    Args:
        config: as the user wrote it.
        workdir: of the run; may be new.
        data: directory of its rows.
        load_source: as for `setup_run`.

    Returns:
        (the run, digests of what its config names).

    Raises:
        UserError: anything is wrong with the config or what it names.
    """
    config = dataclasses.replace(config, data=recorded_config(config.data, data))
    vocab = load_vocabulary(data / "tokenizer")
    rows = open_dataset(data, "train", [source.weight for source in config.data.sources])
    config = resolve_config(config, vocab, rows)
    mesh = make_mesh(config.mesh, config.train.batch_size // config.train.gradient_accumulation_steps)
    # With the sizes that -1 stands for: the devices must divide the stages of a batch ramp too.
    check(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh.shape)))
    record = read_run_record(workdir, config)
    policy = _run_precision(config, record)
    teacher = _load_teacher(config, vocab, policy.compute_dtype)
    policy = policy._replace(attention=_run_attention(config, teacher, policy.compute_dtype, record))
    growth = load_source(config, vocab, workdir)
    identity = {
        "state_format": STATE_FORMAT,
        "data_digest": read_json(data / "index.json")["digest"],
        "teacher_digest": teacher.digest if teacher else "",
        **({"init_digest": growth.source.digest} if growth else {}),
        **numeric_identity(policy, record),
    }
    run_schedules = schedule_table(config)
    objective = objective_module(config.model.objective).make_objective(config, vocab)
    step_config = make_step_config(config, teacher.config if teacher else None, objective, policy)
    batch_sizes = rows_per_step(config.train)
    student_flops, teacher_flops = flops_by_step(step_config, config.data.sequence_length, batch_sizes)
    run = RunContext(
        config=config,
        workdir=workdir,
        data=data,
        rows=rows,
        mesh=mesh,
        policy=policy,
        teacher=teacher,
        growth=growth,
        no_teacher_config=make_step_config(config, None, objective, policy),
        step_config=step_config,
        schedules=run_schedules,
        batch_sizes=batch_sizes,
        teacher_end_step=schedules.zero_from(np.asarray(run_schedules.alpha_soft)) if teacher else 0,
        student_flops=student_flops,
        teacher_flops=teacher_flops,
    )
    if isinstance(teacher, CachedTeacher):
        identity["teacher_cache_digest"] = teacher.cache_digest
        expected = cache_identity(run, identity["data_digest"])
        reject_cache_of_another_run(teacher, expected, run.teacher_end_step)
    return run, identity


def _load_teacher(
    config: Config, vocab: Vocabulary, compute_dtype: jnp.dtype
) -> LoadedTeacher | CachedTeacher | None:
    """Load the teacher that a config names, or open its cache; None if it names none."""
    dtype = compute_dtype if config.teacher.dtype == "auto" else jnp.dtype(config.teacher.dtype)
    teacher = load_teacher(config, vocab, dtype) if config.teacher.model_paths else None
    return open_cached_teacher(config.teacher.cache, teacher) if config.teacher.cache else teacher


def cache_identity(run: RunContext, data_digest: str) -> dict[str, Any]:
    """Return what a cache and a run that uses it must have in common, as JSON represents it.

    Args:
        run: the run; its teacher does not matter.
        data_digest: of its rows.
    """
    config, masks = run.config, {}
    if config.model.objective == "mlm":
        masks = dataclasses.asdict(config.mlm)
        if config.mlm.probability.kind != "constant":  # a function of the share of the run
            masks["train.steps"] = config.train.steps
    identity = {
        "data": data_digest,
        "source_weights": [source.weight for source in config.data.sources],
        "seed": config.seed,
        "objective": config.model.objective,
        "mlm": masks,
        "batch_sizes": run.batch_sizes.tolist(),
        "first_targets": _digest_first_targets(run),
    }
    return json.loads(json.dumps(identity))


def _digest_first_targets(run: RunContext) -> str:
    """Return a hash of the first step's positions and labels: another version may draw other masks."""
    rows, objective = int(run.batch_sizes[0]), run.step_config.objective
    make_targets = functools.partial(objective_module(objective).make_targets, objective=objective)
    batch = get_batch(run.rows, run.config.seed, 0, rows)
    keys = row_keys(run.config.seed, 0, jnp.arange(rows))
    targets = jax.jit(make_targets)(batch, keys, num_predictions=run.schedules[0].num_predictions)
    arrays = jax.tree.leaves((targets.positions, targets.labels, targets.weights))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()[:16]


def _inherit_growth_config(config: Config, saved_init: Init) -> Config:
    """Fill `init` from the existing run if it was created by `dwt remap-run`.

    Values given in the config take precedence and must match.
    """
    if not saved_init.step:
        return config
    overrides = {f.name: getattr(config.init, f.name) for f in dataclasses.fields(Init)}
    overrides = {key: value for key, value in overrides.items() if value != getattr(Init, key)}
    return dataclasses.replace(config, init=dataclasses.replace(saved_init, **overrides))


def resolve_config(config: Config, vocab: Vocabulary, rows: PackedDataset) -> ResolvedConfig:
    """Set the values that depend on the data: vocabulary size, padding id, and steps from epochs.

    Raises:
        UserError: model.vocab_size is not the tokenizer's, or the resolved values fail a check.
    """
    model, train = config.model, config.train
    if model.vocab_size not in (0, len(vocab.tokens)):
        raise UserError(
            f"config: model.vocab_size is {model.vocab_size}, expected the tokenizer's "
            f"{len(vocab.tokens)} (or 0)"
        )
    model = dataclasses.replace(model, vocab_size=len(vocab.tokens), pad_token_id=vocab.pad_id)
    if not train.steps:
        train = dataclasses.replace(train, steps=steps_for_rows(train, train.epochs * rows_per_epoch(rows)))
    resolved = check(dataclasses.replace(config, model=model, train=train))
    return ResolvedConfig(**{f.name: getattr(resolved, f.name) for f in dataclasses.fields(Config)})


def _run_precision(config: Config, record: Mapping[str, Any] | None) -> Policy:
    """Return the dtypes of a run.

    A resumed run keeps its initial dtype, independent of what `auto` means on this machine. Records of
    earlier versions have no dtype: there `auto` was fp32 on every CPU.

    Args:
        config: of the run.
        record: its run.json; None for a new run.
    """
    if record is None or config.precision.compute_dtype != "auto":
        return resolve_precision(config)
    before = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    precision = Precision(record.get("compute_dtype", before))
    return resolve_precision(dataclasses.replace(config, precision=precision))


def _run_attention(
    config: Config,
    teacher: LoadedTeacher | CachedTeacher | None,
    dtype: jnp.dtype,
    record: Mapping[str, Any] | None,
) -> AttentionBackend:
    """Return the back end of attention. A resumed run keeps its own; older ones have `reference`."""
    setting, key = config.precision.attention, "config: precision.attention"
    if record is not None and setting == "auto":
        setting, key = record.get("attention", "reference"), "run.json: attention"
    models = [config.model, *(teacher.config.models if isinstance(teacher, LoadedTeacher) else ())]
    platform = jax.default_backend()
    if platform == "gpu":
        platform = "cuda" if "cuda" in get_backend().platform_version else "rocm"
    return choose_backend(setting, models, dtype, platform, config.data.sequence_length, key)


def numeric_identity(policy: Policy, record: Mapping[str, Any] | None) -> dict[str, str]:
    """Return other settings that affect the numbers, by key in run.json, without keys of newer versions."""
    numerics = {
        "compute_dtype": str(policy.compute_dtype),
        "attention": policy.attention,
        "precision_environment": precision_environment(),
    }
    return {key: value for key, value in numerics.items() if record is None or key in record}


def resolve_precision(config: Config) -> Policy:
    """Return the dtypes of a run on this machine.

    `auto` is bf16, but fp32 on CPUs without instructions for it, and where jax_default_matmul_precision is
    "float32" or "highest". On CPU only the operands of products are bf16: XLA's other kernels are slower
    in bf16 than in fp32.
    """
    cpu = jax.default_backend() == "cpu"
    compute = config.precision.compute_dtype
    if compute == "auto":
        is_slow = cpu and not cpu_has_bf16_products()
        default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        is_exact = default in ("float32", "highest")
        compute = "float32" if is_slow or is_exact else "bfloat16"
    single_cpu = cpu and jax.device_count() == 1
    return Policy(jnp.dtype(compute), jnp.dtype("float32" if cpu else compute), single_cpu)
