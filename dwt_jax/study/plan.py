"""The jobs of a study as a table, with their state and an estimate of their cost (`dwt study --dry-run`)."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dwt_jax.config import Config
from dwt_jax.errors import UserError
from dwt_jax.files import read_json
from dwt_jax.finetune import config as finetuning
from dwt_jax.logs import logger
from dwt_jax.runs.metrics_file import read_jsonl
from dwt_jax.runs.peak_flops import peak_flops_per_device
from dwt_jax.study.runner import load_study_tasks
from dwt_jax.study.sweep import Job, Study, failed_jobs, study_jobs
from dwt_jax.text_format import format_duration, format_table

if TYPE_CHECKING:
    from dwt_jax.finetune.collate import ExampleCache


class Cost(NamedTuple):
    """Estimated cost of a job."""

    flops: float | None  # None if unknown before the data is prepared
    seconds: float | None


def format_plan(study: Study, workdir: Path, costs: bool) -> str:
    """Format the jobs as a table with their state and, optionally, their estimated cost.

    The estimate imports jax and reads the data of the tasks.
    """
    jobs = study_jobs(study, workdir)
    failed = failed_jobs(jobs)
    rows = [("index", "job", "state", "needs", *(("FLOPs", "estimate") if costs else ()))]
    estimates = _estimate_costs(study, jobs) if costs else [None] * len(jobs)
    for i, (job, cost) in enumerate(zip(jobs, estimates, strict=True)):
        state = "failed" if job.name in failed else "in progress" if job.workdir.exists() else "–"
        row = (str(i), job.name, "done" if job.is_done() else state, ", ".join(job.needs) or "–")
        rows.append((*row, *(_format_cost(cost) if cost else ())))
    lines = format_table(rows)
    if costs:
        ended = {*failed, *(job.name for job in jobs if job.is_done())}
        remaining = [
            cost for job, cost in zip(jobs, estimates, strict=True) if cost and job.name not in ended
        ]
        durations = [cost.seconds for cost in remaining if cost.seconds is not None]
        unknown_suffix = (
            f", and {len(remaining) - len(durations)} of unknown duration"
            if len(durations) < len(remaining)
            else ""
        )
        lines += [
            "",
            f"{len(remaining)} remaining: estimate {format_duration(sum(durations))}{unknown_suffix}",
        ]
    return "\n".join(lines)


def _format_cost(cost: Cost) -> tuple[str, str]:
    return (
        "unknown" if cost.flops is None else f"{cost.flops:.3g}",
        "unknown" if cost.seconds is None else format_duration(cost.seconds),
    )


TaskSize = tuple[finetuning.FinetuneConfig, int | None]  # config and number of training examples

ASSUMED_PEAK_SHARE = 0.4
"""Assumed share of peak FLOP/s until a run is finished."""


def _estimate_costs(study: Study, jobs: Sequence[Job]) -> list[Cost]:
    """Estimate FLOPs, and seconds at the rate of the finished runs, else at ASSUMED_PEAK_SHARE."""
    by_name = {job.name: job for job in jobs}
    from dwt_jax.finetune.collate import ExampleCache

    tasks, example_cache = load_study_tasks(study), ExampleCache()
    counts = [_count_train_examples(task, example_cache) for task in tasks]
    flops_by_job = [_job_flops(list(zip(tasks, counts, strict=True)), job, by_name) for job in jobs]
    rate = _flops_per_second(jobs)
    return [Cost(flops, None if flops is None or rate is None else flops / rate) for flops in flops_by_job]


def _job_flops(tasks: Sequence[TaskSize], job: Job, by_name: dict[str, Job]) -> float | None:
    if job.kind == "train":
        return _training_flops(job, by_name)
    return _finetuning_flops(tasks, job) if job.kind == "finetune" else None


def _count_train_examples(config: finetuning.FinetuneConfig, example_cache: "ExampleCache") -> int | None:
    """Count training examples; None if they cannot be read, which does not prevent planning."""
    try:
        return len(example_cache.read(config.examples).splits["train"])
    except UserError as error:
        logger.warning(f"{config.examples.task}: unknown number of examples: {error}")
        return None


def _training_flops(job: Job, by_name: dict[str, Job]) -> float | None:
    """Estimate the FLOPs of a run, assuming that the teacher is used in every step."""
    from dwt_jax.data.batch_ramp import count_rows
    from dwt_jax.models import flops
    from dwt_jax.objectives import objective_module
    from dwt_jax.runs.optimizer import optimizer_flops

    config, train = job.config, job.config.train
    if not train.steps:
        return None
    length = config.data.sequence_length
    model = _model_with_vocab_size(job)
    module = objective_module(model.objective)
    predictions = module.predictions_per_row(module.abstract_objective(config, model.vocab_size), length)
    shape = count_rows(train, train.steps), length, predictions  # of the run: FLOPs are linear in the rows
    total = flops.training_step_flops(model, *shape) + train.steps * optimizer_flops(config.optimizer, model)
    if config.teacher.model_paths:
        path = config.teacher.path  # '' for several teachers, which are not of the study
        teacher = next((by_name[name] for name in job.needs if path.endswith(name)), None)
        if teacher is None:
            return None
        total += flops.forward_flops(_model_with_vocab_size(teacher), *shape)
    return total


def _model_with_vocab_size(job: Job) -> Any:
    """Return the config of a job's model, with the requested vocabulary size if not known yet."""
    size = job.config.model.vocab_size or job.config.data.tokenizer.vocab_size
    return dataclasses.replace(job.config.model, vocab_size=size)


def _finetuning_flops(tasks: Sequence[TaskSize], job: Job) -> float | None:
    """Estimate an upper bound of the FLOPs: every example at full length."""
    from dwt_jax.models import family, flops

    total = 0.0
    for config, count in tasks:
        if count is None:
            return None
        recipe = config.recipe
        model = _model_with_vocab_size(job)
        output_positions = 1 if family(model).pools_first_token(model) else recipe.max_length
        flops_per_example = 3 * flops.encoder_flops(model, 1, recipe.max_length, output_positions)
        total += flops_per_example * count * recipe.epochs * len(recipe.seeds)
    return total


def _flops_per_second(jobs: Sequence[Job]) -> float | None:
    """Return the FLOP/s of the finished runs, else an assumption.

    The rate of a run is the median over its logged steps: it may have been interrupted, or have shared
    its machine for a while.
    """
    from dwt_jax.data.batch_ramp import count_rows

    total_flops = seconds = 0.0
    for job in jobs:
        if job.kind == "train" and job.is_done():
            records = read_jsonl(job.workdir / "metrics.jsonl")
            speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
            if speeds:
                summary, config = read_json(job.workdir / "summary.json"), job.config
                # Runs of earlier versions recorded no tokens per row.
                row_tokens = summary.get("data", {}).get("tokens_per_row", config.data.sequence_length)
                total_flops += summary["flops"]["total"]
                train = dataclasses.replace(config.train, steps=summary["steps"])  # resolved, from epochs
                seconds += count_rows(train, train.steps) * row_tokens / statistics.median(speeds)
    if seconds:
        return total_flops / seconds
    import jax

    from dwt_jax.train.setup import resolve_precision

    logger.warning(f"no run is finished yet: assuming {ASSUMED_PEAK_SHARE:.0%} of peak FLOP/s")
    peak = peak_flops_per_device(str(resolve_precision(Config()).compute_dtype))
    return None if peak is None else ASSUMED_PEAK_SHARE * peak * jax.device_count()
