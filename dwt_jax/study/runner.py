"""Run the jobs of a study, all or a single one, and estimate their cost (`dwt study`).

Every job has a directory that can be resumed and rejects another config. So the runner has no state of its
own: it checks which directories are done.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.config import Config, Data
from dwt_jax.config_loader import (
    build_config,
    build_dataclass,
    config_to_dict,
    flatten_dict,
    load_data_config,
)
from dwt_jax.distributed.shutdown import TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json, read_json, write_json
from dwt_jax.finetune import config as finetuning
from dwt_jax.logs import logger
from dwt_jax.runs.run_dir import RESUME_MUTABLE_KEYS
from dwt_jax.study import extra_results, manifest
from dwt_jax.study.job_lock import job_lock
from dwt_jax.study.pair_jobs import PairSets
from dwt_jax.study.provenance import ProvenanceChecker
from dwt_jax.study.sweep import (
    FAILURE_FILE,
    FINAL_STEP,
    Job,
    OutOfDomain,
    Study,
    failed_jobs,
    parse_overrides,
    study_jobs,
)

if TYPE_CHECKING:
    from dwt_jax.finetune.collate import ExampleCache

POLL_SECONDS = 5.0  # between two looks at jobs that other processes run

EXAMPLE_PATH_KEYS = tuple(
    f"examples.{key}" for key in ("path", "train", "dev", "test")
)  # see finetune/run.py


def run_study(
    study: Study, workdir: Path, index: int | None = None, on_job_done: Callable[[Job], None] = lambda _: None
) -> bool:
    """Run the jobs of a study that are not done.

    Several processes may run one study: each takes the jobs that no other is running, and waits at the
    end for those of the others.

    Args:
        study: the config.
        workdir: directory of the study.
        index: run only the job with this index.
        on_job_done: called after each job that was run.

    Returns:
        Whether nothing remains to be run. Jobs that fail for good, e.g. of runs that diverge, do not count:
        they are recorded (see `failed_jobs`), and neither they nor those that need them are run again.

    Raises:
        UserError: for an invalid study, missing inputs, or a directory with a run of another config;
            nothing is written in that case.
        Preempted: after a signal.
    """
    from dwt_jax.finetune.collate import ExampleCache

    jobs = study_jobs(study, workdir)
    by_name = {job.name: job for job in jobs}
    selected_jobs = jobs if index is None else (_job_at(jobs, index),)
    tasks, example_cache, provenance = load_study_tasks(study), ExampleCache(), ProvenanceChecker(by_name)
    pair_sets = PairSets(study.pairs)
    for job in jobs:
        _check_same_config(job, tasks, study.out_of_domain)
        pair_sets.check(job)
        provenance.check(job)
    failed = failed_jobs(jobs)
    for name, reason in failed.items():
        logger.warning(f"study: {name} is skipped: {reason} (remove its directory to run it again)")
    jobs_to_run = [job for job in selected_jobs if not job.is_done() and job.name not in failed]
    _check_inputs(jobs_to_run, tasks, study.out_of_domain, example_cache)
    if any(job.kind == "pairs" for job in jobs_to_run):
        pair_sets.read_all()
    workdir.mkdir(parents=True, exist_ok=True)
    manifest.write_manifest(study, jobs, workdir)

    def run_job(job: Job) -> None:
        logger.info(f"study: {jobs.index(job) + 1} of {len(jobs)}, {job.name}")
        provenance.record(job)
        try:
            _run_job(study, job, by_name, tasks, example_cache, pair_sets)
        except TrainingFailed as failure:
            logger.warning(f"study: {job.name} failed, other jobs continue: {failure}")
            write_json(job.workdir / FAILURE_FILE, {"reason": str(failure)})
        extra_results.write_masked_words(study, jobs, workdir)
        on_job_done(job)

    _run_or_wait(jobs, jobs_to_run, provenance, run_job)
    failed = failed_jobs(jobs)
    if not all(job.is_done() or job.name in failed for job in jobs):
        return False
    extra_results.write_bag_of_words(study, tasks, example_cache, workdir)
    extra_results.write_masked_words(study, jobs, workdir)
    return True


def _job_at(jobs: Sequence[Job], index: int) -> Job:
    """Return the job with a number; its dependencies must be finished."""
    if not 0 <= index < len(jobs):
        raise UserError(f"--index is {index}, expected from 0 to {len(jobs) - 1}")
    unfinished = [job.name for job in jobs if job.name in jobs[index].needs and not job.is_done()]
    if unfinished:
        raise UserError(
            f"--index is {index}, {jobs[index].name}: expected {unfinished[0]} to be finished first"
        )
    return jobs[index]


def _run_or_wait(
    jobs: Sequence[Job],
    jobs_to_run: Sequence[Job],
    provenance: ProvenanceChecker,
    run_job: Callable[[Job], None],
) -> None:
    """Run jobs, and wait for jobs of other processes: these may be interrupted, or be dependencies."""
    waited_for = set()
    while name := _run_unlocked_jobs(jobs, jobs_to_run, provenance, run_job):
        if name not in waited_for:
            logger.info(f"study: waiting for {name}, which another process runs")
            waited_for.add(name)
        time.sleep(POLL_SECONDS)


def _run_unlocked_jobs(
    jobs: Sequence[Job],
    jobs_to_run: Sequence[Job],
    provenance: ProvenanceChecker,
    run_job: Callable[[Job], None],
) -> str:
    """Run jobs that are not done, whose dependencies are, and that no other process runs.

    Returns:
        The name of a job that another process runs; '' for none.
    """
    by_name = {job.name: job for job in jobs}
    locked_name = ""
    for job in jobs:
        provenance.check(job)  # again: its sources may have finished only now
        if job not in jobs_to_run or job.name in failed_jobs(jobs):
            continue
        if job.is_done() or not all(by_name[name].is_done() for name in job.needs):
            continue
        with job_lock(job) as is_locked:
            if not is_locked:
                locked_name = locked_name or job.name
            elif not job.is_done():  # another process may have finished it just now
                run_job(job)
    return locked_name


def _check_inputs(
    jobs: Sequence[Job],
    tasks: Sequence[finetuning.FinetuneConfig],
    out_of_domain: OutOfDomain,
    example_cache: "ExampleCache",
) -> None:
    """Check the inputs of all jobs before the first one starts, instead of hours later."""
    from dwt_jax.data.cache_key import data_cache_key

    kinds = {job.kind for job in jobs}
    datasets = {job.config.data for job in jobs if job.kind == "train"}
    if "evaluate" in kinds:
        datasets.add(_out_of_domain_data(out_of_domain))
    for data in datasets:
        if not data.path:
            data_cache_key(data)  # raises UserError for a file that is not there
    if "finetune" in kinds:
        for task in tasks:
            example_cache.read(task.examples)


def _check_same_config(
    job: Job, tasks: Sequence[finetuning.FinetuneConfig], out_of_domain: OutOfDomain
) -> None:
    """Raise UserError if a job's directory has another config than the study."""
    if job.kind == "train":
        ignored_keys = ["model.pad_token_id", *RESUME_MUTABLE_KEYS]  # set by the run
        ignored_keys += [key for key, config_value in _derived_values(job.config) if not config_value]
        ignored_keys += ["data.sources", "data.tokenizer"] if job.config.data.path else []
        _check_config_matches(job.workdir, build_config, job.config, ignored_keys)
    elif job.kind == "finetune":
        for task in tasks:
            # The run reduces max_length to the model's positions.
            ignored_keys = ["recipe.max_length", *EXAMPLE_PATH_KEYS]
            _check_config_matches(
                job.workdir / task.examples.task, _construct_finetune_config, task, ignored_keys
            )
    elif job.kind == "evaluate":
        _check_config_matches(job.workdir, _construct_data, _out_of_domain_data(out_of_domain), ["path"])


def _construct_data(raw: Mapping[str, Any]) -> Data:
    return build_dataclass(Data, raw)


def _out_of_domain_data(out_of_domain: OutOfDomain, tokenizer: str = "") -> Data:
    """Return the data config of the out-of-domain text, with the tokenizer in a run's directory."""
    data = load_data_config(out_of_domain.config, parse_overrides(out_of_domain.set))
    if not tokenizer:
        return data
    return dataclasses.replace(data, tokenizer=dataclasses.replace(data.tokenizer, path=tokenizer))


def _derived_values(config: Config) -> tuple[tuple[str, int], ...]:
    return ("model.vocab_size", config.model.vocab_size), ("train.steps", config.train.steps)


def _construct_finetune_config(raw: Mapping[str, Any]) -> finetuning.FinetuneConfig:
    return build_dataclass(finetuning.FinetuneConfig, raw)


def _check_config_matches(
    directory: Path, parse_config: Callable[..., Any], config: Any, ignored_keys: Sequence[str]
) -> None:
    """Raise UserError if the config in `directory` differs in more than `ignored_keys` (prefixes)."""
    if read_intact_json(directory / "config.json") is None:  # a damaged one is written again
        return
    run_config = flatten_dict(config_to_dict(parse_config(read_json(directory / "config.json"))))
    study_config = flatten_dict(config_to_dict(config))
    for key in {**study_config, **run_config}:  # of a list, one may have more items
        run_value, study_value = run_config.get(key), study_config.get(key)
        if not key.startswith(tuple(ignored_keys)) and run_value != study_value:
            raise UserError(
                f"{directory}: {key} is {run_value!r}, expected {study_value!r} as in the study "
                "(give the arm another name, or the study another --workdir)"
            )


def _run_job(
    study: Study,
    job: Job,
    by_name: dict[str, Job],
    tasks: Sequence[finetuning.FinetuneConfig],
    example_cache: "ExampleCache",
    pair_sets: PairSets,
) -> None:
    if job.kind == "train":
        from dwt_jax.train.loop import train

        train(job.config, job.workdir)
    elif job.kind == "finetune":
        from dwt_jax.finetune.runner import finetune_tasks

        step = None if job.step == FINAL_STEP else job.step
        finetune_tasks(tasks, str(by_name[job.needs[0]].workdir), job.workdir, step, example_cache)
    elif job.kind == "pairs":
        pair_sets.run(job, by_name[job.needs[0]].workdir)
    else:
        _evaluate_out_of_domain(study, by_name[job.needs[0]], job.workdir)


def _evaluate_out_of_domain(study: Study, source_job: Job, workdir: Path) -> None:
    """Evaluate a run on out-of-domain text: write config.json, documents.npz and, last, results.json."""
    from dwt_jax.data.data_cache import get_prepared
    from dwt_jax.eval import likelihood
    from dwt_jax.eval.evaluate_model import evaluate_documents

    data = get_prepared(_out_of_domain_data(study.out_of_domain, str(source_job.workdir / "tokenizer")))
    document_losses, metrics = evaluate_documents(str(source_job.workdir), data)
    workdir.mkdir(parents=True, exist_ok=True)
    if problem := likelihood.loss_problem(metrics):
        raise TrainingFailed(f"{workdir}: {problem}, expected {likelihood.EXPECTED_LOSS}")
    write_json(workdir / "config.json", config_to_dict(_out_of_domain_data(study.out_of_domain)))
    likelihood.write_document_losses(workdir / "documents.npz", document_losses)
    identity = {"data_digest": read_json(data / "index.json")["digest"]}
    write_json(workdir / "results.json", {**metrics, **identity})


def load_study_tasks(study: Study) -> list[finetuning.FinetuneConfig]:
    """Load the fine-tuning configs of a study, one per task."""
    finetuning_section = study.finetuning
    if not finetuning_section.config:
        return []
    return finetuning.load_task_configs(
        finetuning_section.config,
        ",".join(finetuning_section.tasks) or None,
        parse_overrides(finetuning_section.set),
    )
