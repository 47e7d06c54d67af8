"""Growing a run in its middle: its state after some step becomes that of a larger student.

The new run goes on with the next step of the same stream: batches, masks and schedules are
functions of the step, so all that is made here is the state (parameters, moments, step) and
a record of where it came from, `init.json`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Config, Model
from dwt_jax.config_loader import flatten, to_dict
from dwt_jax.errors import UserError
from dwt_jax.files import building, new_place, publish
from dwt_jax.remap.apply import apply
from dwt_jax.remap.gates import has_annealed, settled, share_after, without
from dwt_jax.remap.optimizer_state import remap_state
from dwt_jax.remap.report import Report
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metric_writer import total
from dwt_jax.runs.pretrained import Borrowed, digest
from dwt_jax.runs.run_dir import MAY_CHANGE, checkpoint_place, config_of, read_json, write_json
from dwt_jax.train import initialize as starts
from dwt_jax.train.loop import ledger, teacher_until
from dwt_jax.train.setup import Run, annealed, laid_out, prepare_run
from dwt_jax.train.step import initial_state

Moments = Literal["reset", "carry", "asymmetric"]

SAME = ("seed", "data", "mask.", "train.batch_size")
"""Keys that say which batches come next, and how they are masked."""


def grow(run_path: str, config: Config, out: Path, step: int | None, moments: Moments) -> Report:
    """Write the run `out`, whose next step is the one after `step` (of a kept checkpoint; None: the
    newest) of the run `run_path`, grown to config's `model` by config's `init`.

    moments: what becomes of the optimiser's, see remap.moments.remap_state. Raises UserError, and
    leaves nothing (but run.json in a train.checkpoint_path), for another seed, data, masks or batch
    size, for a `train.steps` that lies behind, and for what the method cannot do.
    """
    out = new_place(out)
    old, state, step = _restored(Path(run_path).expanduser(), config, step)
    params, model, adam = _source(old, state, step)
    init = dataclasses.replace(config.init, from_=run_path, step=step)
    spent = ledger(old, step, min(step, teacher_until(old, state["behind"]["beaten_at"], step)))

    def start_of(resolved: Config, *_: Any) -> starts.Start:
        source = Borrowed(params, model, digest(jax.device_get(params)), None)
        return starts.Start(run_path, source, starts.planned(resolved, model), step, **spent)

    with building(out) as partial:
        run = prepare_run(dataclasses.replace(config, init=init), partial, start_of)
        _refuse_another_stream(run, old, run_path)
        assert run.start is not None
        grown = _grown(run, run.start, adam, moments)
        if run.teacher and old.teacher and run.teacher.digest == old.teacher.digest:
            grown["behind"] = state["behind"]  # of the same teacher
        found = starts.told(run.start, grown["params"], starts.probe_rows(run.rows, run.config.seed))
        checkpoints = Checkpoints(checkpoint_place(partial, run.config), run.config.train.keep_checkpoints)
        try:
            if there := checkpoints.steps():
                place = checkpoints.directory
                raise UserError(
                    f"config: train.checkpoint_path: {place} holds {there}, expected no checkpoints"
                )
            checkpoints.save(step, grown)
            checkpoints.wait()
        finally:
            checkpoints.close()
        record = {
            "from": run_path,
            "moments": moments,
            "source": to_dict(model),
            "digest": run.start.source.digest,
            "training_flops": _borrowed_flops(run, old),
            **spent,
        }
        write_json(partial / "init.json", {**record, **found.to_dict()})
        if not publish(partial, out):
            raise UserError(f"--out: {out} holds something, expected a new or empty directory")
    return found


def _restored(path: Path, config: Config, step: int | None) -> tuple[Run, dict[str, Any], int]:
    """The run there, on config's mesh, its state and the steps behind that."""
    if not (path / "config.json").exists() or not (path / "run.json").exists():
        raise UserError(f"--run: {path} is no run with checkpoints, expected the directory of one")
    old = prepare_run(dataclasses.replace(config_of(path), mesh=config.mesh, platform=config.platform), path)
    checkpoints = Checkpoints(
        checkpoint_place(path, old.config), old.config.train.keep_checkpoints, read_only=True
    )
    try:
        kept = checkpoints.steps()
        if not kept or (step is not None and step not in kept):
            raise UserError(
                f"--step is {'the newest' if step is None else step}, expected a checkpoint that {path} "
                f"keeps: {', '.join(map(str, kept)) or 'none'}"
            )
        found = checkpoints.restore(laid_out(old), lambda text: print(text, flush=True), step)
    finally:
        checkpoints.close()
    assert found is not None  # there are some
    return old, *found


def _source(old: Run, state: dict[str, Any], step: int) -> tuple[Any, Model, optax.ScaleByAdamState]:
    """Parameters, model and moments after `step` steps; without gates and weights of norms where those
    are open by then."""
    config = old.config
    params, model, adam = annealed(old, state["params"], step), config.model, _adam(state["opt_state"])
    share = share_after(step, config.train.steps, config.init.anneal, config.init.step)
    if has_annealed(model) and share == 1:
        params, model = settled(params, model)
        adam = adam._replace(mu=without(adam.mu), nu=without(adam.nu))
    return params, model, adam


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _adam(opt_state: Any) -> optax.ScaleByAdamState:
    return next(filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam)))


def _grown(run: Run, start: starts.Start, adam: optax.ScaleByAdamState, moments: Moments) -> dict[str, Any]:
    """The state of the larger student, laid out on the mesh."""

    def build(params: Any, adam: optax.ScaleByAdamState) -> dict[str, Any]:
        state = initial_state(apply(start.todo, params), run.config.optimizer)
        carried = remap_state(start.todo, adam, moments)
        opt_state = jax.tree.map(
            lambda node: carried if _is_adam(node) else node, state["opt_state"], is_leaf=_is_adam
        )
        return {**state, "opt_state": opt_state, "step": jnp.int32(start.step)}

    layout = jax.tree.map(lambda x: x.sharding, laid_out(run))
    return jax.jit(build, out_shardings=layout)(start.source.params, adam)


def _refuse_another_stream(run: Run, old: Run, path: str) -> None:
    """What comes next must be what would have come."""
    mine, theirs = ({"data": _digest_of(x), **flatten(to_dict(x.config))} for x in (run, old))
    for key in mine:
        if key.startswith(SAME) and not key.startswith(MAY_CHANGE) and mine[key] != theirs.get(key):
            raise UserError(f"config: {key} is {mine[key]!r}, expected {theirs.get(key)!r} as in {path}")


def _digest_of(run: Run) -> str:
    return str(read_json(run.data / "index.json")["digest"])


def _borrowed_flops(run: Run, old: Run) -> float | None:
    """What the old run had from elsewhere and the new one's teacher does not account for."""
    same = run.teacher and old.teacher and run.teacher.digest == old.teacher.digest
    teacher = 0.0 if same or not old.teacher else old.teacher.training_flops
    source = starts.training_flops(old.start, old.workdir, old.teacher, run.teacher) if old.start else 0.0
    return total(teacher, source)
