"""Resolve a config into a run: everything that is fixed before the first step."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax import __version__
from dwt_jax.config import Config, Init, check
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.data_cache import get_prepared, recorded_config
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import make_mesh, replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.models import family, flops
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.objectives import objective_module, schedules
from dwt_jax.remap.gates import gate_schedule, has_gates, open_gates
from dwt_jax.runs import run_dir as workdirs
from dwt_jax.runs import teacher as teachers
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.pretrained import PretrainedModel
from dwt_jax.runs.state import STATE_FORMAT, TrainState, abstract_state, init_train_state
from dwt_jax.train import initialize as starts
from dwt_jax.train.ligo_training import LigoConfig, train_ligo_maps
from dwt_jax.train.step import StepConfig, make_step_config
from dwt_jax.train.step_schedules import StepSchedules, schedule_table

_PATH_KEYS = ("data.path", "data.sources", "data.tokenizer", "teacher.path", "init.from")


class ResolvedConfig(Config):
    """A config whose vocabulary size, padding id, data and number of steps are set.

    `Config` is what the user wrote. `resolve_config` is the only place that makes one of these.
    """


@dataclass(frozen=True)
class RunContext:
    """What stays the same from the first step to the last: the resolved config and what it names."""

    config: ResolvedConfig
    workdir: Path
    data: Path
    rows: data_rows.PackedDataset
    mesh: jax.sharding.Mesh
    policy: Policy
    teacher: PretrainedModel | None
    growth: starts.GrowthSource | None  # what the student is grown from; None: random initialisation
    no_teacher_config: StepConfig  # of the step without the teacher
    step_config: StepConfig  # of the step with it, if there is one
    schedules: StepSchedules  # of all steps, float32 [steps]
    teacher_end_step: int  # the first step from which α_s is 0, according to the schedule
    student_flops: float  # per step
    teacher_flops: float  # per step


def setup_run(
    config: Config,
    workdir: Path,
    load_source: Callable[..., starts.GrowthSource | None] = starts.load_growth_source,
) -> RunContext:
    """Resolve a config, load what it names and claim the work directory.

    What several processes must agree on is agreed here: the config before anything is done, the digests
    of what it names before anything is written. Process 0 alone prepares data and claims the directory.

    Args:
        config: as the user wrote it.
        workdir: of the run.
        load_source: (resolved config, vocabulary, workdir) → what the student is grown from.

    Raises:
        UserError: anything is wrong with the config or what it names, in any of the processes.
    """
    coordination.assert_equal_across_processes(_comparable_config(config))
    config = coordination.run_on_all(lambda: _check_environment(config, workdir))
    data = _prepare_data(config)
    run, identity = coordination.run_on_all(lambda: _build_run(config, workdir, data, load_source))
    coordination.assert_equal_across_processes(identity)
    coordination.run_on_main(lambda: workdirs.init_run_dir(workdir, run.config, data / "tokenizer", identity))
    coordination.run_on_all(lambda: workdirs.wait_for_file(workdir / "config.json"))
    return run


def _comparable_config(config: Config) -> dict[str, Any]:
    """What all processes must agree on. Paths may differ: their contents are compared by digests."""
    config_values = {
        key: x for key, x in flatten_dict(config_to_dict(config)).items() if not key.startswith(_PATH_KEYS)
    }
    return {"versions of dwt-jax and jax": [__version__, jax.__version__], **config_values}


def _check_environment(config: Config, workdir: Path) -> Config:
    """The config, with the `init` of an existing run, if this machine can run it."""
    is_resume = (workdir / "config.json").exists()
    if is_resume:
        config = _inherit_growth_config(config, workdirs.read_run_config(workdir).init)
    try:
        backend = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS asks for what is not there
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config: platform is {config.platform!r}, but JAX found none: {reason}") from None
    if config.platform not in ("any", backend):
        raise UserError(f"config: platform is {config.platform!r}, but JAX found {backend!r}")
    source_path = "" if config.init.step else config.init.from_  # a grown run has a record instead
    for key, path in (("teacher.path", config.teacher.path), ("init.from", source_path)):
        # Checked before a corpus is prepared.
        if path and not is_resume and not Path(path).expanduser().is_dir():
            raise UserError(f"config: {key}: {path}: no such directory, expected a model or run directory")
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config: train.wandb_project is {config.train.wandb_project!r}, "
            "expected the package wandb installed"
        )
    return config


def _prepare_data(config: Config) -> Path:
    """Process 0 prepares the data if needed. The others read the shared cache or prepare a copy."""
    data_path = coordination.run_on_main(
        lambda: str(get_prepared(config.data)), "process 0 to have the data prepared"
    )
    if coordination.process_index() == 0:
        return coordination.run_on_all(lambda: Path(data_path))
    return coordination.run_on_all(lambda: get_prepared(config.data, log=coordination.log_on_main))


def _build_run(
    config: Config, workdir: Path, data: Path, load_source: Callable[..., starts.GrowthSource | None]
) -> tuple[RunContext, dict[str, Any]]:
    """The run, and digests of what its config names."""
    config = dataclasses.replace(config, data=recorded_config(config.data, data))
    vocab = load_vocabulary(data / "tokenizer")
    rows = data_rows.open_dataset(data, "train", [source.weight for source in config.data.sources])
    config = resolve_config(config, vocab, rows)
    mesh = make_mesh(config.mesh, config.train.batch_size // config.train.gradient_accumulation_steps)
    policy = resolve_precision(config)
    teacher = None
    if config.teacher.path:
        dtype = policy.compute_dtype if config.teacher.dtype == "auto" else jnp.dtype(config.teacher.dtype)
        teacher = teachers.load_teacher(config.teacher.path, vocab, config.data.sequence_length, dtype)
    growth = load_source(config, vocab, workdir)
    identity = {
        "state_format": STATE_FORMAT,
        "data_digest": read_json(data / "index.json")["digest"],
        "teacher_digest": teacher.digest if teacher else "",
        **({"init_digest": growth.source.digest} if growth else {}),
    }
    run_schedules = schedule_table(config)
    objective = objective_module(family(config.model).OBJECTIVE).make_objective(config, vocab)
    predictions = objective_module(objective).predictions_per_row(objective, config.data.sequence_length)
    shape = (config.train.batch_size, config.data.sequence_length, predictions)
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
        step_config=make_step_config(config, teacher.model if teacher else None, objective, policy),
        schedules=run_schedules,
        teacher_end_step=schedules.first_all_zero(np.asarray(run_schedules.alpha_soft)) if teacher else 0,
        student_flops=flops.training_step_flops(config.model, *shape),
        teacher_flops=flops.forward_flops(teacher.model, *shape) if teacher else 0.0,
    )
    return run, identity


def _inherit_growth_config(config: Config, saved_init: Init) -> Config:
    """Fill `init` from the existing run if it was created by `dwt remap-run`.

    Values given in the config take precedence and must match.
    """
    if not saved_init.step:
        return config
    overrides = {f.name: getattr(config.init, f.name) for f in dataclasses.fields(Init)}
    overrides = {key: value for key, value in overrides.items() if value != getattr(Init, key)}
    return dataclasses.replace(config, init=dataclasses.replace(saved_init, **overrides))


def resolve_config(config: Config, vocab: Vocabulary, rows: data_rows.PackedDataset) -> ResolvedConfig:
    """Set what depends on the data: vocabulary size, padding id, and steps from epochs.

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
        epoch = data_rows.rows_per_epoch(rows)
        train = dataclasses.replace(train, steps=max(1, math.ceil(train.epochs * epoch / train.batch_size)))
    resolved = check(dataclasses.replace(config, model=model, train=train))
    return ResolvedConfig(**{f.name: getattr(resolved, f.name) for f in dataclasses.fields(Config)})


def resolve_precision(config: Config) -> Policy:
    """Return the dtypes of a run on this machine.

    `auto` is bf16 except on CPU. On CPU only the operands of products are bf16: XLA's other kernels are
    slower in bf16 than in fp32.
    """
    cpu = jax.default_backend() == "cpu"
    compute = config.precision.compute_dtype
    if compute == "auto":
        compute = "float32" if cpu else "bfloat16"
    single_cpu = cpu and jax.device_count() == 1
    return Policy(jnp.dtype(compute), jnp.dtype("float32" if cpu else compute), single_cpu)


def init_run_state(run: RunContext, layout: Any) -> TrainState:
    """Return the state before the first step, sharded by `layout`."""
    model, optimizer = run.config.model, run.config.optimizer
    if run.growth is not None:
        if run.growth.step:
            raise UserError(
                f"{run.workdir}: no checkpoint, expected that of step {run.growth.step} that dwt remap-run "
                "wrote: run dwt remap-run again, with a new --out"
            )
        params = (
            _init_with_ligo(run) if run.growth.uses_ligo else starts.init_from_source(run.growth, run.mesh)
        )
        return jax.jit(lambda params: init_train_state(params, model, optimizer), out_shardings=layout)(
            params
        )

    def new() -> TrainState:
        return init_train_state(
            family(model).init_params(model, jax.random.key(run.config.seed)), model, optimizer
        )

    return jax.jit(new, out_shardings=layout)()


def _init_with_ligo(run: RunContext) -> Any:
    """Parameters grown by a learned operator, which is recorded in init.json."""
    teacher_params = teachers.shard_params(run.teacher, run.mesh) if run.teacher else None
    assert run.growth is not None
    params, record = train_ligo_maps(
        run.growth.source.params,
        run.growth.source.model,
        run.step_config,
        jax.random.key(run.config.seed),
        run.rows,
        data_rows.open_dataset(run.data, "held_out"),
        batch_size=run.config.train.batch_size,
        schedules=run.schedules,
        mesh=run.mesh,
        seed=run.config.seed,
        teacher_params=teacher_params,
        settings=LigoConfig(steps=run.config.init.learning_steps),
        options=run.config.init,
    )
    path = run.workdir / "init.json"
    coordination.run_on_main(lambda: write_json(path, {"learned": dataclasses.asdict(record)}))
    return params


def sharded_abstract_state(run: RunContext) -> TrainState:
    """Return shapes, dtypes and shardings of the state."""
    abstract = abstract_state(run.config.model, run.config.optimizer)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        infer_shardings(abstract, run.config.model, run.mesh),
    )


def init_or_restore_state(run: RunContext, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """Return the initial or the restored state, on the mesh, and its number of completed steps."""
    target = sharded_abstract_state(run)
    layout = jax.tree.map(lambda x: x.sharding, target)
    state_and_step = checkpoints.restore(target, coordination.log_on_main)
    if state_and_step is None:
        return init_run_state(run, layout), 0
    state, step = state_and_step
    # A copy by jit: buffers made by XLA can be donated, those made by Orbax perhaps not.
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=layout)(state), step


def effective_params(run: RunContext, params: Any, step: int) -> Any:
    """Return the parameters that the model computes with after `step` steps: with its gates applied."""
    if not has_gates(run.config.model):
        return params
    init = run.config.init
    gate_value = gate_schedule(step, run.config.train.steps, init.gate_warmup, init.step)
    device_gate = to_global(gate_value, replicated_sharding(run.mesh))
    return jax.jit(open_gates, out_shardings=infer_shardings(params, run.config.model, run.mesh))(
        params, device_gate
    )
