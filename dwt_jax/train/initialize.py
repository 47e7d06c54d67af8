"""What a student starts from that is no new model: a smaller one, grown to its size (`init.*`)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Config, Model
from dwt_jax.config_loader import construct
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import put, replicated, shardings
from dwt_jax.errors import UserError
from dwt_jax.models import bert
from dwt_jax.models.bert import Params
from dwt_jax.remap import apply
from dwt_jax.remap.optimizer_state import known
from dwt_jax.remap.plan import Plan, plan
from dwt_jax.remap.report import Report, drift, report
from dwt_jax.runs.metric_writer import total
from dwt_jax.runs.pretrained import Borrowed, borrow
from dwt_jax.runs.run_dir import read_json
from dwt_jax.train.step import scheduled

PROBE_ROWS = 8


class Start(NamedTuple):
    path: str
    source: Borrowed
    todo: Plan
    # Of a run that was grown in the middle of another (growth.py): what that had behind it.
    step: int = 0
    student_flops: float = 0.0
    teacher_flops: float = 0.0

    @property
    def learns(self) -> bool:
        """Whether the maps are learned (learn_maps.py), not given."""
        return self.todo.method.name == "ligo"


def start_of(config: Config, words: Vocabulary, workdir: Path) -> Start | None:
    """The source that `init` of a resolved config names, and how the student is made of it; None for
    a new model.

    Raises UserError if its vocabulary does not begin the data's, and for what the method cannot do.
    """
    init = config.init
    if not init.method:
        return None
    if init.step:
        return _recorded(config, workdir)
    key, path = ("init.from", init.from_) if init.from_ else ("teacher.path", config.teacher.path)
    source = borrow(key, path, words, growing=True)
    return Start(path, source, planned(config, source.model))


def planned(config: Config, source: Model) -> Plan:
    """From `source` to the student of a resolved config."""
    try:
        return plan(config.init.method, source, config.model, jax.random.key(config.seed), config.init)
    except UserError as error:
        raise UserError(f"config: init.method: {error}") from None


def _recorded(config: Config, workdir: Path) -> Start:
    """Of a run that was grown in the middle of another, whose checkpoint may be gone by now."""
    path = workdir / "init.json"
    if not path.exists() and (workdir / "config.json").exists():
        raise UserError(f"{path}: missing, expected the record that dwt remap --run left there")
    if not path.exists():
        raise UserError(
            f"config: init.step is {config.init.step}, expected 0: dwt remap --run sets it in what it makes"
        )
    found = read_json(path)
    read = functools.partial(_field, path, found)
    model = construct(Model, read("source", "object"))
    source = Borrowed(bert.abstract(model), model, read("digest", "text"), read("training_flops", "known"))
    todo, spent = planned(config, model), (read("student_flops", "number"), read("teacher_flops", "number"))
    return Start(read("from", "text"), source, todo, config.init.step, *spent)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "object": ((dict,), "an object"),
    "text": ((str,), "a string"),
    "number": ((int, float), "a number"),
    "known": ((int, float, type(None)), "a number or null"),
}


def _field(path: Path, found: dict[str, Any], key: str, kind: str) -> Any:
    """An entry of `init.json`, of its kind."""
    value, (types, wanted) = found.get(key, ...), _KINDS[kind]
    if isinstance(value, bool) or not isinstance(value, types):
        shown = "missing" if value is ... else repr(value)
        raise UserError(f"{path}: {key} is {shown}, expected {wanted} as dwt remap --run wrote it")
    return value


def learned_flops(workdir: Path) -> float | None:
    """Of the learning of maps that `init.json` records; None where it does not say."""
    path = workdir / "init.json"
    learned = read_json(path).get("learned") if path.exists() else None
    found = learned.get("flops") if isinstance(learned, dict) else None
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def warming(config: Config, todo: Plan | None, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """What a step that warms up new entries takes besides (see step.compiled)."""
    if "rewarmed" not in scheduled(config) or todo is None:
        return ()
    return (put(known(todo), replicated(mesh)),)


def grown(start: Start, mesh: jax.sharding.Mesh) -> Params:
    """The student's first parameters, laid out on the mesh as the role table says; nothing of them
    is ever whole on one device or on the host."""
    placed = put(start.source.params, shardings(start.source.params, mesh))
    build = lambda params: apply.apply(start.todo, params)  # noqa: E731
    return jax.jit(build, out_shardings=shardings(jax.eval_shape(build, placed), mesh))(placed)


def told(start: Start, params: Params, probe: dict[str, np.ndarray] | None) -> Report:
    """What the student (`params`, or their shapes where there is no probe) has from its source. With
    a `probe` ({tokens, segments} [B, L]), how far the logits moved on it."""
    found = report(start.todo, start.source.params, params)
    if start.learns:  # the shares are those of the maps that it begins with
        found = dataclasses.replace(found, exact=False, lost=("ligo: the maps are learned",))
    if probe is None:
        return found
    source, target = start.todo.source, start.todo.target
    length = min(source.max_length, target.max_length)
    probe = {
        "tokens": np.minimum(probe["tokens"], source.vocab_size - 1)[:, :length].astype(np.int32),
        "segments": probe["segments"][:, :length].astype(np.int32),
    }
    return found.with_drift(drift(start.source.params, source, params, target, probe))


def probe_rows(rows: data_rows.Rows, seed: int) -> dict[str, np.ndarray]:
    """A few rows of a run's own data: the first that it trains on."""
    return data_rows.batch(rows, seed, 0, PROBE_ROWS)


def sentence(start: Start, found: Report) -> str:
    """The report in one line."""
    sizes = start.source.model
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in found.shares().items())
    kept = "computes what that did" if found.exact else f"another function ({found.lost[0]})"
    moved = "; logits moved by {rms:.2g} of {spread:.2g} (rms)".format(**found.drift) if found.drift else ""
    return (
        f"student grown from {start.path} ({sizes.num_hidden_layers} x {sizes.hidden_size}"
        f"{f', step {start.step}' * bool(start.step)}) by {found.method}: {shares}; {kept}{moved}"
    )


def training_flops(start: Start, workdir: Path, *teachers: Borrowed | None) -> float | None:
    """What the source's own pre-training cost, None where it is not known; 0 where it is one of the
    teachers, whose own is charged already, and where nothing is taken from it. Learned maps are charged
    too."""
    if start.todo.method.fresh:
        return 0.0
    same = any(teacher is not None and teacher.digest == start.source.digest for teacher in teachers)
    learned = learned_flops(workdir) if start.learns else 0.0
    return total(0.0 if same else start.source.training_flops, learned)
