"""The pilot: every way to begin, trained for the first steps of the run, ranked by held-out loss.

The loss of a remapped model before training predicts its loss after it badly, that after one
or two hundredths of the steps predicts it well (Du et al. 2024, arXiv 2405.15319, for stacking).
Every method takes exactly the run's own first steps: the same batches, masks, dropout and
scheduled numbers, learning rate included. That is what the run would have come to by then; a pilot
that ends inside the warm-up of the learning rate says little.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax.config import Config, Model
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.tokenizer import vocabulary
from dwt_jax.distributed.mesh import replicated, rows_sharding, shardings
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.eval.paired import paired_error
from dwt_jax.models import bert
from dwt_jax.remap.apply import remap
from dwt_jax.remap.methods import METHODS, find
from dwt_jax.remap.plan import plan
from dwt_jax.runs import teacher as teachers
from dwt_jax.runs.pretrained import borrow, digest
from dwt_jax.train import initialize as starts
from dwt_jax.train.ligo_training import Learned, Settings, learn
from dwt_jax.train.setup import Run, annealed, prepare_run
from dwt_jax.train.step import abstract_state, compiled, initial_state

BASELINE, LEARNED = "random", "ligo"


@dataclass(frozen=True)
class Trial:
    """What became of one method. Losses are held-out ones in nats, errors their standard errors over
    documents; None where there is none."""

    method: str
    refused: str = ""  # why it was not tried
    same_as: str = ""  # the method before it that gave the same parameters, bit by bit
    exact: bool | None = None  # as the Report says
    initial_loss: float | None = None
    initial_error: float | None = None
    loss: float | None = None
    error: float | None = None
    against_random: float | None = None  # loss − loss of the baseline, on the same documents
    against_error: float | None = None  # of that difference, paired by document
    seconds: float | None = None  # remapping, learning, training; the first method's with compilation
    flops: float | None = None  # of training, with the teacher's part, and of the learning of maps
    learned: Learned | None = None


def pilot(
    run: Run,
    params: bert.Params,
    source: Model,
    steps: int,
    methods: Sequence[str] = (),
    *,
    learning: Settings = Settings(),
    say: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Each method's first `steps` steps of `run` from `params` (host arrays) of `source`, the best
    first, then those that were refused.

    methods: names as in methods.find; none: all there are. The baseline, a model at random, is tried
    in any case. Options (split, noise, …) are those of the config's `init`; the maps of `ligo` are
    learned as `learning` says. say: is told how far it is.
    Raises UserError for an unknown method and for a number of steps that the run does not have.
    """
    if not 1 <= steps <= run.config.train.steps:
        raise UserError(f"--pilot is {steps}, expected from 1 to train.steps ({run.config.train.steps})")
    for name in methods:
        find(name)
    names = [BASELINE, *(name for name in methods or METHODS if name != BASELINE)]
    teacher_params = teachers.on_mesh(run.teacher, run.mesh) if run.teacher else None
    trials: list[Trial] = []
    seen: dict[str, str] = {}
    baseline: likelihood.Documents | None = None
    for number, name in enumerate(names, start=1):
        say(f"pilot {number}/{len(names)}: {name}")
        began = time.perf_counter()
        try:
            grown, trial = _begun(run, params, source, name, learning, teacher_params)
        except UserError as error:
            trials.append(Trial(name, refused=str(error)))
            say(f"  refused: {error}")
            continue
        print_of = digest(grown)
        if print_of in seen:
            trials.append(Trial(name, same_as=seen[print_of], exact=trial.exact))
            say(f"  the same parameters as {seen[print_of]}")
            continue
        seen[print_of] = name
        seconds = time.perf_counter() - began
        at_first, began = likelihood.summarise(_documents(run, grown, 0)), time.perf_counter()
        todo = plan(name, source, run.config.model, jax.random.key(run.config.seed), run.config.init)
        grown = _taken(run, grown, steps, teacher_params, starts.warming(run.config, todo, run.mesh))
        seconds += time.perf_counter() - began
        documents = _documents(run, grown, steps)
        baseline = documents if name == BASELINE else baseline
        work = _flops(run, steps) + (trial.learned.flops if trial.learned else 0.0)
        trial = dataclasses.replace(trial, seconds=seconds, flops=work)
        trial = _filled(trial, at_first, documents, baseline)
        say(f"  held-out loss {trial.initial_loss:.4f} → {trial.loss:.4f}, {trial.seconds:.0f} s")
        trials.append(trial)
    return ranked(trials)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """By loss; those that equal another behind it; refused ones last. A loss that is not a number is
    behind every other."""
    order = {trial.method: trial for trial in trials}

    def key(trial: Trial) -> tuple[bool, float, bool]:
        loss = order[trial.same_as or trial.method].loss
        return bool(trial.refused), np.inf if loss is None or np.isnan(loss) else loss, bool(trial.same_as)

    return sorted(trials, key=key)


def _begun(
    run: Run, params: Any, source: Model, name: str, learning: Settings, teacher_params: Any
) -> tuple[Any, Trial]:
    """(parameters on the mesh, the trial so far)"""
    key = jax.random.key(run.config.seed)
    if name != LEARNED:
        grown, report = remap(params, source, run.config.model, name, key, options=run.config.init)
        return jax.device_put(grown, shardings(grown, run.mesh)), Trial(name, exact=report.exact)
    grown, record = learn(
        params,
        source,
        run.spec,
        key,
        run.rows,
        data_rows.open_rows(run.data, "held_out"),
        batch_size=run.config.train.batch_size,
        knobs=run.knobs,
        mesh=run.mesh,
        seed=run.config.seed,
        teacher_params=teacher_params,
        settings=learning,
        options=run.config.init,
    )
    return grown, Trial(name, exact=False, learned=record)


def _taken(run: Run, params: Any, steps: int, teacher_params: Any, warming: tuple[Any, ...]) -> Any:
    """The parameters after the run's first `steps` steps from `params`. warming: as of start.warming."""
    config = run.config
    layout = shardings(abstract_state(config.model, config.optimizer), run.mesh)
    # Through jit: the step's own memory, since it is donated.
    state = jax.jit(lambda params: initial_state(params, config.optimizer), out_shardings=layout)(params)
    seed = jax.device_put(np.uint32(config.seed), replicated(run.mesh))
    alone, taught = compiled(run.alone, run.mesh), compiled(run.spec, run.mesh)
    batches = data_rows.batches(
        run.rows, config.seed, config.train.batch_size, 0, steps, prefetch=config.data.prefetch
    )
    for step, batch in enumerate(batches):
        with_teacher = teacher_params is not None and step < run.teacher_until
        placed = jax.device_put(batch, rows_sharding(run.mesh))
        knobs = jax.device_put(run.knobs[step], replicated(run.mesh))
        take = taught if with_teacher else alone
        state, _ = take(state, teacher_params if with_teacher else None, placed, knobs, seed, *warming)
    return jax.block_until_ready(state["params"])


def _documents(run: Run, params: Any, step: int) -> likelihood.Documents:
    """Of the model after `step` steps of the run."""
    params = annealed(run, params, step)
    found = likelihood.by_document(params, run.config.model, run.data, mesh=run.mesh, numerics=run.numerics)
    assert found is not None  # nothing stops it
    return found


def _filled(
    trial: Trial,
    at_first: dict[str, float],
    documents: likelihood.Documents,
    baseline: likelihood.Documents | None,
) -> Trial:
    found = likelihood.summarise(documents)
    assert baseline is not None  # it comes first and is never refused
    pair = [(each.loss, each.predictions) for each in (documents, baseline)]
    return dataclasses.replace(
        trial,
        initial_loss=at_first["held_out_loss"],
        initial_error=at_first["standard_error"],
        loss=found["held_out_loss"],
        error=found["standard_error"],
        against_random=found["held_out_loss"] - likelihood.summarise(baseline)["held_out_loss"],
        against_error=paired_error(*pair),
    )


def _flops(run: Run, steps: int) -> float:
    return steps * run.student_flops + min(steps, run.teacher_until) * run.teacher_flops


def table(trials: Sequence[Trial], steps: int) -> str:
    """Text for a terminal."""
    rows: list[tuple[str, ...]] = [
        ("", "method", f"loss at {steps}", "± s.e.", "against random", "at first", "FLOPs", "seconds")
    ]
    place = 0
    for trial in trials:
        if trial.refused:
            rows.append(("–", trial.method, f"refused: {trial.refused.partition(': ')[2]}", *[""] * 5))
        elif trial.same_as:
            rows.append(("", trial.method, f"as {trial.same_as}", *[""] * 5))
        else:
            place += 1
            rows.append((str(place), trial.method, *_cells(trial)))
    plain = [row for row in rows if not row[2].startswith("refused")]
    widths = [max(len(row[i]) for row in plain) for i in range(len(rows[0]))]
    widths[1] = max(len(row[1]) for row in rows)
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    for trial in trials:
        if trial.learned:
            record = trial.learned
            lines.append(
                f"{trial.method}: maps learned in {record.steps} steps and {record.flops:.3g} FLOPs (counted "
                f"above), objective {record.loss_before:.4f} → {record.loss_after:.4f}"
            )
    return "\n".join(lines)


def _cells(trial: Trial) -> tuple[str, ...]:
    against = "baseline"
    if trial.method != BASELINE:
        error = "" if trial.against_error is None else f" ± {trial.against_error:.4f}"
        against = f"{trial.against_random:+.4f}{error}"
    return (
        f"{trial.loss:.4f}",
        f"{trial.error:.4f}",
        against,
        f"{trial.initial_loss:.4f}",
        f"{trial.flops:.3g}",
        f"{trial.seconds:.0f}",
    )


def command(
    model: str,
    config: Config,
    steps: int,
    methods: Sequence[str] = (),
    as_json: bool = False,
    step: int | None = None,
) -> None:
    """`dwt remap --pilot`: the model in `model` (a run, at the checkpoint of `step` if given, or a model
    directory) to config's, printed. How far it is goes to stderr. Leaves nothing behind but prepared
    data in the cache.

    Raises UserError for whatever training with `config` would, and for another vocabulary.
    """
    learning = Settings(steps=config.init.learning_steps)
    with tempfile.TemporaryDirectory(prefix="dwt-pilot-") as folder:
        run = prepare_run(config, Path(folder), lambda *_: None)
        source = borrow("--model", model, vocabulary(run.data / "tokenizer"), growing=True, step=step)
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        trials = pilot(run, source.params, source.model, steps, methods, learning=learning, say=say)
    if as_json:
        print(json.dumps([dataclasses.asdict(trial) for trial in trials], indent=2))
        return
    print(table(trials, steps))
    warm = int(np.argmax(run.knobs[:, 3]))
    if steps <= warm:
        print(f"The learning rate still rises: its warm-up ends at step {warm}. Take more steps.")
