"""Pre-training from a config: read it from top to bottom."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax import __version__
from dwt_jax.config import Config, Model
from dwt_jax.data import dataset as data_rows
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import own_rows, put, put_rows, replicated, whole
from dwt_jax.distributed.shutdown import Failed, Stopped, Stopping, signals
from dwt_jax.distributed.watchdog import watching
from dwt_jax.eval import likelihood
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.models import bert, flops
from dwt_jax.runs import run_dir as workdirs
from dwt_jax.runs import teacher as teachers
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.metric_writer import Rate, Recorder, amount, read, spent
from dwt_jax.train import initialize as starts
from dwt_jax.train.setup import Run, annealed, initial_or_restored, prepare_run
from dwt_jax.train.step import SCHEDULED, compiled, scheduled


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Pre-train what `config` says in `workdir`, or go on where it stopped. → summary.json

    Raises UserError before anything is written if the config does not fit the data, the
    teacher, the devices or the run that is already there; Stopped after a signal; Failed
    when losses stay non-finite.
    """
    with signals() as stopping, ExitStack() as held:
        coordination.first(lambda: held.enter_context(workdirs.locked(workdir)) and None)
        run = prepare_run(config, workdir)
        if (finished := coordination.first(lambda: _finished(workdir))) is not None:
            return finished
        checkpoints = Checkpoints(
            workdirs.checkpoint_place(workdir, run.config), run.config.train.keep_checkpoints
        )
        state, start = initial_or_restored(run, checkpoints)
        watch = held.enter_context(watching(run.config.train.watchdog))
        recorder = Recorder(workdir, run.config.train, start, workdir.name, coordination.index() == 0)
        try:
            announce(run, state, start, recorder)
            began = time.perf_counter()
            stopping.poll()
            state, teacher_steps = take_steps(run, state, start, checkpoints, recorder, stopping, watch)
            held_out = evaluate_at(
                run, state["params"], run.config.train.steps, teacher_steps, recorder, stopping, watch
            )
            checkpoints.save(run.config.train.steps, state)
            checkpoints.wait()
            watch()
            return finish(run, state, teacher_steps, held_out, time.perf_counter() - began)
        finally:
            recorder.close()
            checkpoints.close()


def _finished(workdir: Path) -> dict[str, Any] | None:
    """The summary of a run that is whole."""
    if not (workdir / "summary.json").exists():
        return None
    print(f"{workdir}: already finished", flush=True)
    return workdirs.read_json(workdir / "summary.json")


def announce(run: Run, state: dict[str, Any], start: int, recorder: Recorder) -> None:
    model, train, device = run.config.model, run.config.train, jax.devices()[0]
    size = sum(x.size for x in jax.tree.leaves(bert.abstract(model)))
    recorder.say(
        f"{jax.device_count()} {device.platform} device(s) ({device.device_kind}), {run.numerics.compute}; "
        f"student {model.num_hidden_layers} x {model.hidden_size}, {amount(size)} parameters; "
        f"{train.steps} steps of {train.batch_size} x {run.config.data.sequence_length} tokens"
    )
    if run.start is not None:
        announce_start(run, run.start, state["params"], start, recorder)
    if run.teacher is None:
        recorder.say("no teacher: the masked-LM loss alone")
    else:
        recorder.say(
            f"teacher {run.teacher.model.num_hidden_layers} x {run.teacher.model.hidden_size} from "
            f"{run.config.teacher.path}: +{run.teacher_flops / run.student_flops:.0%} FLOPs a step"
        )
        if run.teacher_until == 0:
            recorder.say("the teacher is never used: distill.alpha_soft is 0 throughout")
        elif start >= teacher_until(run, state["behind"]["beaten_at"], start):
            recorder.say("the teacher was switched off before: the rest costs no more than training alone")
    if start:
        recorder.say(f"resumed at step {start}")


def announce_start(run: Run, begun: starts.Start, params: Any, step: int, recorder: Recorder) -> None:
    """Say what the student is grown from; before its first step `init.json` tells all of it."""
    if step:
        recorder.say(starts.sentence(begun, starts.told(begun, params, None)))
        return
    params = params if coordination.alone() else whole(params)

    def tell() -> None:
        found = starts.told(begun, params, starts.probe_rows(run.rows, run.config.seed))
        recorder.say(starts.sentence(begun, found))
        path = run.workdir / "init.json"
        learned = {"learned": workdirs.read_json(path)["learned"]} if begun.learns else {}
        workdirs.write_json(path, {"from": begun.path, **learned, **found.to_dict()})

    coordination.first(tell)


def take_steps(
    run: Run,
    state: dict[str, Any],
    start: int,
    checkpoints: Checkpoints,
    recorder: Recorder,
    stopping: Stopping,
    watch: Callable[[], None],
) -> tuple[dict[str, Any], int]:
    """All steps from `start` on. → the last state, the number of steps the teacher took part in.

    The metrics of a step are read while the next one runs. A checkpoint is written after the
    metrics and the evaluation of its step, so that a resumed run never lacks them.
    """
    train, rate = run.config.train, Rate()
    step_alone, step_taught = compiled(run.alone, run.mesh), compiled(run.spec, run.mesh)
    peak = flops.peak_per_device(str(run.numerics.compute))
    until = teacher_until(run, state["behind"]["beaten_at"], start)
    teacher_params = teachers.on_mesh(run.teacher, run.mesh) if run.teacher and start < until else None
    seed = put(np.uint32(run.config.seed), replicated(run.mesh))
    warming = starts.warming(run.config, run.start.todo if run.start else None, run.mesh)
    own = own_rows(run.mesh, train.batch_size)
    batches = data_rows.batches(
        run.rows,
        run.config.seed,
        train.batch_size,
        start,
        train.steps,
        slice(None) if coordination.alone() else own,
        run.config.data.prefetch,
    )
    pending: tuple[int, dict[str, Any]] | None = None

    def flush() -> None:
        nonlocal pending
        if pending:
            log(run, *pending, min(pending[0], until), rate, peak, recorder)
        pending = None

    missed = start > 0 and due(start, train.evaluate_every, train.steps)  # stopped before its evaluation
    if missed:
        found = evaluate_at(run, state["params"], start, min(start, until), recorder, stopping, watch)
        if found is None:
            raise stopped_at(run, start)
    with jax.transfer_guard("disallow"):
        for step in range(start, train.steps):
            if teacher_params is not None and step >= until:
                recorder.say(f"step {step}: alpha_soft is 0 for good, the teacher is switched off")
                teacher_params = None
            waited = time.perf_counter()
            batch = next(batches)
            rate.wait += time.perf_counter() - waited
            placed = put_rows(batch, own, run.mesh, train.batch_size)
            knobs = put(run.knobs[step], replicated(run.mesh))
            take = step_alone if teacher_params is None else step_taught
            state, metrics = take(state, teacher_params, placed, knobs, seed, *warming)
            flush()
            watch()
            rate.add(int((batch["segments"] > 0).sum() * train.batch_size / len(own)))
            done = step + 1
            if due(done, train.log_every, 0) or done == train.steps:
                pending = done, metrics
                if run.spec.until_beaten and teacher_params is not None:
                    until = teacher_until(run, metrics["beaten_at"], done)
            if due(done, train.evaluate_every, train.steps) and not stopping.is_set():
                flush()
                evaluate_at(run, state["params"], done, min(done, until), recorder, stopping, watch)
                rate.restart()
            if due(done, train.checkpoint_every, train.steps) or (stopping.is_set() and done < train.steps):
                flush()
                checkpoints.save(done, state)
                watch()
            if stopping.is_set() and done < train.steps:
                checkpoints.wait()
                raise stopped_at(run, done)
        flush()
    return state, min(until, train.steps)


def stopped_at(run: Run, step: int) -> Stopped:
    return Stopped(f"{run.workdir}: stopped at step {step}, saved; the same command goes on from there")


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps happens after this one; the last
    step has its own ending."""
    return bool(every) and step % every == 0 and step != last


def teacher_until(run: Run, beaten_at: jax.Array, step: int) -> int:
    """The step from which the teacher is not needed, as known after `step` steps.

    `until_beaten` is acted upon only where metrics are logged, so that a resumed run
    switches at the same step as one that was never stopped.
    """
    if not run.teacher:
        return 0
    beaten = int(jax.device_get(beaten_at))
    if run.spec.until_beaten and beaten >= 0:
        every = run.config.train.log_every
        switch = (beaten // every + 1) * every
        return switch if switch <= step else run.teacher_until
    return run.teacher_until


def log(
    run: Run,
    step: int,
    metrics: dict[str, Any],
    taught: int,
    rate: Rate,
    peak: float | None,
    recorder: Recorder,
):
    """Write the metrics of a step. Raises Failed after too many non-finite ones in a row."""
    train = run.config.train
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    knobs = dict(zip(scheduled(run.config), map(float, run.knobs[step - 1]), strict=True))
    steps_per_second, tokens_per_second, waiting = rate.take()
    with_teacher = taught == step
    work = run.student_flops + (run.teacher_flops if with_teacher else 0)
    record = {
        "step": step,
        "loss": values["loss"],
        "hard_loss": values["hard_loss"],
        **{key: values[key] if with_teacher else None for key in _OF_THE_TEACHER},
        "alpha_hard": knobs["alpha_hard"],
        "alpha_soft": values["alpha_soft"] if with_teacher else 0.0,
        "temperature": knobs["temperature"],
        "learning_rate": knobs["learning_rate"],
        **{name: knobs[name] for name in scheduled(run.config)[len(SCHEDULED) :]},
        "grad_norm": values["grad_norm"],
        "skipped": values["skipped"],
        "tokens_per_second": tokens_per_second,
        "mfu": steps_per_second * work / (peak * jax.device_count()) if peak else None,
        "data_wait": waiting,
        **ledger(run, step, taught),
    }
    recorder.log(record, (train.steps - step) / steps_per_second if steps_per_second else 0.0)
    if values["skipped_longest"] >= train.max_skipped:
        raise Failed(
            f"{run.workdir}: the loss or gradient was not finite for {values['skipped_longest']} steps "
            f"in a row (now at step {step}); none of those updates was made, the checkpoints are intact"
        )


_OF_THE_TEACHER = ("soft_loss", "soft_loss_at_1", "teacher_hard_loss", "selected_share")


def ledger(run: Run, step: int, taught: int) -> dict[str, float]:
    """FLOPs up to `step`, of which the teacher took part in the first `taught`; those of a run that was
    grown into this one are among them."""
    begun = run.start.step if run.start else 0
    before = (run.start.student_flops, run.start.teacher_flops) if run.start else (0.0, 0.0)
    return {
        "student_flops": before[0] + (step - begun) * run.student_flops,
        "teacher_flops": before[1] + max(0, taught - begun) * run.teacher_flops,
    }


def evaluate_at(
    run: Run,
    params: Any,
    step: int,
    taught: int,
    recorder: Recorder,
    stopping: Stopping,
    watch: Callable[[], None],
) -> dict[str, float] | None:
    """Held-out loss after `step` steps, recorded; what was recorded before is not done again.
    None if a signal stopped it."""
    path = run.workdir / "evaluations.jsonl"
    if record := coordination.first(
        lambda: next((each for each in read(path) if each["step"] == step), None)
    ):
        return record

    def stop() -> bool:
        watch()
        return stopping.is_set()

    documents = likelihood.by_document(
        annealed(run, params, step),
        run.config.model,
        run.data,
        mesh=run.mesh,
        numerics=run.numerics,
        stop=stop,
    )
    if documents is None:
        return None
    if step == run.config.train.steps and coordination.index() == 0:
        likelihood.write(run.workdir / "documents.npz", documents)
    record = {"step": step, **likelihood.summarise(documents), **ledger(run, step, taught)}
    recorder.evaluation(record)
    return record


def finish(
    run: Run, state: dict[str, Any], taught: int, held_out: dict[str, float] | None, seconds: float
) -> dict[str, Any]:
    """Write `model/`, then `summary.json`: the sign that the run is whole."""
    if held_out is None:
        raise Stopped(
            f"{run.workdir}: stopped in the last evaluation, saved; the same command goes on from there"
        )
    steps = run.config.train.steps
    work = ledger(run, steps, taught)
    summary = {
        "steps": steps,
        "held_out": held_out,
        "skipped_updates": int(jax.device_get(state["skipped"]["total"])),
        "seconds_of_this_process": seconds,
        "flops": {
            "student": work["student_flops"],
            "teacher_forward": work["teacher_flops"],
            "total": spent(work),
            "teacher_training": run.teacher.training_flops if run.teacher else 0.0,
            **(
                {"source_training": starts.training_flops(run.start, run.workdir, run.teacher)}
                if run.start
                else {}
            ),
        },
        "teacher_steps": max(0, taught - run.config.init.step),
        "teacher": _sizes(run.teacher.model) if run.teacher else None,
        **({"init": _start(run.start)} if run.start else {}),
        "data": _data_sizes(run),
        "versions": {"dwt_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "compute": str(run.numerics.compute),  # what precision.compute=auto came to
    }
    params = whole(annealed(run, state["params"], steps))

    def write() -> None:
        checkpoint.save(
            params,
            run.config.model,
            run.workdir / "tokenizer",
            run.workdir / "model",
            card=model_card.of_run(run.config, ["mlm"], summary, steps),
        )
        workdirs.write_json(run.workdir / "summary.json", summary)

    coordination.first(write, "process 0 to write the model")
    return summary


def _sizes(model: Model) -> dict[str, int]:
    return {"num_hidden_layers": model.num_hidden_layers, "hidden_size": model.hidden_size}


def _start(begun: starts.Start) -> dict[str, Any]:
    amid = {"step": begun.step} if begun.step else {}
    return {
        "method": begun.todo.method.name,
        "exact": not (begun.todo.lost or begun.learns),
        **amid,
        **_sizes(begun.source.model),
    }


def _data_sizes(run: Run) -> dict[str, int]:
    index = workdirs.read_json(run.data / "index.json")
    return {
        f"{split}_{what}": index["splits"][split][what]
        for split in ("train", "held_out")
        for what in ("documents", "tokens")
    }
