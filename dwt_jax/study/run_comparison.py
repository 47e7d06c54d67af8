"""Comparison of the finished runs in a directory: did the weak teacher help, and at what cost?

Reads only the runs' own files, with run_records.py; run_report.py makes the report.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dwt_jax.errors import UserError
from dwt_jax.eval.paired import paired_error
from dwt_jax.files import read_intact_json, read_json
from dwt_jax.logs import logger
from dwt_jax.runs.run_dir import RESUME_MUTABLE_KEYS
from dwt_jax.study.curves import TargetCrossing, steps_to_target
from dwt_jax.study.run_records import (
    RunRecord,
    find_run_directories,
    last_logged_step,
    read_finished_run,
    refers_to_run,
)
from dwt_jax.study.statistics import Verdict

RESULT_NEUTRAL_KEYS = (
    *RESUME_MUTABLE_KEYS,
    "precision.compute_dtype",  # `computed in` is the resolved dtype
    "precision.attention",  # run.attention is the resolved back end
)
"""Keys that do not change the results of a run."""

TREATMENT_KEYS = ("teacher.", "distill.")
"""Keys in which a distilled student differs from the baseline by design."""

MUST_MATCH_KEYS = ("model.", "mlm.", "train.steps", "run.data_digest", "held-out predictions")
"""Students that differ in these keys are not comparable."""

GROWTH_KEYS = ("model.weighted_norm", "model.gated_layers")
"""Keys that only a grown model has; they do not prevent a comparison."""

DOWNSTREAM_DIR = "downstream"
"""Directory of fine-tunings beside the runs, one per run (`dwt finetune --workdir=downstream/NAME`)."""


class SeedNoise(NamedTuple):
    """Range of the final losses of runs that differ only in their seed."""

    value: float  # largest difference between two of them, nats
    runs: tuple[RunRecord, ...]


class BaselineComparison(NamedTuple):
    """A distilled student compared with the baseline, a student without a teacher."""

    run: RunRecord
    difference: float  # held-out loss minus the baseline's: below 0 is better
    error: float | None  # standard error of the difference, paired by document
    verdict: Verdict
    reason: str  # of the verdict
    reach: TargetCrossing | None  # of the baseline's final loss; None: never
    differing_keys: tuple[str, ...]  # keys, other than the teacher's, in which the two differ


@dataclass(frozen=True)
class RunComparisonStudy:
    """All data of a report on a directory of runs."""

    title: str
    command: str
    seconds: float | None
    runs: tuple[RunRecord, ...]
    unfinished: tuple[tuple[str, int], ...]  # (name, last logged step)
    left_out: tuple[tuple[str, str], ...]  # (name, reason): finished runs that cannot be read
    baseline: RunRecord | None  # the student without a teacher
    noise: SeedNoise | None
    comparisons: tuple[BaselineComparison, ...]
    downstream: Mapping[str, Mapping[str, Any]]  # results.json of fine-tunings, by the run's name


def collect_runs(workdir: Path) -> RunComparisonStudy:
    """Collect all data of a report. Raises UserError if no run is finished."""
    directories = dict(find_run_directories(workdir))
    plan = read_json(workdir / "study.json") if (workdir / "study.json").exists() else {}
    if not isinstance(plan, dict):
        raise UserError(f"{workdir / 'study.json'}: {type(plan).__name__}, expected an object")
    finished = {name: path for name, path in directories.items() if (path / "summary.json").exists()}
    if not finished:
        raise UserError(f"{workdir}: no finished run below it, expected sub-directories with a summary.json")
    records, left_out = _read_runs(finished)
    runs = _assign_roles(records, plan)
    planned = [str(entry.get("name")) for entry in plan.get("runs", [])]
    ranks = {name: rank for rank, name in enumerate(planned)}
    runs.sort(key=lambda run: (ranks.get(run.name, len(ranks)), run.role != "teacher", run.name))
    missing = [name for name in (*planned, *directories) if name not in finished]
    unfinished = tuple((name, last_logged_step(directories.get(name))) for name in dict.fromkeys(missing))
    downstream = _read_downstream(workdir, runs, left_out)
    for name, reason in left_out.items():
        logger.warning(f"{name} is left out of the report: {reason}")
    by_name = {run.name: run for run in runs}
    baseline = by_name.get(str(plan["baseline"])) if plan.get("baseline") else _find_baseline(runs)
    noise = _seed_noise(runs, [by_name[name] for name in plan.get("noise_pair") or () if name in by_name])
    return RunComparisonStudy(
        title=str(plan.get("title") or f"Runs in {workdir.resolve().name}"),
        command=str(plan.get("command") or ""),
        seconds=plan.get("seconds"),
        runs=tuple(runs),
        unfinished=unfinished,
        left_out=tuple(left_out.items()),
        baseline=baseline,
        noise=noise,
        comparisons=tuple(
            compare_to_baseline(run, baseline, noise) for run in runs if baseline and run.is_distilled
        ),
        downstream=downstream,
    )


def _read_runs(directories: Mapping[str, Path]) -> tuple[list[RunRecord], dict[str, str]]:
    """Read finished runs. Returns them, and why others cannot be read, by name.

    Raises:
        UserError: none of them can be read.
    """
    records, left_out = [], {}
    for name, path in directories.items():
        try:
            records.append(read_finished_run(name, path))
        except UserError as error:
            left_out[name] = str(error)
        except (KeyError, TypeError) as error:
            left_out[name] = f"{path}: {type(error).__name__}: {error}, expected files that dwt wrote"
    if not records:
        raise UserError(next(iter(left_out.values())))
    return records, left_out


def _read_downstream(workdir: Path, runs: Sequence[RunRecord], left_out: dict[str, str]) -> dict[str, Any]:
    """Read the results of the runs' fine-tunings, by the run's name; those that are damaged are left out."""
    results = {}
    for run in runs:
        path = workdir / DOWNSTREAM_DIR / run.name / "results.json"
        result = read_intact_json(path)
        if result is not None:
            results[run.name] = result
        elif path.exists():
            left_out[f"{DOWNSTREAM_DIR}/{run.name}"] = f"{path}: damaged, expected JSON written by dwt"
    return results


def _assign_roles(runs: list[RunRecord], plan: Mapping[str, Any]) -> list[RunRecord]:
    """Set labels and roles from the plan. By default a run that another run names as teacher is one."""
    entries = {str(entry.get("name")): entry for entry in plan.get("runs", [])}
    teacher_paths = [Path(path) for run in runs for path in run.teacher_paths]
    labelled_runs = []
    for run in runs:
        entry = entries.get(run.name, {})
        is_teacher = run.name == plan.get("teacher") or any(
            refers_to_run(path, run) for path in teacher_paths
        )
        role = str(entry.get("role") or ("teacher" if is_teacher else "student"))
        teacher = " + ".join(
            next((other.name for other in runs if refers_to_run(Path(path), other)), path)
            for path in run.teacher_paths
        )
        label = str(entry.get("label") or run.name)
        labelled_runs.append(dataclasses.replace(run, label=label, role=role, teacher=teacher))
    return labelled_runs


def _find_baseline(runs: Sequence[RunRecord]) -> RunRecord | None:
    """Return the first run by name without teacher and growth, preferably of a distilled student's size."""
    candidates = [run for run in runs if not run.teacher_paths and not run.is_grown]
    candidates.sort(key=lambda run: run.name)
    sizes = [run.config["model"] for run in runs if run.is_distilled]
    students = [run for run in candidates if run.role == "student"]
    same_size = [run for run in students or candidates if run.config["model"] in sizes]
    return next(iter(same_size or students), None)


def differing_settings(a: RunRecord, b: RunRecord, ignored_prefixes: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the keys in which two runs differ, without those that do not change results."""
    a_settings, b_settings = a.settings(), b.settings()
    ignored = (*RESULT_NEUTRAL_KEYS, *ignored_prefixes)
    keys = [key for key in {**b_settings, **a_settings} if not key.startswith(ignored)]
    return tuple(key for key in keys if a_settings.get(key) != b_settings.get(key))


def _seed_noise(runs: Sequence[RunRecord], pair: Sequence[RunRecord]) -> SeedNoise | None:
    """Measure seed noise on the planned pair, or on the groups of runs that differ only in the seed.

    Of several groups the largest noise counts, to be conservative.
    """
    groups = [list(pair)] if len(pair) > 1 else []
    if not groups:
        remaining = [run for run in runs if run.role == "student"]
        while remaining:
            first = remaining[0]
            group = [run for run in remaining if differing_settings(first, run) in ((), ("seed",))]
            remaining = [run for run in remaining if run not in group]
            groups.append(group)
    noises = [
        SeedNoise(max(run.loss for run in group) - min(run.loss for run in group), tuple(group))
        for group in groups
        if len({run.config["seed"] for run in group}) > 1
        and all(math.isfinite(run.loss) for run in group)
        and not _differ_beyond_seed(group)
    ]
    return max(noises, key=lambda noise: noise.value, default=None)


def _differ_beyond_seed(group: Sequence[RunRecord]) -> bool:
    return any(differing_settings(a, b, ("seed",)) for a, b in itertools.combinations(group, 2))


def compare_to_baseline(run: RunRecord, baseline: RunRecord, noise: SeedNoise | None) -> BaselineComparison:
    """Compare a distilled student with the baseline.

    A difference counts if it is larger than the noise and, if the losses by document are known, than
    twice its standard error.
    """
    difference = run.loss - baseline.loss
    differing = differing_settings(run, baseline, (*TREATMENT_KEYS, "run.teacher_digest"))
    mismatches = [key for key in differing if key.startswith(MUST_MATCH_KEYS) and key not in GROWTH_KEYS]
    error = None if mismatches else paired_error(run.documents, baseline.documents)
    verdict = Verdict.HARMED if difference > 0 else Verdict.HELPED
    if mismatches:
        verdict, reason = Verdict.NOT_COMPARABLE, f"the two differ in {', '.join(mismatches)}"
    elif not math.isfinite(difference):
        verdict, reason = Verdict.NOT_COMPARABLE, "a loss is not finite"
    elif noise is None:
        verdict, reason = Verdict.UNDECIDED, "no two runs differ only in their seed, so the noise is unknown"
    elif abs(difference) <= noise.value:
        verdict, reason = Verdict.UNDECIDED, f"not larger than the noise, {noise.value:.4f}"
    elif error is not None and abs(difference) <= 2 * error:
        verdict, reason = (
            Verdict.UNDECIDED,
            f"larger than the noise, {noise.value:.4f}, but within two standard errors",
        )
    else:
        reason = f"larger than the noise, {noise.value:.4f}"
    crossing = None if mismatches else steps_to_target(run.evaluations, baseline.loss)
    return BaselineComparison(run, difference, error, verdict, reason, crossing, differing)
