"""`dwt study`: the runs of a grid, one after the other or one alone, and what they will cost.

Every run is a directory that resumes and that is refused where it holds another config, so the
queue itself has no state: it asks each directory whether it is done.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dwt_jax.config import Config, Data
from dwt_jax.config_loader import build, construct, flatten, to_dict
from dwt_jax.config_loader import load as load_config
from dwt_jax.errors import UserError
from dwt_jax.finetune import config as finetuning
from dwt_jax.runs.metric_writer import duration, read
from dwt_jax.runs.run_dir import MAY_CHANGE, read_json, write_json
from dwt_jax.study import manifest
from dwt_jax.study.provenance import Sources
from dwt_jax.study.sweep import END, Elsewhere, Grid, Job, anywhere, jobs_of, pairs

if TYPE_CHECKING:
    from dwt_jax.finetune.collate import Texts

FILES_MAY_CHANGE = ("examples.path", "examples.train", "examples.dev", "examples.test")  # see finetune/run.py


class Cost(NamedTuple):
    flops: float | None  # None: not known before the data is prepared
    seconds: float | None


def run(grid: Grid, workdir: Path, index: int | None = None) -> bool:
    """Every job of `grid` that is not done, or that of `index` alone. → whether all are done now

    Raises UserError for a grid that cannot be and where a directory holds a run of another config, before
    anything is written; Stopped after a signal.
    """
    from dwt_jax.finetune.collate import Texts

    jobs = jobs_of(grid, workdir)
    if index is not None and not 0 <= index < len(jobs):
        raise UserError(f"--index is {index}, expected from 0 to {len(jobs) - 1}")
    by_name = {job.name: job for job in jobs}
    chosen = jobs if index is None else (jobs[index],)
    if index is not None:
        missing = [name for name in chosen[0].needs if not by_name[name].is_done()]
        if missing:
            raise UserError(f"--index is {index}, {chosen[0].name}: expected finished first: {missing[0]}")
    tasks, texts, sources = tasks_of(grid), Texts(), Sources(by_name)
    for job in jobs:
        _refuse_another(job, tasks, grid.elsewhere)
        sources.look(job)
    _check_inputs([job for job in chosen if not job.is_done()], tasks, grid.elsewhere, texts)
    workdir.mkdir(parents=True, exist_ok=True)
    manifest.write(grid, jobs, workdir)
    for number, job in enumerate(jobs):
        if job in chosen:
            sources.look(job)  # again: what it needs may only now have been made
        if job in chosen and not job.is_done():
            print(f"study: {number + 1} of {len(jobs)}, {job.name}", flush=True)
            sources.note(job)
            _run(grid, job, by_name, tasks, texts)
    return all(job.is_done() for job in jobs)


def _check_inputs(
    jobs: Sequence[Job], tasks: Sequence[finetuning.FineTune], elsewhere: Elsewhere, texts: "Texts"
) -> None:
    """What is missing for the last job is said before the first one begins, not hours later."""
    from dwt_jax.data.prepare import key

    kinds = {job.kind for job in jobs}
    needed = {job.config.data for job in jobs if job.kind == "train"}
    if "evaluate" in kinds:
        needed.add(_elsewhere(elsewhere))
    for data in needed:
        if not data.path:
            key(data)  # raises UserError for a file that is not there
    if "finetune" in kinds:
        for task in tasks:
            texts.read(task.examples)


def _refuse_another(job: Job, tasks: Sequence[finetuning.FineTune], elsewhere: Elsewhere) -> None:
    """What is done is not done again, so it must be what the grid asks for."""
    if job.kind == "train":
        free = ["model.pad_token_id", *MAY_CHANGE]  # filled in by the run, and see there
        free += [key for key, asked in _to_be_filled(job.config) if not asked]
        free += ["data.sources", "data.tokenizer"] if job.config.data.path else []
        _compare(job.workdir, build, job.config, free)
    elif job.kind == "finetune":
        for task in tasks:
            free = ["recipe.max_length", *FILES_MAY_CHANGE]  # cut to the model's positions by the run
            _compare(job.workdir / task.examples.task, _fine_tune, task, free)
    else:
        _compare(job.workdir, _data, _elsewhere(elsewhere), ["path"])


def _data(raw: Mapping[str, Any]) -> Data:
    return construct(Data, raw)


def _elsewhere(elsewhere: Elsewhere, tokenizer: str = "") -> Data:
    """The rows of the other domain, for a run with the tokenizer in that directory."""
    data = load_config(anywhere(elsewhere.config), pairs(elsewhere.set)).data
    if not tokenizer:
        return data
    return dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, path=tokenizer))


def _to_be_filled(config: Config) -> tuple[tuple[str, int], ...]:
    return ("model.vocab_size", config.model.vocab_size), ("train.steps", config.train.steps)


def _fine_tune(raw: Mapping[str, Any]) -> finetuning.FineTune:
    return construct(finetuning.FineTune, raw)


def _compare(directory: Path, read: Callable[..., Any], config: Any, free: Sequence[str]) -> None:
    """Raises UserError where `directory` holds a config that differs in more than the keys `free`."""
    if not (directory / "config.json").exists():
        return
    theirs = flatten(to_dict(read(read_json(directory / "config.json"))))
    for key, asked in flatten(to_dict(config)).items():
        if not key.startswith(tuple(free)) and theirs.get(key) != asked:
            raise UserError(
                f"{directory}: {key} is {theirs.get(key)!r} there, {asked!r} in the study, expected the same "
                "(give the arm another name, or the study another --workdir)"
            )


def _run(
    grid: Grid, job: Job, by_name: dict[str, Job], tasks: Sequence[finetuning.FineTune], texts: "Texts"
) -> None:
    if job.kind == "train":
        from dwt_jax.train.loop import train

        train(job.config, job.workdir)
    elif job.kind == "finetune":
        from dwt_jax.finetune.runner import finetune

        step = None if job.step == END else job.step
        finetune(tasks, str(by_name[job.needs[0]].workdir), job.workdir, step, texts)
    else:
        _evaluate(grid, by_name[job.needs[0]], job.workdir)


def _evaluate(grid: Grid, trained: Job, workdir: Path) -> None:
    """config.json, documents.npz and last results.json of a finished run on text of another domain."""
    from dwt_jax.data.prepare import prepared
    from dwt_jax.eval import likelihood
    from dwt_jax.eval.evaluate_model import documents_of

    data = prepared(_elsewhere(grid.elsewhere, str(trained.workdir / "tokenizer")))
    found = documents_of(str(trained.workdir), data)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", to_dict(_elsewhere(grid.elsewhere)))
    likelihood.write(workdir / "documents.npz", found)
    identity = {"data_digest": read_json(data / "index.json")["digest"]}
    write_json(workdir / "results.json", {**likelihood.summarise(found), **identity})


def tasks_of(grid: Grid) -> list[finetuning.FineTune]:
    """The fine-tuning configs of a grid, one a task."""
    chosen = grid.finetuning
    if not chosen.config:
        return []
    return finetuning.load_tasks(anywhere(chosen.config), ",".join(chosen.tasks) or None, pairs(chosen.set))


def plan(grid: Grid, workdir: Path, costs: bool) -> str:
    """The jobs as a table, with what is done; with their costs, which takes jax and the data."""
    jobs = jobs_of(grid, workdir)
    rows = [("index", "job", "state", "needs", *(("FLOPs", "about") if costs else ()))]
    found = _costs(grid, jobs) if costs else [None] * len(jobs)
    for i, (job, cost) in enumerate(zip(jobs, found, strict=True)):
        begun = "begun" if job.workdir.exists() else "–"
        row = (str(i), job.name, "done" if job.is_done() else begun, ", ".join(job.needs) or "–")
        rows.append((*row, *(_shown(cost) if cost else ())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    if costs:
        left = [cost for job, cost in zip(jobs, found, strict=True) if cost and not job.is_done()]
        known = [cost.seconds for cost in left if cost.seconds is not None]
        unknown = f", and {len(left) - len(known)} of unknown length" if len(known) < len(left) else ""
        lines += ["", f"{len(left)} left: about {duration(sum(known))}{unknown}"]
    return "\n".join(lines)


def _shown(cost: Cost) -> tuple[str, str]:
    return (
        "unknown" if cost.flops is None else f"{cost.flops:.3g}",
        "unknown" if cost.seconds is None else duration(cost.seconds),
    )


Counted = tuple[finetuning.FineTune, int | None]  # and the number of its training examples

ASSUMED = 0.4
"""The share of the peak that is assumed while no run is finished."""


def _costs(grid: Grid, jobs: Sequence[Job]) -> list[Cost]:
    """FLOPs by formula; seconds at the rate of the finished runs, else at ASSUMED of the peak."""
    by_name = {job.name: job for job in jobs}
    from dwt_jax.finetune.collate import Texts

    tasks, texts = tasks_of(grid), Texts()
    counts = [_count(task, texts) for task in tasks]
    work = [_flops(list(zip(tasks, counts, strict=True)), job, by_name) for job in jobs]
    rate = _rate(jobs)
    return [Cost(flops, None if flops is None or rate is None else flops / rate) for flops in work]


def _flops(tasks: Sequence[Counted], job: Job, by_name: dict[str, Job]) -> float | None:
    if job.kind == "train":
        return _training_flops(job, by_name)
    return _finetuning_flops(tasks, job) if job.kind == "finetune" else None


def _count(config: finetuning.FineTune, texts: "Texts") -> int | None:
    """Training examples; None where they are not at hand, which is no reason not to plan."""
    try:
        return len(texts.read(config.examples).splits["train"])
    except UserError as error:
        print(f"{config.examples.task}: of unknown length: {error}", file=sys.stderr)
        return None


def _training_flops(job: Job, by_name: dict[str, Job]) -> float | None:
    """Student and the teacher's forward, as if it took part in every step."""
    from dwt_jax.models import flops
    from dwt_jax.objectives.masking import predictions_per_row

    config, train = job.config, job.config.train
    if not train.steps:
        return None
    length = config.data.sequence_length
    shape = train.batch_size, length, predictions_per_row(config.mask, length)
    total = flops.training_step(_sized(job), *shape)
    if config.teacher.path:
        teacher = next((by_name[name] for name in job.needs if config.teacher.path.endswith(name)), None)
        if teacher is None:
            return None
        total += flops.forward(_sized(teacher), *shape)
    return total * train.steps


def _sized(job: Job) -> Any:
    """Its model, with the vocabulary that its tokenizer is asked for where it is not known yet."""
    size = job.config.model.vocab_size or job.config.data.tokenizer.vocab_size
    return dataclasses.replace(job.config.model, vocab_size=size)


def _finetuning_flops(tasks: Sequence[Counted], job: Job) -> float | None:
    """At most: every example at the full length."""
    from dwt_jax.models import flops

    total = 0.0
    for config, count in tasks:
        if count is None:
            return None
        recipe = config.recipe
        one = 3 * flops.encoder(_sized(job), 1, recipe.max_length, wanted=1)
        total += one * count * recipe.epochs * len(recipe.seeds)
    return total


def _rate(jobs: Sequence[Job]) -> float | None:
    """FLOP/s. Of finished runs, by the median of what their steps took: a run may have been stopped and
    gone on, and may have shared its machine for a while."""
    work = seconds = 0.0
    for job in jobs:
        if job.kind == "train" and job.is_done():
            records = read(job.workdir / "metrics.jsonl")
            speeds = [one["tokens_per_second"] for one in records if one.get("tokens_per_second")]
            if speeds:
                summary, config = read_json(job.workdir / "summary.json"), job.config
                tokens = summary["steps"] * config.train.batch_size * config.data.sequence_length
                work += summary["flops"]["total"]
                seconds += tokens / statistics.median(speeds)
    if seconds:
        return work / seconds
    import jax

    from dwt_jax.models import flops

    print(f"no run is finished yet: {ASSUMED:.0%} of the peak is assumed", file=sys.stderr)
    peak = flops.peak_per_device("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return None if peak is None else ASSUMED * peak * jax.device_count()
