"""Results of a study's finished jobs: values by seed, differences with intervals, verdicts on hypotheses.

Reads the jobs' own files; sweep_html.py and sweep_tables.py render the results.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import read_json
from dwt_jax.runs.metrics_file import read_jsonl, total_flops
from dwt_jax.study import manifest
from dwt_jax.study.extra_results import BAG_OF_WORDS_NAME, MASKED_WORDS_NAME
from dwt_jax.study.report import TargetCrossing, steps_to_target
from dwt_jax.study.run_records import read_document_losses
from dwt_jax.study.statistics import Interval, PairedDocuments, paired_loss_interval, paired_score_interval
from dwt_jax.study.sweep import FINAL_STEP, LOSS_MEASURES, Arm, Hypothesis, JobRecord, Study, failed_jobs

LOSS_MEASURE, OUT_OF_DOMAIN_MEASURE = LOSS_MEASURES
AVERAGE_MEASURE = "average"  # over tasks


class TrainingResult(NamedTuple):
    """One finished pre-training run."""

    summary: Mapping[str, Any]
    evaluations: tuple[Mapping[str, Any], ...]  # by step, including the last
    documents: PairedDocuments | None


@dataclass(frozen=True)
class ArmResults:
    """Results of an arm by seed, and its scores by (seed, step of the checkpoint)."""

    arm: Arm
    runs: Mapping[int, TrainingResult]
    out_of_domain: Mapping[int, PairedDocuments]
    scores: Mapping[
        tuple[int, int], Mapping[str, tuple[float, ...]]
    ]  # {task: last epoch by fine-tuning seed} and {set of pairs: accuracy by paradigm}, 0 to 1
    planned_steps: Mapping[float, int]  # {share of the steps: step of the checkpoint}
    pair_sets: tuple[str, ...] = ()  # the measures whose scores are accuracies by paradigm

    def steps(self, measure: str) -> tuple[int, ...]:
        """Return the steps of the checkpoints with a score of `measure`, FINAL_STEP last."""
        steps = {step for (_, step), scores in self.scores.items() if measure in scores}
        return tuple(sorted(steps, key=lambda step: (step == FINAL_STEP, step)))


class HypothesisResult(NamedTuple):
    """Verdict on a hypothesis."""

    hypothesis: Hypothesis
    interval: Interval | None  # None: an arm is missing, or the two have different texts
    verdict: str  # confirmed, contradicted, undecided or not comparable


@dataclass(frozen=True)
class StudyResults:
    """Everything that a report of a study needs."""

    study: Study
    workdir: Path
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
        workdir=workdir,
        arms=arms,
        num_done=sum(job.is_done() for job in jobs),
        num_jobs=len(jobs),
        hypothesis_results=tuple(evaluate_hypothesis(hypothesis, study, arms) for hypothesis in study.claims),
        bag_of_words=_bag_of_words(study, workdir),
        left_out=left_out,
        masked_words=_masked_words(study, workdir),
    )


def _bag_of_words(study: Study, workdir: Path) -> dict[str, float]:
    """Read the scores of bags of words, of the tasks that the study has now."""
    path = workdir / BAG_OF_WORDS_NAME
    if not study.finetuning.bag_of_words or not path.exists():
        return {}
    return {
        task: result["score"] for task, result in read_json(path).items() if task in study.finetuning.tasks
    }


def _masked_words(study: Study, workdir: Path) -> list[Mapping[str, Any]]:
    """Read the masked words and the guesses of the arms that the study names now."""
    path = workdir / MASKED_WORDS_NAME
    if not study.masked_words.arms or not path.exists():
        return []
    return [
        {**row, "guesses": {arm: row["guesses"].get(arm, []) for arm in study.masked_words.arms}}
        for row in read_json(path)["rows"]
    ]


def _arm_results(arm: Arm, jobs: tuple[JobRecord, ...], left_out: dict[str, str]) -> ArmResults:
    """Read the results of an arm. Adds jobs whose files are damaged to `left_out`, with the reason."""
    runs: dict[int, TrainingResult] = {}
    scores: dict[tuple[int, int], dict[str, tuple[float, ...]]] = {}
    out_of_domain: dict[int, PairedDocuments] = {}
    for job in jobs:
        if job.arm != arm.name or not job.is_done():
            continue
        try:
            if job.kind == "train":
                runs[job.seed] = _training_result(job.workdir)
            elif job.kind in _SCORE_READERS:
                scores.setdefault((job.seed, job.step), {}).update(_SCORE_READERS[job.kind](job))
            elif documents := _read_paired_documents(job.workdir, "results.json"):
                out_of_domain[job.seed] = documents
        except UserError as error:
            left_out[job.name] = str(error)
    planned_steps = {job.share: job.step for job in jobs if job.arm == arm.name and job.step}
    pair_sets = tuple(dict.fromkeys(name for job in jobs if job.kind == "pairs" for name in job.tasks))
    return ArmResults(arm, runs, out_of_domain, scores, planned_steps, pair_sets)


def _training_result(workdir: Path) -> TrainingResult:
    summary = read_json(workdir / "summary.json")
    by_step = {record["step"]: record for record in read_jsonl(workdir / "evaluations.jsonl")}
    evaluations = tuple(by_step[step] for step in sorted(by_step))
    return TrainingResult(summary, evaluations, _read_paired_documents(workdir, "run.json"))


def _read_paired_documents(workdir: Path, identity: str) -> PairedDocuments | None:
    """Read a job's losses by document. `identity`: the file with the digest of the held-out text."""
    arrays = read_document_losses(workdir / "documents.npz")
    return (
        None
        if arrays is None
        else PairedDocuments(*arrays, read_json(workdir / identity).get("data_digest", ""))
    )


def _read_finetuning_scores(job: JobRecord) -> Mapping[str, tuple[float, ...]]:
    """Read the last epoch's scores by task, and their average. No epoch is chosen on the dev set."""
    results = {task: read_json(job.workdir / task / "results.json") for task in job.tasks}
    scores = {task: tuple(result["last"]["by_seed"]) for task, result in results.items()}
    if len({len(values) for values in scores.values()}) == 1:
        scores[AVERAGE_MEASURE] = tuple(float(x) for x in np.mean(list(scores.values()), axis=0))
    return scores


def _read_pair_scores(job: JobRecord) -> Mapping[str, tuple[float, ...]]:
    """Read the accuracies by paradigm of each set, in the order of the paradigms' names."""
    results = {name: read_json(job.workdir / name / "results.json")["by_paradigm"] for name in job.tasks}
    return {
        name: tuple(row["accuracy"] / 100 for _, row in sorted(by_paradigm.items()))
        for name, by_paradigm in results.items()
    }


_SCORE_READERS = {"finetune": _read_finetuning_scores, "pairs": _read_pair_scores}


def document_losses_by_seed(arm_results: ArmResults, measure: str) -> dict[int, PairedDocuments]:
    """Return the losses by document of each seed, for one of LOSS_MEASURES."""
    if measure == OUT_OF_DOMAIN_MEASURE:
        return dict(arm_results.out_of_domain)
    return {seed: run.documents for seed, run in arm_results.runs.items() if run.documents is not None}


def paired_difference(
    treatment: ArmResults, baseline: ArmResults, measure: str, step: int = FINAL_STEP
) -> Interval | None:
    """Compute the difference treatment − baseline over the seeds that both arms have.

    Args:
        treatment: an arm.
        baseline: the arm to subtract.
        measure: a loss, the average over tasks, a task, or a set of minimal pairs.
        step: of a score, the checkpoint.

    Returns:
        None if there is no common seed, or the held-out texts or the numbers of fine-tuning seeds or
        paradigms differ.
    """
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
    treatment_scores, baseline_scores = (
        {
            seed: scores[measure]
            for (seed, at), scores in arm.scores.items()
            if at == step and measure in scores
        }
        for arm in (treatment, baseline)
    )
    seeds = sorted(set(treatment_scores) & set(baseline_scores))
    values = [[scores[seed] for seed in seeds] for scores in (treatment_scores, baseline_scores)]
    if not seeds or len({len(row) for rows in values for row in rows}) != 1:
        return None
    return paired_score_interval(
        np.array(values[0]), np.array(values[1]), crossed=measure in treatment.pair_sets
    )


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
        return HypothesisResult(hypothesis, None, "not comparable")
    better = -interval.sign if hypothesis.measure in LOSS_MEASURES else interval.sign
    expected = 1 if hypothesis.expected == "better" else -1
    verdict = {expected: "confirmed", -expected: "contradicted"}.get(better, "undecided")
    return HypothesisResult(hypothesis, interval, verdict)


def mean_loss_curve(arm_results: ArmResults) -> tuple[list[float], list[float], list[float]]:
    """Return (steps, mean FLOPs, mean held-out loss) over seeds, at steps where all losses are finite."""
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


def mean_score_curve(arm_results: ArmResults, measure: str) -> tuple[list[float], list[float]]:
    """Return (mean FLOPs of training up to it, mean score) of each checkpoint with a score of `measure`.

    Means are over the seeds that have a score at all of these checkpoints; without such a seed both lists are
    empty. FLOPs between two evaluations of the held-out loss are interpolated.
    """
    steps, runs = arm_results.steps(measure), arm_results.runs
    seeds = [
        seed for seed in runs if all(measure in arm_results.scores.get((seed, step), {}) for step in steps)
    ]
    if not seeds:
        return [], []
    flops = [float(np.mean([_flops_at(runs[seed], step) for seed in seeds])) for step in steps]
    scores = [float(np.mean([arm_results.scores[seed, step][measure] for seed in seeds])) for step in steps]
    return flops, scores


def _flops_at(run: TrainingResult, step: int) -> float:
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
    steps, flops, losses = mean_loss_curve(arm_results)
    records = [
        {"step": s, "student_flops": f, "teacher_flops": 0.0, "held_out_loss": loss}
        for s, f, loss in zip(steps, flops, losses, strict=True)
    ]
    crossing = steps_to_target(records, target)
    if crossing is None:
        return None
    if not include_teacher_training:
        return crossing
    cost = next(iter(arm_results.runs.values())).summary["flops"]
    prior_flops = [cost.get("teacher_training"), cost.get("source_training", 0.0)]
    return None if None in prior_flops else crossing._replace(flops=crossing.flops + sum(prior_flops))
