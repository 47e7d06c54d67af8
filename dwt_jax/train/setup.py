"""Everything about a run that is settled before its first step."""

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
from dwt_jax.config_loader import flatten, to_dict
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.prepare import as_prepared, prepared
from dwt_jax.data.tokenizer import Vocabulary, vocabulary
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import make_mesh, put, replicated, shardings
from dwt_jax.errors import UserError
from dwt_jax.models import bert, flops
from dwt_jax.models.common.matmul import Numerics
from dwt_jax.objectives import schedules
from dwt_jax.objectives.masking import Tokens, predictions_per_row
from dwt_jax.remap.gates import anneal, has_annealed, share_after
from dwt_jax.runs import run_dir as workdirs
from dwt_jax.runs import teacher as teachers
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.pretrained import Borrowed
from dwt_jax.train import initialize as starts
from dwt_jax.train.ligo_training import Settings, learn
from dwt_jax.train.step import SCHEDULED, Spec, abstract_state, initial_state, knob_table, spec_of

_PATHS = ("data.path", "data.sources", "data.tokenizer", "teacher.path", "init.from")
STATE_FORMAT = 1  # raise it when the tree of the training state changes


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config  # resolved
    workdir: Path
    data: Path
    rows: data_rows.Rows
    mesh: jax.sharding.Mesh
    numerics: Numerics
    teacher: Borrowed | None
    start: starts.Start | None  # what the student is grown from; None: a new model
    alone: Spec  # of the step without the teacher
    spec: Spec  # of the step with it, if there is one
    knobs: np.ndarray  # float32 [steps, columns], see step.scheduled
    teacher_until: int  # the step at which α_s becomes 0 for good, as far as the schedule says
    student_flops: float  # a step
    teacher_flops: float  # a step


def prepare_run(
    config: Config, workdir: Path, start_of: Callable[..., starts.Start | None] = starts.start_of
) -> Run:
    """Everything that can be wrong is found here; the first thing written is the claim.

    start_of: (resolved config, vocabulary, workdir) → what the student is grown from. Of several
    processes the first alone claims and prepares, and a mistake in one ends all.
    """
    coordination.same(_told(config))
    config = coordination.together(lambda: _allowed(config, workdir))
    data = _data(config)
    run, identity = coordination.together(lambda: _settled(config, workdir, data, start_of))
    coordination.same(identity)
    coordination.first(lambda: workdirs.claim(workdir, run.config, data / "tokenizer", identity))
    coordination.together(lambda: workdirs.wait_for(workdir / "config.json"))
    return run


def _told(config: Config) -> dict[str, Any]:
    """What all processes must agree in before anything is done. Paths may differ: what they hold is compared
    by its digests."""
    keys = {key: x for key, x in flatten(to_dict(config)).items() if not key.startswith(_PATHS)}
    return {"versions of dwt-jax and jax": [__version__, jax.__version__], **keys}


def _allowed(config: Config, workdir: Path) -> Config:
    """The config, with the `init` of a run that is there, if this machine can do it."""
    resumed = (workdir / "config.json").exists()
    if resumed:
        config = _as_grown(config, workdirs.config_of(workdir).init)
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS asks for what is not there
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config: platform is {config.platform!r}, but JAX found none: {reason}") from None
    if config.platform not in ("any", found):
        raise UserError(f"config: platform is {config.platform!r}, but JAX found {found!r}")
    source = "" if config.init.step else config.init.from_  # of a run that is grown, a record
    for key, path in (("teacher.path", config.teacher.path), ("init.from", source)):
        if path and not resumed and not Path(path).expanduser().is_dir():  # told before a corpus is prepared
            raise UserError(f"config: {key}: {path}: no such directory, expected a model or run directory")
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config: train.wandb is {config.train.wandb!r}, expected the package wandb installed"
        )
    return config


def _data(config: Config) -> Path:
    """The prepared rows. The first process makes them, where that is to be done; the others find them in
    the cache or, with a disk of their own, make the same."""
    found = coordination.first(lambda: str(prepared(config.data)), "process 0 to have the data prepared")
    if coordination.index() == 0:
        return coordination.together(lambda: Path(found))
    return coordination.together(lambda: prepared(config.data, log=coordination.say))


def _settled(
    config: Config, workdir: Path, data: Path, start_of: Callable[..., starts.Start | None]
) -> tuple[Run, dict[str, Any]]:
    """The run, and digests of what is not in its config."""
    config = dataclasses.replace(config, data=as_prepared(config.data, data))
    words = vocabulary(data / "tokenizer")
    rows = data_rows.open_rows(data, "train", [source.weight for source in config.data.sources])
    config = resolve(config, words, rows)
    mesh = make_mesh(config.mesh, config.train.batch_size // config.train.accumulate)
    numerics = numerics_of(config)
    teacher = None
    if config.teacher.path:
        dtype = numerics.compute if config.teacher.dtype == "auto" else jnp.dtype(config.teacher.dtype)
        teacher = teachers.load(config.teacher.path, words, config.data.sequence_length, dtype)
    start = start_of(config, words, workdir)
    identity = {
        "state_format": STATE_FORMAT,
        "data_digest": workdirs.read_json(data / "index.json")["digest"],
        "teacher_digest": teacher.digest if teacher else "",
        **({"init_digest": start.source.digest} if start else {}),
    }
    knobs, tokens = knob_table(config), Tokens.of(words, config.mask.whole_word)
    predictions = predictions_per_row(config.mask, config.data.sequence_length)
    shape = (config.train.batch_size, config.data.sequence_length, predictions)
    run = Run(
        config=config,
        workdir=workdir,
        data=data,
        rows=rows,
        mesh=mesh,
        numerics=numerics,
        teacher=teacher,
        start=start,
        alone=spec_of(config, None, tokens, numerics),
        spec=spec_of(config, teacher.model if teacher else None, tokens, numerics),
        knobs=knobs,
        teacher_until=schedules.zero_from(knobs[:, SCHEDULED.index("alpha_soft")]) if teacher else 0,
        student_flops=flops.training_step(config.model, *shape),
        teacher_flops=flops.forward(teacher.model, *shape) if teacher else 0.0,
    )
    return run, identity


def _as_grown(config: Config, there: Init) -> Config:
    """With the `init` of the run that is there, where `dwt remap --run` made it: the config need not say
    again what that was told. What it does say stands, and is compared."""
    if not there.step:
        return config
    said = {f.name: getattr(config.init, f.name) for f in dataclasses.fields(Init)}
    said = {key: value for key, value in said.items() if value != getattr(Init, key)}
    return dataclasses.replace(config, init=dataclasses.replace(there, **said))


def resolve(config: Config, words: Vocabulary, rows: data_rows.Rows) -> Config:
    """Fill in what depends on the data: vocabulary size, padding id, steps of the epochs."""
    model, train = config.model, config.train
    if model.vocab_size not in (0, len(words.tokens)):
        raise UserError(
            f"config: model.vocab_size is {model.vocab_size}, expected the tokenizer's "
            f"{len(words.tokens)} (or 0)"
        )
    model = dataclasses.replace(model, vocab_size=len(words.tokens), pad_token_id=words.pad_id)
    if not train.steps:
        epoch = data_rows.epoch_rows(rows)
        train = dataclasses.replace(train, steps=max(1, math.ceil(train.epochs * epoch / train.batch_size)))
    return check(dataclasses.replace(config, model=model, train=train))


def numerics_of(config: Config) -> Numerics:
    """bf16 where the hardware has it. On CPU only the operands of products are bf16: its
    kernels for everything else are slower in bf16 than in fp32."""
    cpu = jax.default_backend() == "cpu"
    compute = config.precision.compute
    if compute == "auto":
        compute = "float32" if cpu else "bfloat16"
    one_cpu = cpu and jax.device_count() == 1
    return Numerics(jnp.dtype(compute), jnp.dtype("float32" if cpu else compute), one_cpu)


def fresh_state(run: Run, layout: Any) -> dict[str, Any]:
    """The state before the first step, laid out as `layout` says."""
    model, optimizer = run.config.model, run.config.optimizer
    if run.start is not None:
        if run.start.step:
            raise UserError(
                f"{run.workdir}: without the checkpoint of step {run.start.step} that dwt remap --run made, "
                "expected one to begin with: grow the run anew, to another --out"
            )
        params = _learned(run) if run.start.learns else starts.grown(run.start, run.mesh)
        return jax.jit(lambda params: initial_state(params, optimizer), out_shardings=layout)(params)

    def new() -> dict[str, Any]:
        return initial_state(bert.init(model, jax.random.key(run.config.seed)), optimizer)

    return jax.jit(new, out_shardings=layout)()


def _learned(run: Run) -> Any:
    """By learned maps, the record of which is left in init.json."""
    teacher_params = teachers.on_mesh(run.teacher, run.mesh) if run.teacher else None
    assert run.start is not None
    params, record = learn(
        run.start.source.params,
        run.start.source.model,
        run.spec,
        jax.random.key(run.config.seed),
        run.rows,
        data_rows.open_rows(run.data, "held_out"),
        batch_size=run.config.train.batch_size,
        knobs=run.knobs,
        mesh=run.mesh,
        seed=run.config.seed,
        teacher_params=teacher_params,
        settings=Settings(steps=run.config.init.learning_steps),
        options=run.config.init,
    )
    path = run.workdir / "init.json"
    coordination.first(lambda: workdirs.write_json(path, {"learned": dataclasses.asdict(record)}))
    return params


def laid_out(run: Run) -> dict[str, Any]:
    """Shapes of the state, and where each part of it lives."""
    abstract = abstract_state(run.config.model, run.config.optimizer)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        abstract,
        shardings(abstract, run.mesh),
    )


def initial_or_restored(run: Run, checkpoints: Checkpoints) -> tuple[dict[str, Any], int]:
    """The state to begin with, on the mesh, and the number of steps that it has behind it."""
    like = laid_out(run)
    layout = jax.tree.map(lambda x: x.sharding, like)
    restored = checkpoints.restore(like, coordination.say)
    if restored is None:
        return fresh_state(run, layout), 0
    state, step = restored
    # Once through jit: buffers that XLA made can be donated, those that Orbax made perhaps not.
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=layout)(state), step


def annealed(run: Run, params: Any, step: int) -> Any:
    """The parameters that the model computes with after `step` steps."""
    if not has_annealed(run.config.model):
        return params
    init = run.config.init
    share = share_after(step, run.config.train.steps, init.anneal, init.step)
    placed = put(share, replicated(run.mesh))
    return jax.jit(anneal, out_shardings=shardings(params, run.mesh))(params, placed)
