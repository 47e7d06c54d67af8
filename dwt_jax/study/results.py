"""Results of a study's finished jobs: values by seed, differences with intervals, verdicts on hypotheses.

Reads the jobs' own files; study_report.py makes the report.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import read_json
from dwt_jax.runs.metrics_file import sum_or_none, total_flops
from dwt_jax.study import manifest
from dwt_jax.study.curves import TargetCrossing, prior_training_flops, steps_to_target
from dwt_jax.study.extra_results import BAG_OF_WORDS_NAME, MASKED_WORDS_NAME
from dwt_jax.study.run_records import RunRecord, read_document_losses, read_finished_run
from dwt_jax.study.statistics import (
    Interval,
    PairedDocuments,
    Verdict,
    paired_loss_interval,
    paired_score_interval,
)
from dwt_jax.study.sweep import FINAL_STEP, LOSS_MEASURES, Arm, Hypothesis, JobRecord, Study, failed_jobs

LOSS_MEASURE, OUT_OF_DOMAIN_MEASURE = LOSS_MEASURES
AVERAGE_MEASURE = "average"  # over tasks


class Measurement(NamedTuple):
    """A row of the tidy table of results: a measure of a run at a step, and the values of its mean."""

    seed: int
    step: int  # FINAL_STEP at the end
    measure: str
    scores: tuple[float, ...] = ()  # 0 to 1, by fine-tuning seed or paradigm
    documents: PairedDocuments | None = None  # losses, in place of scores
    is_by_paradigm: bool = False

    @property
    def mean(self) -> float:
        """The value of the measure."""
        if self.documents is None:
            return float(np.mean(self.scores))
        return float(self.documents.loss.sum() / self.documents.predictions.sum())


@dataclass(frozen=True)
class ArmResults:
    """Results of an arm."""

    arm: Arm
    runs: Mapping[int, RunRecord]  # by seed
    measurements: Sequence[Measurement]
    planned_steps: Mapping[float, int]  # {share of the steps: step of the checkpoint}

    def at(self, measure: str, step: int = FINAL_STEP) -> dict[int, Measurement]:
        """Return the measurements of `measure` at a step, by seed in increasing order."""
        rows = [row for row in self.measurements if (row.measure, row.step) == (measure, step)]
        return {row.seed: row for row in sorted(rows, key=lambda row: row.seed)}

    def steps(self, measure: str) -> tuple[int, ...]:
        """Return the steps at which `measure` is known, FINAL_STEP last."""
        steps = {row.step for row in self.measurements if row.measure == measure}
        return tuple(sorted(steps, key=lambda step: (step == FINAL_STEP, step)))


class HypothesisResult(NamedTuple):
    """Verdict on a hypothesis."""

    hypothesis: Hypothesis
    interval: Interval | None  # None: an arm is missing, or the two have different texts
    verdict: Verdict


@dataclass(frozen=True)
class StudyResults:
    """Everything that a report of a study needs."""

    study: Study
    arms: Mapping[str, ArmResults]
    num_done: int
    num_jobs: int
    hypothesis_results: tuple[HypothesisResult, ...]
    bag_of_words: Mapping[str, float] = field(default_factory=dict)  # score by task, 0 to 1
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by the name of the job
    masked_words: Sequence[Mapping[str, Any]] = ()  # text, word, and the guesses by arm


def collect_study_results(workdir: Path) -> StudyResults:
    """Read the results of a study's finished jobs. Raises UserError if `workdir` is not a study."""
    if not (workdir / manifest.MANIFEST_NAME).exists():
        raise UserError(f"{workdir}: no {manifest.MANIFEST_NAME}, expected the directory of a dwt study")
    study, jobs = manifest.read_manifest(workdir)
    left_out = failed_jobs(jobs)
    for job in jobs:
        if path := job.damaged_file():
            left_out[job.name] = f"{path}: damaged, expected JSON written by dwt (run dwt study again)"
    arms = {arm.name: _arm_results(arm, jobs, left_out) for arm in study.arms}
    return StudyResults(
        study=study,
        arms=arms,
        num_done=sum(job.is_done() for job in jobs),
        num_jobs=len(jobs),
        hypothesis_results=tuple(evaluate_hypothesis(hypothesis, study, arms) for hypothesis in study.claims),
        bag_of_words=_bag_of_words(study, workdir),
        left_out=left_out,
        masked_words=_masked_words(study, workdir),
    )


def _bag_of_words(study: Study, workdir: Path) -> dict[str, float]:
    """Read the bag-of-words scores of the study's current tasks."""
    path = workdir / BAG_OF_WORDS_NAME
    if not study.finetuning.bag_of_words or not path.exists():
        return {}
    return {
        task: result["score"] for task, result in read_json(path).items() if task in study.finetuning.tasks
    }


def _masked_words(study: Study, workdir: Path) -> list[Mapping[str, Any]]:
    """Read the masked words and the predictions of the study's current arms."""
    path = workdir / MASKED_WORDS_NAME
    if not study.masked_words.arms or not path.exists():
        return []
    return [
        {**row, "guesses": {arm: row["guesses"].get(arm, []) for arm in study.masked_words.arms}}
        for row in read_json(path)["rows"]
    ]


def _arm_results(arm: Arm, jobs: tuple[JobRecord, ...], left_out: dict[str, str]) -> ArmResults:
    """Read the results of an arm. Adds jobs whose files are damaged to `left_out`, with the reason."""
    runs: dict[int, RunRecord] = {}
    measurements: list[Measurement] = []
    for job in jobs:
        if job.arm != arm.name or not job.is_done():
            continue
        try:
            rows = _MEASUREMENT_READERS[job.kind](job)
            if job.kind == "train":
                runs[job.seed] = read_finished_run(job.name, job.workdir, with_metrics=False)
            measurements += rows
        except UserError as error:
            left_out[job.name] = str(error)
        except (KeyError, TypeError) as error:
            left_out[job.name] = f"{job.workdir}: {error!r}, expected files that dwt wrote"
    planned_steps = {job.share: job.step for job in jobs if job.arm == arm.name and job.step}
    return ArmResults(arm, runs, measurements, planned_steps)


def _read_losses(job: JobRecord) -> list[Measurement]:
    """Read a job's losses by document, of its own held-out text or of other text."""
    arrays = read_document_losses(job.workdir / "documents.npz")
    if arrays is None:
        return []
    measure, identity = (LOSS_MEASURE, "run.json")
    if job.kind != "train":
        measure, identity = OUT_OF_DOMAIN_MEASURE, "results.json"
    digest = read_json(job.workdir / identity).get("data_digest", "")
    return [Measurement(job.seed, FINAL_STEP, measure, documents=PairedDocuments(*arrays, digest))]


def _read_finetuning_scores(job: JobRecord) -> list[Measurement]:
    """Read the last epoch's scores by task, and their average. No epoch is chosen on the dev set."""
    results = {task: read_json(job.workdir / task / "results.json") for task in job.tasks}
    scores = {task: tuple(result["last"]["by_seed"]) for task, result in results.items()}
    if len({len(values) for values in scores.values()}) == 1:
        scores[AVERAGE_MEASURE] = tuple(float(x) for x in np.mean(list(scores.values()), axis=0))
    return [Measurement(job.seed, job.step, task, values) for task, values in scores.items()]


def _read_pair_scores(job: JobRecord) -> list[Measurement]:
    """Read the accuracies by paradigm of each set, in the order of the paradigms' names."""
    results = {name: read_json(job.workdir / name / "results.json")["by_paradigm"] for name in job.tasks}
    return [
        Measurement(
            *(job.seed, job.step, name),
            tuple(row["accuracy"] / 100 for _, row in sorted(by_paradigm.items())),
            is_by_paradigm=True,
        )
        for name, by_paradigm in results.items()
    ]


_MEASUREMENT_READERS = {
    "train": _read_losses,
    "evaluate": _read_losses,
    "finetune": _read_finetuning_scores,
    "pairs": _read_pair_scores,
}


def paired_difference(
    treatment: ArmResults, baseline: ArmResults, measure: str, step: int = FINAL_STEP
) -> Interval | None:
    """Compute the difference treatment − baseline over the seeds that both arms have.

    Args:
        treatment: an arm.
        baseline: the arm to subtract.
        measure: a loss, the average over tasks, a task, or a set of minimal pairs.
        step: the checkpoint.

    Returns:
        None if there is no common seed, or the held-out texts or the numbers of fine-tuning seeds or
        paradigms differ.
    """
    rows, others = paired_measurements(treatment, baseline, measure, step)
    if not rows:
        return None
    documents = [row.documents for row in (*rows, *others) if row.documents is not None]
    if documents:
        return paired_loss_interval(documents[: len(rows)], documents[len(rows) :])
    scores = np.array([row.scores for row in (*rows, *others)])
    return paired_score_interval(scores[: len(rows)], scores[len(rows) :], crossed=rows[0].is_by_paradigm)


def paired_measurements(
    treatment: ArmResults, baseline: ArmResults, measure: str, step: int = FINAL_STEP
) -> tuple[list[Measurement], list[Measurement]]:
    """Return both arms' measurements at their common seeds; none if they cannot be compared."""
    rows, others = treatment.at(measure, step), baseline.at(measure, step)
    seeds = [seed for seed in rows if seed in others]
    pairs = [rows[seed] for seed in seeds], [others[seed] for seed in seeds]
    measurements = [row for arm_rows in pairs for row in arm_rows]
    documents = [row.documents for row in measurements if row.documents is not None]
    is_comparable = len({len(row.scores) for row in measurements}) == 1
    return pairs if is_comparable and all(each.same_text(documents[0]) for each in documents) else ([], [])


def evaluate_hypothesis(
    hypothesis: Hypothesis, study: Study, arms: Mapping[str, ArmResults]
) -> HypothesisResult:
    """Test a hypothesis: confirmed or contradicted if both intervals are on one side of 0."""
    treatment, baseline = arms[hypothesis.arm], arms[hypothesis.against or study.baseline]
    # If one arm trains for longer, equal shares of the steps are different steps.
    steps = (
        {FINAL_STEP}
        if hypothesis.measure in LOSS_MEASURES
        else {arm.planned_steps.get(hypothesis.at) for arm in (treatment, baseline)}
    )
    step = steps.pop()
    interval = (
        None if steps or step is None else paired_difference(treatment, baseline, hypothesis.measure, step)
    )
    if interval is None:
        return HypothesisResult(hypothesis, None, Verdict.NOT_COMPARABLE)
    better = -interval.sign if hypothesis.measure in LOSS_MEASURES else interval.sign
    expected = 1 if hypothesis.expected == "better" else -1
    verdicts = {expected: Verdict.CONFIRMED, -expected: Verdict.CONTRADICTED}
    return HypothesisResult(hypothesis, interval, verdicts.get(better, Verdict.UNDECIDED))


def mean_evaluations(arm_results: ArmResults) -> list[dict[str, float]]:
    """Return the means over seeds of the evaluations at steps where all losses are finite."""
    by_run = [
        {record["step"]: record for record in run.evaluations if math.isfinite(record["held_out_loss"])}
        for run in arm_results.runs.values()
    ]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    keys = ("step", "student_flops", "teacher_flops", "held_out_loss")
    return [{key: float(np.mean([run[step][key] for run in by_run])) for key in keys} for step in steps]


def mean_score_curve(arm_results: ArmResults, measure: str) -> tuple[list[float], list[float]]:
    """Return (mean training FLOPs, mean score) of each checkpoint with a score of `measure`.

    Means are over the seeds with a score at all of these checkpoints; without such a seed both lists are
    empty. FLOPs between two evaluations of the held-out loss are interpolated.
    """
    runs, by_step = (
        arm_results.runs,
        {step: arm_results.at(measure, step) for step in arm_results.steps(measure)},
    )
    seeds = [seed for seed in runs if all(seed in rows for rows in by_step.values())]
    if not seeds or not by_step:
        return [], []
    flops = [float(np.mean([_flops_at(runs[seed], step) for seed in seeds])) for step in by_step]
    return flops, [float(np.mean([rows[seed].mean for seed in seeds])) for rows in by_step.values()]


def _flops_at(run: RunRecord, step: int) -> float:
    """Return the FLOPs of student and teacher's forward pass up to a checkpoint."""
    if step == FINAL_STEP:
        return float(run.summary["flops"]["total"])
    points = [(0, 0.0), *((record["step"], total_flops(record)) for record in run.evaluations)]
    steps, flops = zip(*points, strict=True)
    return float(np.interp(step, steps, flops))


class ArmQuality(NamedTuple):
    """Final average score and cost of an arm."""

    arm: str
    flops: float  # of the student and the teacher's forward pass, mean over seeds
    scores: tuple[float, ...]  # average over tasks, 0 to 1, by seed

    @property
    def score(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


def arm_qualities(arms: Mapping[str, ArmResults]) -> list[ArmQuality]:
    """Return the quality of each arm, teachers included, that is fine-tuned at the end.

    Only seeds with a finished run and a finite average count.
    """
    points = []
    for name, arm_results in arms.items():
        by_seed = {seed: row.mean for seed, row in arm_results.at(AVERAGE_MEASURE).items()}
        finite_scores = {
            seed: score for seed, score in by_seed.items() if seed in arm_results.runs and np.isfinite(score)
        }
        if finite_scores:
            flops = float(
                np.mean([arm_results.runs[seed].summary["flops"]["total"] for seed in finite_scores])
            )
            points.append(ArmQuality(name, flops, tuple(finite_scores.values())))
    return points


def pareto_front(points: Sequence[ArmQuality]) -> list[ArmQuality]:
    """Return the Pareto front of the mean scores, cheapest first."""

    def dominates(a: ArmQuality, b: ArmQuality) -> bool:
        no_worse = a.flops <= b.flops and a.score >= b.score
        return no_worse and (a.flops < b.flops or a.score > b.score)

    front_points = [point for point in points if not any(dominates(other, point) for other in points)]
    return sorted(front_points, key=lambda point: point.flops)


def flops_to_target(
    arm_results: ArmResults, target: float, include_teacher_training: bool
) -> TargetCrossing | None:
    """Return where the mean curve first reaches `target` nats.

    FLOPs include the teacher's forward pass, and its training with `include_teacher_training`.

    Returns:
        None if the target is never reached, or the cost of the teacher is unknown.
    """
    crossing = steps_to_target(mean_evaluations(arm_results), target)
    if crossing is None:
        return None
    if not include_teacher_training:
        return crossing
    training = prior_training_flops(next(iter(arm_results.runs.values())).summary["flops"])
    total = sum_or_none(crossing.flops, training)
    return None if total is None else crossing._replace(flops=total)
