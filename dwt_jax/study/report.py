"""What a folder of finished runs says: did the weak teacher help, and what did it cost?

Read from the runs' own files and nothing else. tables.py puts it into words and tables,
page.py makes the HTML, charts.py draws.
"""

import dataclasses
import itertools
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.config import Init
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.errors import UserError
from dwt_jax.eval.paired import paired_error
from dwt_jax.files import atomic_write, read_json
from dwt_jax.runs.metrics_file import read_jsonl, restore_nans, total_flops
from dwt_jax.runs.run_dir import RESUME_MUTABLE_KEYS
from dwt_jax.study import report_html, tables

RESULT_NEUTRAL_KEYS = (
    *RESUME_MUTABLE_KEYS,
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "precision.compute_dtype",  # `computed in` is what it came to
)
"""Keys that do not change what a run computes: runs may differ in them and be equal."""

TREATMENT_KEYS = ("teacher.", "distill.")
"""What distinguishes a distilled student from the student alone, by intention."""

MUST_MATCH_KEYS = ("model.", "mlm.", "train.steps", "run.data_digest", "held-out predictions")
"""Where two students differ in these, their losses cannot be compared at all."""

GROWTH_KEYS = ("model.weighted_norm", "model.gated_layers")
"""Keys of the model that say how it was grown: in the end it is an ordinary one."""


DOWNSTREAM_DIR = "downstream"
"""The folder beside the runs that may hold their fine-tunings, each by the name of its run (`dwt finetune
--workdir=downstream/NAME`)."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run, as its directory describes it."""

    name: str  # of its directory, below the study's
    label: str
    role: str  # teacher or student
    teacher: str  # the name of the run that taught it, or whatever path its config gives; '' for none
    path: Path
    config: Mapping[str, Any]
    identity: Mapping[str, Any]  # run.json
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]  # by step, the last one included
    documents: tuple[np.ndarray, np.ndarray] | None  # sums of the loss, predictions; by held-out document

    @property
    def loss(self) -> float:
        """Held-out, at the end, in nats."""
        return self.summary["held_out"]["held_out_loss"]

    @property
    def teacher_path(self) -> str:
        return self.config["teacher"]["path"]

    @property
    def distilled(self) -> bool:
        return self.role == "student" and bool(self.teacher_path)

    @property
    def grown(self) -> bool:
        return bool(self.config.get("init", {}).get("method"))

    def settings(self) -> dict[str, Any]:
        """Everything that it was run with and on, by dotted key."""
        identity = {f"run.{key}": value for key, value in self.identity.items()}
        return {
            **flatten_dict({"init": config_to_dict(Init())}),  # runs that are older than it
            **flatten_dict(self.config),
            **identity,
            "held-out predictions": self.summary["held_out"].get("predictions"),
            "computed in": self.summary.get("compute", self.config["precision"]["compute_dtype"]),
        }


class SeedNoise(NamedTuple):
    """How far apart runs end that differ by their seed alone."""

    value: float  # the largest difference between two of them, nats
    runs: tuple[RunRecord, ...]


class TargetCrossing(NamedTuple):
    """Where a curve first comes down to a loss, interpolated between two evaluations."""

    steps: float
    flops: float  # student and the teacher's forward
    at_most: bool  # it was there at the first evaluation already


class BaselineComparison(NamedTuple):
    """A distilled student against the student alone."""

    run: RunRecord
    difference: float  # held-out loss minus that of the student alone: below 0 is better
    error: float | None  # standard error of the difference, paired by document
    verdict: str  # one of tables.VERDICTS
    why: str  # what decided, or what stands in the way
    reach: TargetCrossing | None  # of the final loss of the student alone; None: never
    unequal: tuple[str, ...]  # keys beside the teacher in which the two differ


@dataclass(frozen=True)
class RunComparisonStudy:
    workdir: Path
    title: str
    command: str
    seconds: float | None
    runs: tuple[RunRecord, ...]
    unfinished: tuple[tuple[str, int], ...]  # (name, last logged step)
    baseline: RunRecord | None  # the student alone
    noise: SeedNoise | None
    comparisons: tuple[BaselineComparison, ...]
    downstream: Mapping[str, Mapping[str, Any]]  # results.json of fine-tunings, by the run's name


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Write report.html, and report.md and report.csv beside it. → the path of the HTML file

    `workdir`: its sub-directories (or theirs) are runs; an optional `study.json` in it says what
    is what, see docs/architecture.md. `out`: another name ending in .html, or a directory.
    Raises UserError if no run is finished.
    """
    target = report_path(workdir, out)
    study = collect_runs(workdir)
    renders = {
        ".csv": tables.report_csv,
        ".md": tables.report_markdown,
        ".html": report_html.render_report_html,
    }
    write_report_files(target, {suffix: render(study) for suffix, render in renders.items()})
    return target


def write_report_files(target: Path, texts: Mapping[str, str]) -> None:
    """Each beside `target`, with its own suffix: all are made before the first is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with atomic_write(target.with_suffix(suffix)) as partial:
            partial.write_text(text, encoding="utf-8")


def report_path(workdir: Path, out: Path | None) -> Path:
    """Of the HTML file. Raises UserError for another kind of file."""
    target = workdir / "report.html" if out is None else out
    if target.is_dir():
        target = target / "report.html"
    if target.suffix != ".html":
        raise UserError(f"--out: {target}, expected a name that ends in .html, or a directory")
    return target


def collect_runs(workdir: Path) -> RunComparisonStudy:
    """Everything the report says, as data."""
    directories = dict(_run_directories(workdir))
    plan = read_json(workdir / "study.json") if (workdir / "study.json").exists() else {}
    if not isinstance(plan, dict):
        raise UserError(f"{workdir / 'study.json'}: {type(plan).__name__}, expected an object")
    found = {name: path for name, path in directories.items() if (path / "summary.json").exists()}
    if not found:
        raise UserError(f"{workdir}: no finished run below it, expected sub-directories with a summary.json")
    runs = _assign_roles([_read_run(name, path) for name, path in found.items()], plan)
    planned = [str(entry.get("name")) for entry in plan.get("runs", [])]
    places = {name: rank for rank, name in enumerate(planned)}
    runs.sort(key=lambda run: (places.get(run.name, len(places)), run.role != "teacher", run.name))
    missing = [name for name in (*planned, *directories) if name not in found]
    unfinished = tuple((name, _last_step(directories.get(name))) for name in dict.fromkeys(missing))
    by_name = {run.name: run for run in runs}
    baseline = by_name.get(str(plan["baseline"])) if plan.get("baseline") else _find_baseline(runs)
    noise = _seed_noise(runs, [by_name[name] for name in plan.get("noise_pair") or () if name in by_name])
    return RunComparisonStudy(
        workdir=workdir,
        title=str(plan.get("title") or f"Runs in {workdir.resolve().name}"),
        command=str(plan.get("command") or ""),
        seconds=plan.get("seconds"),
        runs=tuple(runs),
        unfinished=unfinished,
        baseline=baseline,
        noise=noise,
        comparisons=tuple(
            compare_to_baseline(run, baseline, noise) for run in runs if baseline and run.distilled
        ),
        downstream={
            run.name: read_json(path)
            for run in runs
            if (path := workdir / DOWNSTREAM_DIR / run.name / "results.json").exists()
        },
    )


def _run_directories(workdir: Path) -> Iterator[tuple[str, Path]]:
    """Run directories below `workdir`, at most two levels down, with their names.

    A run's own sub-directories are not searched: `model/` has a config.json too.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such directory, expected one whose sub-directories are runs")
    if _is_run(workdir):
        raise UserError(f"{workdir}: is itself a run, expected the directory that holds the runs")
    for child in sorted(workdir.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        inside = [child] if _is_run(child) else sorted(path for path in child.iterdir() if _is_run(path))
        yield from ((path.relative_to(workdir).as_posix(), path) for path in inside)


def _is_run(path: Path) -> bool:
    """Whether it is a pre-training run's directory (other jobs write a summary too)."""
    if not path.is_dir() or path.name.startswith(".") or not (path / "config.json").exists():
        return False
    if (path / "summary.json").exists():
        config, summary = read_json(path / "config.json"), read_json(path / "summary.json")
        return {"distill", "model"} <= set(config) and {"held_out", "flops"} <= set(summary)
    return (path / "run.json").exists()


def _read_run(name: str, path: Path) -> RunRecord:
    summary = read_json(path / "summary.json")
    last = summary["held_out"] = restore_nans(summary["held_out"])
    by_step = {record["step"]: record for record in read_jsonl(path / "evaluations.jsonl")}
    by_step.setdefault(summary["steps"], {**last, "step": summary["steps"]})
    return RunRecord(
        name=name,
        label=name,
        role="student",
        teacher="",
        path=path,
        config=read_json(path / "config.json"),
        identity=read_json(path / "run.json") if (path / "run.json").exists() else {},
        summary=summary,
        metrics=read_jsonl(path / "metrics.jsonl"),
        evaluations=[by_step[step] for step in sorted(by_step)],
        documents=read_document_losses(path / "documents.npz"),
    )


def read_document_losses(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return arrays["loss"].astype(np.float64), arrays["count"].astype(np.float64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {error}, expected the arrays loss and count") from None


def _last_step(path: Path | None) -> int:
    records = read_jsonl(path / "metrics.jsonl") if path else []
    return records[-1]["step"] if records else 0


def _assign_roles(runs: list[RunRecord], plan: Mapping[str, Any]) -> list[RunRecord]:
    """Labels and roles from the plan; else whoever is another run's teacher is a teacher."""
    entries = {str(entry.get("name")): entry for entry in plan.get("runs", [])}
    taught = [Path(run.teacher_path) for run in runs if run.teacher_path]
    done = []
    for run in runs:
        entry = entries.get(run.name, {})
        is_teacher = run.name == plan.get("teacher") or any(refers_to_run(path, run) for path in taught)
        role = str(entry.get("role") or ("teacher" if is_teacher else "student"))
        path = run.teacher_path
        teacher = next((other.name for other in runs if path and refers_to_run(Path(path), other)), path)
        label = str(entry.get("label") or run.name)
        done.append(dataclasses.replace(run, label=label, role=role, teacher=teacher))
    return done


def refers_to_run(path: Path, run: RunRecord) -> bool:
    """Whether `path`, a teacher's, is this run's directory or its model.

    Paths are relative to where the run was started, and folders move: what counts, if the
    path leads nowhere, is how it ends.
    """
    if path.name == "model":
        path = path.parent
    if path.exists():
        return path.resolve() == run.path.resolve()
    mine = Path(run.name).parts
    return path.parts[-len(mine) :] == mine


def _find_baseline(runs: Sequence[RunRecord]) -> RunRecord | None:
    """The student alone and from nothing: first by name, of a distilled student's size if there is one."""
    alone = sorted((run for run in runs if not run.teacher_path and not run.grown), key=lambda run: run.name)
    sizes = [run.config["model"] for run in runs if run.distilled]
    students = [run for run in alone if run.role == "student"]
    same_size = [run for run in students or alone if run.config["model"] in sizes]
    return next(iter(same_size or students), None)


def differing_settings(a: RunRecord, b: RunRecord, apart_from: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Keys of what `a` and `b` were run with that differ and matter."""
    ours, theirs = a.settings(), b.settings()
    ignored = (*RESULT_NEUTRAL_KEYS, *apart_from)
    keys = [key for key in {**theirs, **ours} if not key.startswith(ignored)]
    return tuple(key for key in keys if ours.get(key) != theirs.get(key))


def _seed_noise(runs: Sequence[RunRecord], pair: Sequence[RunRecord]) -> SeedNoise | None:
    """From the planned pair, or from the group of runs equal but for the seed that ends the
    farthest apart: rather too much noise than too little."""
    groups = [list(pair)] if len(pair) > 1 else []
    if not groups:
        left = [run for run in runs if run.role == "student"]
        while left:
            first = left[0]
            same = [run for run in left if differing_settings(first, run) in ((), ("seed",))]
            left = [run for run in left if run not in same]
            groups.append(same)
    found = [
        SeedNoise(max(run.loss for run in group) - min(run.loss for run in group), tuple(group))
        for group in groups
        if len({run.config["seed"] for run in group}) > 1
        and all(math.isfinite(run.loss) for run in group)
        and not _differ_beyond_seed(group)
    ]
    return max(found, key=lambda noise: noise.value, default=None)


def _differ_beyond_seed(group: Sequence[RunRecord]) -> bool:
    return any(differing_settings(a, b, ("seed",)) for a, b in itertools.combinations(group, 2))


def compare_to_baseline(run: RunRecord, baseline: RunRecord, noise: SeedNoise | None) -> BaselineComparison:
    """A distilled student against the student alone.

    A difference counts if it is larger than the noise and, where the losses are known by
    document, than twice its standard error.
    """
    difference = run.loss - baseline.loss
    differing = differing_settings(run, baseline, (*TREATMENT_KEYS, "run.teacher_digest"))
    fatal = [key for key in differing if key.startswith(MUST_MATCH_KEYS) and key not in GROWTH_KEYS]
    error = None if fatal else paired_error(run.documents, baseline.documents)
    verdict = "harmed" if difference > 0 else "helped"
    if fatal:
        verdict, why = "not comparable", f"the two differ in {', '.join(fatal)}"
    elif not math.isfinite(difference):
        verdict, why = "not comparable", "one of them is not a number"
    elif noise is None:
        verdict, why = "undecided", "no two runs differ by their seed alone, so the noise is unknown"
    elif abs(difference) <= noise.value:
        verdict, why = "undecided", f"not more than the noise, {noise.value:.4f}"
    elif error is not None and abs(difference) <= 2 * error:
        verdict, why = "undecided", f"more than the noise, {noise.value:.4f}, but within two standard errors"
    else:
        why = f"more than the noise, {noise.value:.4f}"
    reached = None if fatal else steps_to_target(run.evaluations, baseline.loss)
    return BaselineComparison(run, difference, error, verdict, why, reached, differing)


def steps_to_target(evaluations: Sequence[Mapping[str, Any]], loss: float) -> TargetCrossing | None:
    """Where the held-out loss first came down to `loss`; None: never."""
    before = None
    for record in evaluations:
        if not math.isfinite(record["held_out_loss"]):
            continue
        if record["held_out_loss"] <= loss:
            if before is None:
                return TargetCrossing(record["step"], total_flops(record), at_most=True)
            share = (before["held_out_loss"] - loss) / (before["held_out_loss"] - record["held_out_loss"])
            steps = before["step"] + share * (record["step"] - before["step"])
            return TargetCrossing(
                steps,
                total_flops(before) + share * (total_flops(record) - total_flops(before)),
                at_most=False,
            )
        before = record
    return None
