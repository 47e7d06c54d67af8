"""What the finished runs of a grid say: values by seed, differences with intervals, claims judged.

Read from the runs' own files; grid_page.py and grid_tables.py show it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.runs.metric_writer import read, spent
from dwt_jax.runs.run_dir import read_json
from dwt_jax.study import manifest
from dwt_jax.study.report import Reach, reach, read_documents
from dwt_jax.study.statistics import Documents, Interval, of_losses, of_scores
from dwt_jax.study.sweep import END, LOSSES, Arm, Claim, Grid, Place

LOSS, ELSEWHERE = LOSSES
AVERAGE = "average"  # over tasks


class Trained(NamedTuple):
    """One finished pre-training run."""

    summary: Mapping[str, Any]
    evaluations: tuple[Mapping[str, Any], ...]  # by step, the last one included
    documents: Documents | None


@dataclass(frozen=True)
class Measured:
    """All that is known of one arm: by seed, and of its fine-tunings by (seed, step)."""

    arm: Arm
    runs: Mapping[int, Trained]
    elsewhere: Mapping[int, Documents]
    scores: Mapping[tuple[int, int], Mapping[str, tuple[float, ...]]]  # {task: last epoch, by seed of it}
    planned: Mapping[float, int]  # {share of the steps: the checkpoint that is fine-tuned there}

    def steps(self) -> tuple[int, ...]:
        """At which it was fine-tuned, END last."""
        return tuple(sorted({step for _, step in self.scores}, key=lambda step: (step == END, step)))


class Judged(NamedTuple):
    claim: Claim
    interval: Interval | None  # None: not both arms are there, or not on the same text
    verdict: str  # confirmed, contradicted, undecided or not comparable


@dataclass(frozen=True)
class Outcome:
    grid: Grid
    workdir: Path
    arms: Mapping[str, Measured]
    done: int
    jobs: int
    judged: tuple[Judged, ...]


def gather(workdir: Path) -> Outcome:
    """Raises UserError for a directory that holds no study."""
    if not (workdir / manifest.NAME).exists():
        raise UserError(f"{workdir}: no {manifest.NAME}, expected the directory of a dwt study")
    grid, jobs = manifest.read(workdir)
    arms = {arm.name: _measured(arm, jobs) for arm in grid.arms}
    return Outcome(
        grid=grid,
        workdir=workdir,
        arms=arms,
        done=sum(job.is_done() for job in jobs),
        jobs=len(jobs),
        judged=tuple(judge(claim, grid, arms) for claim in grid.claims),
    )


def _measured(arm: Arm, jobs: tuple[Place, ...]) -> Measured:
    planned = {job.share: job.step for job in jobs if job.arm == arm.name and job.kind == "finetune"}
    mine = [job for job in jobs if job.arm == arm.name and job.is_done()]
    runs = {job.seed: _trained(job.workdir) for job in mine if job.kind == "train"}
    scores = {(job.seed, job.step): _scores(job) for job in mine if job.kind == "finetune"}
    elsewhere = {job.seed: _documents(job.workdir, "results.json") for job in mine if job.kind == "evaluate"}
    kept = {seed: found for seed, found in elsewhere.items() if found}
    return Measured(arm, runs, kept, scores, planned)


def _trained(workdir: Path) -> Trained:
    summary = read_json(workdir / "summary.json")
    by_step = {record["step"]: record for record in read(workdir / "evaluations.jsonl")}
    evaluations = tuple(by_step[step] for step in sorted(by_step))
    return Trained(summary, evaluations, _documents(workdir, "run.json"))


def _documents(workdir: Path, identity: str) -> Documents | None:
    """identity: the file that has the digest of the held-out text."""
    found = read_documents(workdir / "documents.npz")
    return None if found is None else Documents(*found, read_json(workdir / identity).get("data_digest", ""))


def _scores(job: Place) -> Mapping[str, tuple[float, ...]]:
    """By task, and their average: the last epoch's, so that nothing was chosen on the dev set."""
    results = {task: read_json(job.workdir / task / "results.json") for task in job.tasks}
    found = {task: tuple(one["last"]["by_seed"]) for task, one in results.items()}
    if len({len(values) for values in found.values()}) == 1:
        found[AVERAGE] = tuple(float(x) for x in np.mean(list(found.values()), axis=0))
    return found


def by_document(measured: Measured, measure: str) -> dict[int, Documents]:
    """A loss by seed."""
    if measure == ELSEWHERE:
        return dict(measured.elsewhere)
    return {seed: run.documents for seed, run in measured.runs.items() if run.documents is not None}


def difference(ours: Measured, theirs: Measured, measure: str, step: int = END) -> Interval | None:
    """ours − theirs over the seeds that both have; None where there is none, or nothing to pair: another
    held-out text, other seeds of fine-tuning."""
    if measure in LOSSES:
        mine, other = by_document(ours, measure), by_document(theirs, measure)
        seeds = sorted(set(mine) & set(other))
        runs = [found[seed] for found in (mine, other) for seed in seeds]
        if not seeds or not all(run.same_text(runs[0]) for run in runs):
            return None
        return of_losses([mine[s] for s in seeds], [other[s] for s in seeds])
    keys = [key for key in ours.scores if key[1] == step and key in theirs.scores]
    both = [(ours.scores[key].get(measure, ()), theirs.scores[key].get(measure, ())) for key in sorted(keys)]
    if not both or len({len(values) for pair in both for values in pair}) != 1 or not both[0][0]:
        return None
    return of_scores(np.array([a for a, _ in both]), np.array([b for _, b in both]))


def judge(claim: Claim, grid: Grid, arms: Mapping[str, Measured]) -> Judged:
    """confirmed or contradicted where both intervals lie on one side of 0."""
    ours, theirs = arms[claim.arm], arms[claim.against or grid.baseline]
    # Where one of the two trains for longer, their checkpoints of one share are different steps.
    steps = {END} if claim.measure in LOSSES else {arm.planned.get(claim.at) for arm in (ours, theirs)}
    step = steps.pop()
    interval = None if steps or step is None else difference(ours, theirs, claim.measure, step)
    if interval is None:
        return Judged(claim, None, "not comparable")
    better = -interval.sign if claim.measure in LOSSES else interval.sign
    expected = 1 if claim.expected == "better" else -1
    return Judged(
        claim, interval, {expected: "confirmed", -expected: "contradicted"}.get(better, "undecided")
    )


def curve(measured: Measured) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean FLOPs, mean held-out loss) over the seeds, at the steps where all of them have a finite
    loss."""
    by_run = [
        {record["step"]: record for record in run.evaluations if math.isfinite(record["held_out_loss"])}
        for run in measured.runs.values()
    ]
    if not by_run:
        return [], [], []
    steps = sorted(set.intersection(*(set(records) for records in by_run)))
    flops, losses = (
        [float(np.mean([value(records[step]) for records in by_run])) for step in steps]
        for value in (spent, lambda record: record["held_out_loss"])
    )
    return [float(s) for s in steps], flops, losses


class Quality(NamedTuple):
    """What an arm ends with, and what it cost."""

    arm: str
    flops: float  # student and the teacher's forward, mean over seeds
    scores: tuple[float, ...]  # average over tasks, 0 to 1, by seed

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


def quality(arms: Mapping[str, Measured]) -> list[Quality]:
    """Of the arms, teachers too, that are fine-tuned at their end; seeds of which both the run and a finite
    average are there."""
    found = []
    for name, measured in arms.items():
        by_seed = {
            seed: float(np.mean(scores[AVERAGE]))
            for (seed, step), scores in sorted(measured.scores.items())
            if step == END and AVERAGE in scores and seed in measured.runs
        }
        kept = {seed: score for seed, score in by_seed.items() if np.isfinite(score)}
        if kept:
            flops = float(np.mean([measured.runs[seed].summary["flops"]["total"] for seed in kept]))
            found.append(Quality(name, flops, tuple(kept.values())))
    return found


def front(points: Sequence[Quality]) -> list[Quality]:
    """The Pareto front by the means, cheapest first: those that no other one matches for less, or betters
    for as much."""

    def beats(a: Quality, b: Quality) -> bool:
        no_worse = a.flops <= b.flops and a.score >= b.score
        return no_worse and (a.flops < b.flops or a.score > b.score)

    kept = [one for one in points if not any(beats(other, one) for other in points)]
    return sorted(kept, key=lambda one: one.flops)


def budget(measured: Measured, target: float, teacher_too: bool) -> Reach | None:
    """Where the mean curve first comes down to `target` nats: FLOPs with the teacher's forward, and its
    own training as well if asked; None: never, or the teacher's cost is not known."""
    steps, flops, losses = curve(measured)
    records = [
        {"step": s, "student_flops": f, "teacher_flops": 0.0, "held_out_loss": loss}
        for s, f, loss in zip(steps, flops, losses, strict=True)
    ]
    found = reach(records, target)
    if found is None:
        return None
    if not teacher_too:
        return found
    cost = next(iter(measured.runs.values())).summary["flops"]
    before = [cost.get("teacher_training"), cost.get("source_training", 0.0)]
    return None if None in before else found._replace(flops=found.flops + sum(before))
