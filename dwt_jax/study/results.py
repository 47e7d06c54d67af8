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
from dwt_jax.files import read_json
from dwt_jax.runs.metrics_file import read_jsonl, total_flops
from dwt_jax.study import manifest
from dwt_jax.study.report import TargetCrossing, read_document_losses, steps_to_target
from dwt_jax.study.statistics import Interval, PairedDocuments, paired_loss_interval, paired_score_interval
from dwt_jax.study.sweep import FINAL_STEP, LOSS_MEASURES, Arm, Hypothesis, JobRecord, Study

LOSS_MEASURE, OUT_OF_DOMAIN_MEASURE = LOSS_MEASURES
AVERAGE_MEASURE = "average"  # over tasks


class TrainingResult(NamedTuple):
    """One finished pre-training run."""

    summary: Mapping[str, Any]
    evaluations: tuple[Mapping[str, Any], ...]  # by step, the last one included
    documents: PairedDocuments | None


@dataclass(frozen=True)
class ArmResults:
    """All that is known of one arm: by seed, and of its fine-tunings by (seed, step)."""

    arm: Arm
    runs: Mapping[int, TrainingResult]
    elsewhere: Mapping[int, PairedDocuments]
    scores: Mapping[tuple[int, int], Mapping[str, tuple[float, ...]]]  # {task: last epoch, by seed of it}
    planned_steps: Mapping[float, int]  # {share of the steps: the checkpoint that is fine-tuned there}

    def steps(self) -> tuple[int, ...]:
        """At which it was fine-tuned, END last."""
        return tuple(sorted({step for _, step in self.scores}, key=lambda step: (step == FINAL_STEP, step)))


class HypothesisResult(NamedTuple):
    claim: Hypothesis
    interval: Interval | None  # None: not both arms are there, or not on the same text
    verdict: str  # confirmed, contradicted, undecided or not comparable


@dataclass(frozen=True)
class StudyResults:
    grid: Study
    workdir: Path
    arms: Mapping[str, ArmResults]
    done: int
    jobs: int
    hypothesis_results: tuple[HypothesisResult, ...]


def collect_study_results(workdir: Path) -> StudyResults:
    """Raises UserError for a directory that holds no study."""
    if not (workdir / manifest.MANIFEST_NAME).exists():
        raise UserError(f"{workdir}: no {manifest.MANIFEST_NAME}, expected the directory of a dwt study")
    grid, jobs = manifest.read_manifest(workdir)
    arms = {arm.name: _arm_results(arm, jobs) for arm in grid.arms}
    return StudyResults(
        grid=grid,
        workdir=workdir,
        arms=arms,
        done=sum(job.is_done() for job in jobs),
        jobs=len(jobs),
        hypothesis_results=tuple(evaluate_hypothesis(claim, grid, arms) for claim in grid.claims),
    )


def _arm_results(arm: Arm, jobs: tuple[JobRecord, ...]) -> ArmResults:
    planned_steps = {job.share: job.step for job in jobs if job.arm == arm.name and job.kind == "finetune"}
    finished_jobs = [job for job in jobs if job.arm == arm.name and job.is_done()]
    runs = {job.seed: _training_result(job.workdir) for job in finished_jobs if job.kind == "train"}
    scores = {(job.seed, job.step): _read_scores(job) for job in finished_jobs if job.kind == "finetune"}
    elsewhere = {
        job.seed: _read_paired_documents(job.workdir, "results.json")
        for job in finished_jobs
        if job.kind == "evaluate"
    }
    out_of_domain = {seed: documents for seed, documents in elsewhere.items() if documents}
    return ArmResults(arm, runs, out_of_domain, scores, planned_steps)


def _training_result(workdir: Path) -> TrainingResult:
    summary = read_json(workdir / "summary.json")
    by_step = {record["step"]: record for record in read_jsonl(workdir / "evaluations.jsonl")}
    evaluations = tuple(by_step[step] for step in sorted(by_step))
    return TrainingResult(summary, evaluations, _read_paired_documents(workdir, "run.json"))


def _read_paired_documents(workdir: Path, identity: str) -> PairedDocuments | None:
    """identity: the file that has the digest of the held-out text."""
    arrays = read_document_losses(workdir / "documents.npz")
    return (
        None
        if arrays is None
        else PairedDocuments(*arrays, read_json(workdir / identity).get("data_digest", ""))
    )


def _read_scores(job: JobRecord) -> Mapping[str, tuple[float, ...]]:
    """By task, and their average: the last epoch's, so that nothing was chosen on the dev set."""
    results = {task: read_json(job.workdir / task / "results.json") for task in job.tasks}
    scores = {task: tuple(result["last"]["by_seed"]) for task, result in results.items()}
    if len({len(values) for values in scores.values()}) == 1:
        scores[AVERAGE_MEASURE] = tuple(float(x) for x in np.mean(list(scores.values()), axis=0))
    return scores


def document_losses_by_seed(arm_results: ArmResults, measure: str) -> dict[int, PairedDocuments]:
    """A loss by seed."""
    if measure == OUT_OF_DOMAIN_MEASURE:
        return dict(arm_results.elsewhere)
    return {seed: run.documents for seed, run in arm_results.runs.items() if run.documents is not None}


def paired_difference(
    treatment: ArmResults, baseline: ArmResults, measure: str, step: int = FINAL_STEP
) -> Interval | None:
    """ours − theirs over the seeds that both have; None where there is none, or nothing to pair: another
    held-out text, other seeds of fine-tuning."""
    if measure in LOSS_MEASURES:
        treatment_losses, baseline_losses = (
            document_losses_by_seed(treatment, measure),
            document_losses_by_seed(baseline, measure),
        )
        seeds = sorted(set(treatment_losses) & set(baseline_losses))
        runs = [losses[seed] for losses in (treatment_losses, baseline_losses) for seed in seeds]
        if not seeds or not all(run.same_text(runs[0]) for run in runs):
            return None
        return paired_loss_interval([treatment_losses[s] for s in seeds], [baseline_losses[s] for s in seeds])
    keys = [key for key in treatment.scores if key[1] == step and key in baseline.scores]
    both = [
        (treatment.scores[key].get(measure, ()), baseline.scores[key].get(measure, ()))
        for key in sorted(keys)
    ]
    if not both or len({len(values) for pair in both for values in pair}) != 1 or not both[0][0]:
        return None
    return paired_score_interval(np.array([a for a, _ in both]), np.array([b for _, b in both]))


def evaluate_hypothesis(claim: Hypothesis, grid: Study, arms: Mapping[str, ArmResults]) -> HypothesisResult:
    """confirmed or contradicted where both intervals lie on one side of 0."""
    treatment, baseline = arms[claim.arm], arms[claim.against or grid.baseline]
    # Where one of the two trains for longer, their checkpoints of one share are different steps.
    steps = (
        {FINAL_STEP}
        if claim.measure in LOSS_MEASURES
        else {arm.planned_steps.get(claim.at) for arm in (treatment, baseline)}
    )
    step = steps.pop()
    interval = None if steps or step is None else paired_difference(treatment, baseline, claim.measure, step)
    if interval is None:
        return HypothesisResult(claim, None, "not comparable")
    better = -interval.sign if claim.measure in LOSS_MEASURES else interval.sign
    expected = 1 if claim.expected == "better" else -1
    return HypothesisResult(
        claim, interval, {expected: "confirmed", -expected: "contradicted"}.get(better, "undecided")
    )


def mean_loss_curve(arm_results: ArmResults) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean FLOPs, mean held-out loss) over the seeds, at the steps where all of them have a finite
    loss."""
    by_run = [
        {record["step"]: record for record in run.evaluations if math.isfinite(record["held_out_loss"])}
        for run in arm_results.runs.values()
    ]
    if not by_run:
        return [], [], []
    steps = sorted(set.intersection(*(set(records) for records in by_run)))
    flops, losses = (
        [float(np.mean([value(records[step]) for records in by_run])) for step in steps]
        for value in (total_flops, lambda record: record["held_out_loss"])
    )
    return [float(s) for s in steps], flops, losses


class ArmQuality(NamedTuple):
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


def arm_qualities(arms: Mapping[str, ArmResults]) -> list[ArmQuality]:
    """Of the arms, teachers too, that are fine-tuned at their end; seeds of which both the run and a finite
    average are there."""
    points = []
    for name, arm_results in arms.items():
        by_seed = {
            seed: float(np.mean(scores[AVERAGE_MEASURE]))
            for (seed, step), scores in sorted(arm_results.scores.items())
            if step == FINAL_STEP and AVERAGE_MEASURE in scores and seed in arm_results.runs
        }
        finite_scores = {seed: score for seed, score in by_seed.items() if np.isfinite(score)}
        if finite_scores:
            flops = float(
                np.mean([arm_results.runs[seed].summary["flops"]["total"] for seed in finite_scores])
            )
            points.append(ArmQuality(name, flops, tuple(finite_scores.values())))
    return points


def pareto_front(points: Sequence[ArmQuality]) -> list[ArmQuality]:
    """The Pareto front by the means, cheapest first: those that no other one matches for less, or betters
    for as much."""

    def beats(a: ArmQuality, b: ArmQuality) -> bool:
        no_worse = a.flops <= b.flops and a.score >= b.score
        return no_worse and (a.flops < b.flops or a.score > b.score)

    front_points = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(front_points, key=lambda point: point.flops)


def flops_to_target(arm_results: ArmResults, target: float, teacher_too: bool) -> TargetCrossing | None:
    """Where the mean curve first comes down to `target` nats: FLOPs with the teacher's forward, and its
    own training as well if asked; None: never, or the teacher's cost is not known."""
    steps, flops, losses = mean_loss_curve(arm_results)
    records = [
        {"step": s, "student_flops": f, "teacher_flops": 0.0, "held_out_loss": loss}
        for s, f, loss in zip(steps, flops, losses, strict=True)
    ]
    crossing = steps_to_target(records, target)
    if crossing is None:
        return None
    if not teacher_too:
        return crossing
    cost = next(iter(arm_results.runs.values())).summary["flops"]
    before = [cost.get("teacher_training"), cost.get("source_training", 0.0)]
    return None if None in before else crossing._replace(flops=crossing.flops + sum(before))
