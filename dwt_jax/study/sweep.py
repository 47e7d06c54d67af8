"""Config of a study: named arms, each with a config and seeds, expanded to jobs.

The `get_config` of a study's config file returns the fields of `Study`. Does not import jax, so that
`dwt study --list` starts quickly.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dwt_jax.config import Config
from dwt_jax.config_loader import build_dataclass, read_config_file
from dwt_jax.config_loader import load_config as load_config
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import read_intact_json
from dwt_jax.study.paper_results import PAPER_ARMS

LOSS_MEASURES = ("held_out_loss", "loss_elsewhere")  # in nats, lower is better; others are scores


@dataclass(frozen=True)
class Arm:
    """A pre-training setting with its seeds."""

    name: str = ""
    label: str = ""  # in the report; empty: the name
    role: Literal["student", "teacher"] = "student"
    config: str = ""  # a pre-training config, path[:arg]
    set: tuple[str, ...] = ()  # overrides 'key=value', as on the command line
    teacher: str = ""  # arm of the teacher: its run of the same seed, else of its first seed
    source: str = ""  # arm that it is grown from (init.from), likewise
    seeds: tuple[int, ...] = (0,)
    # Shares of the steps after which it is fine-tuned, rounded to checkpoints; 1: at the end. Empty: never.
    finetune_at: tuple[float, ...] = ()
    pairs_at: tuple[float, ...] = ()  # likewise, of its evaluations on minimal pairs
    paper: str = ""  # the paper's arm that it reproduces, one of paper_results.PAPER_ARMS; empty: none


@dataclass(frozen=True)
class StudyFinetuning:
    """Fine-tuning of selected checkpoints."""

    config: str = ""  # a config of dwt finetune
    tasks: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    bag_of_words: bool = False  # beside it, logistic regression on bags of words, without pre-training


@dataclass(frozen=True)
class StudyPairs:
    """Minimal pairs on which selected checkpoints are evaluated (dwt evaluate --pairs)."""

    sets: tuple[str, ...] = ()  # folders, zip archives, or grammar
    max_pairs: int = 0  # the first ones of each paradigm; 0: all

    def names(self) -> tuple[str, ...]:
        """Return the name of each set in the report: that of its file or folder, without .zip."""
        return tuple(Path(source).name.removesuffix(".zip") for source in self.sets)


@dataclass(frozen=True)
class MaskedWords:
    """Masked words of held-out rows, for which the report prints the predictions of some arms."""

    arms: tuple[str, ...] = ()  # their runs of the first seed; empty: none
    rows: int = 6


@dataclass(frozen=True)
class OutOfDomain:
    """Out-of-domain text on which every finished run is evaluated."""

    config: str = ""  # a pre-training config with the `data`; the tokenizer is the runs'; empty: none
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis that the report tests."""

    text: str = ""
    arm: str = ""
    against: str = ""  # empty: the baseline
    measure: str = "held_out_loss"  # or `loss_elsewhere`, `average` over tasks, a task, or a set of pairs
    at: float = 1.0  # share of the steps; for a score one of both arms' finetune_at or pairs_at, else 1
    expected: Literal["better", "worse"] = "better"
    paper: str = ""  # the paper's result and where it is printed


@dataclass(frozen=True)
class Study:
    """Config of a study."""

    title: str = ""
    baseline: str = ""  # arm that the others are compared with: the student without a teacher
    arms: tuple[Arm, ...] = ()
    set: tuple[str, ...] = ()  # overrides of every arm; an arm's own take precedence
    finetuning: StudyFinetuning = field(default_factory=StudyFinetuning)
    pairs: StudyPairs = field(default_factory=StudyPairs)
    out_of_domain: OutOfDomain = field(default_factory=OutOfDomain)
    masked_words: MaskedWords = field(default_factory=MaskedWords)
    claims: tuple[Hypothesis, ...] = ()


FINAL_STEP = -1

FAILURE_FILE = "failed.json"
"""In the directory of a job that cannot be completed, e.g. a run that diverged: {"reason": text}."""


@dataclass(frozen=True)
class JobRecord:
    """A job as recorded in the manifest: everything that a report needs."""

    kind: Literal["train", "finetune", "pairs", "evaluate"]
    name: str
    arm: str
    seed: int
    workdir: Path
    step: int = 0  # of a fine-tuning or of pairs: the checkpoint, FINAL_STEP for the finished model
    share: float = 0.0  # of a fine-tuning or of pairs: the requested share of the steps
    tasks: tuple[str, ...] = ()  # of a fine-tuning; of pairs: the names of the sets
    needs: tuple[str, ...] = ()  # names of the jobs that it depends on

    def is_done(self) -> bool:
        """Whether the job's last output file exists, and no file is damaged."""
        return all(path.exists() for path in self._last_files()) and self.damaged_file() is None

    def damaged_file(self) -> Path | None:
        """Return a file of the job that is not intact, if any. Running the job writes it again."""
        paths = self._last_files()
        if self.kind == "train":
            paths += [self.workdir / name for name in ("config.json", "run.json")]
        return next((path for path in paths if path.exists() and read_intact_json(path) is None), None)

    def _last_files(self) -> list[Path]:
        if self.kind in ("finetune", "pairs"):
            return [self.workdir / task / "results.json" for task in self.tasks]
        return [self.workdir / ("summary.json" if self.kind == "train" else "results.json")]


def failed_jobs(jobs: Sequence[JobRecord]) -> dict[str, str]:
    """Return the reason of each job that cannot be completed, by name: it failed, or depends on a failed job.

    Args:
        jobs: each after those that it needs.
    """
    reasons: dict[str, str] = {}
    for job in jobs:
        if job.is_done():
            continue
        record = read_intact_json(job.workdir / FAILURE_FILE)
        failed_need = next((name for name in job.needs if name in reasons), None)
        if record is not None:
            reasons[job.name] = str(record.get("reason", "failed"))
        elif failed_need:
            reasons[job.name] = f"needs {failed_need}, which failed"
    return reasons


@dataclass(frozen=True)
class Job(JobRecord):
    """A job: a pre-training run, or fine-tuning or evaluation of the run `needs[0]`."""

    config: Config = field(default_factory=Config)  # of the pre-training run


def load_study(spec: str, overrides: Mapping[str, str] | None = None) -> Study:
    """Load and check the config of a study.

    Args:
        spec: the config file as `path[:argument]`.
        overrides: {dotted key: value} of the command line.

    Raises:
        UserError: with key, value and expectation.
    """
    study = build_dataclass(Study, read_config_file(spec), overrides)
    for problem in study_problems(study):
        raise UserError(f"config: {problem}")
    return study


def study_problems(study: Study) -> Iterator[str]:
    """Yield one line per invalid value, each starting with its key."""
    names = [arm.name for arm in study.arms]
    if not names:
        yield "arms is empty, expected at least one"
    for i, arm in enumerate(study.arms):
        location = f"arms.{i}"
        if not arm.name or not arm.name.replace("-", "").replace("_", "").isalnum():
            yield f"{location}.name is {arm.name!r}, expected letters, digits, - and _"
        if names.count(arm.name) > 1:
            yield f"{location}.name is {arm.name!r}, expected each name once"
        if not arm.config:
            yield f"{location}.config is empty, expected a pre-training config"
        if not arm.seeds or len(set(arm.seeds)) < len(arm.seeds):
            yield f"{location}.seeds is {list(arm.seeds)}, expected different numbers"
        for key in ("teacher", "source"):
            other = getattr(arm, key)
            if other and other not in names[:i]:
                hint = did_you_mean(other, names[:i])
                yield f"{location}.{key} is {other!r}, expected an arm before it{hint}"
        for key in ("finetune_at", "pairs_at"):
            if any(not 0 < share <= 1 for share in getattr(arm, key)):
                yield f"{location}.{key} is {list(getattr(arm, key))}, expected shares above 0, at most 1"
        if arm.finetune_at and not (study.finetuning.config and study.finetuning.tasks):
            yield f"{location}.finetune_at is set, expected finetuning.config and finetuning.tasks"
        if arm.pairs_at and not study.pairs.sets:
            yield f"{location}.pairs_at is set, expected pairs.sets"
        if arm.paper and arm.paper not in PAPER_ARMS:
            yield f"{location}.paper is {arm.paper!r}{did_you_mean(arm.paper, PAPER_ARMS)}"
        yield from _override_problems(f"{location}.set", arm.set)
    yield from _override_problems("set", study.set)
    yield from _override_problems("finetuning.set", study.finetuning.set)
    yield from _override_problems("out_of_domain.set", study.out_of_domain.set)
    if study.baseline and study.baseline not in names:
        yield f"baseline is {study.baseline!r}{did_you_mean(study.baseline, names)}"
    if study.finetuning.bag_of_words and not study.finetuning.tasks:
        yield "finetuning.bag_of_words is set, expected finetuning.tasks"
    yield from _pairs_problems(study)
    for name in study.masked_words.arms:
        if name not in names:
            yield f"masked_words.arms has {name!r}{did_you_mean(name, names)}"
    if study.masked_words.rows < 1:
        yield f"masked_words.rows is {study.masked_words.rows}, expected at least 1"
    for i, hypothesis in enumerate(study.claims):
        yield from _hypothesis_problems(f"claims.{i}", hypothesis, study)


def _pairs_problems(study: Study) -> Iterator[str]:
    names = study.pairs.names()
    reserved = (*LOSS_MEASURES, "average", *study.finetuning.tasks)
    for source, name in zip(study.pairs.sets, names, strict=True):
        if name in ("", ".", ".."):
            yield f"pairs.sets has {source!r}, expected a path that ends in a name"
        elif names.count(name) > 1 or name in reserved:
            yield f"pairs.sets has {source!r}, expected names that differ from each other and from tasks"
    if study.pairs.max_pairs < 0:
        yield f"pairs.max_pairs is {study.pairs.max_pairs}, expected at least 0"


def _hypothesis_problems(location: str, hypothesis: Hypothesis, study: Study) -> Iterator[str]:
    arms = {arm.name: arm for arm in study.arms}
    for key in ("arm", "against"):
        name = getattr(hypothesis, key)
        if (key == "arm" or name) and name not in arms:
            yield f"{location}.{key} is {name!r}{did_you_mean(name, arms)}"
    measures = [*LOSS_MEASURES, "average", *study.finetuning.tasks, *study.pairs.names()]
    if hypothesis.measure not in measures:
        yield f"{location}.measure is {hypothesis.measure!r}{did_you_mean(hypothesis.measure, measures)}"
    if not hypothesis.against and not study.baseline:
        yield f"{location}.against is empty, expected an arm: there is no baseline"
    if hypothesis.measure == "loss_elsewhere" and not study.out_of_domain.config:
        yield f"{location}.measure is 'loss_elsewhere', expected out_of_domain.config for it"
    if hypothesis.measure in LOSS_MEASURES:
        if hypothesis.at != 1:
            yield f"{location}.at is {hypothesis.at}, expected 1 for a loss"
        return
    key = "pairs_at" if hypothesis.measure in study.pairs.names() else "finetune_at"
    for name in (hypothesis.arm, hypothesis.against or study.baseline):
        if hypothesis.at not in getattr(arms[name], key):
            shares = ", ".join(map(str, getattr(arms[name], key))) or "none"
            yield f"{location}.at is {hypothesis.at}, expected a share in {key} of {name!r}: {shares}"


def _override_problems(location: str, texts: tuple[str, ...]) -> Iterator[str]:
    for text in texts:
        if not text.partition("=")[1]:
            yield f"{location} has {text!r}, expected key=value"


def study_jobs(study: Study, workdir: Path) -> tuple[Job, ...]:
    """Return every job of a study, each after those that it needs.

    Raises:
        UserError: for an invalid config, with the name of the arm.
    """
    jobs: list[Job] = []
    arms = {arm.name: arm for arm in study.arms}
    # The first seed of every arm before the second: an unfinished study has something of every arm.
    for i in range(max(len(arm.seeds) for arm in study.arms)):
        for arm in study.arms:
            if i < len(arm.seeds):
                jobs.append(_training_job(study, arm, arms, arm.seeds[i], workdir))
                _check_objective(study, arm, jobs[-1].config)
    for training_job in tuple(jobs):
        arm = arms[training_job.arm]
        if study.out_of_domain.config:
            name = training_job.name
            jobs.append(_run_job(training_job, "evaluate", f"{name}-elsewhere", workdir / "elsewhere" / name))
        for step, share in checkpoint_steps(arm, "finetune_at", training_job.config).items():
            name = _checkpoint_name(training_job, step)
            job = _run_job(training_job, "finetune", name, workdir / "finetuned" / name)
            jobs.append(dataclasses.replace(job, step=step, share=share, tasks=study.finetuning.tasks))
        for step, share in checkpoint_steps(arm, "pairs_at", training_job.config).items():
            name = _checkpoint_name(training_job, step)
            job = _run_job(training_job, "pairs", f"{name}-pairs", workdir / "pairs" / name)
            jobs.append(dataclasses.replace(job, step=step, share=share, tasks=study.pairs.names()))
    return tuple(jobs)


def _check_objective(study: Study, arm: Arm, config: Config) -> None:
    """Reject settings that causal models do not support, before the first run instead of after it."""
    if config.model.objective != "mlm" and arm.name in study.masked_words.arms:
        raise UserError(
            f"masked_words.arms has {arm.name!r}, expected an arm of masked models (it is a "
            f"{config.model.model_type}, which predicts next tokens)"
        )


def _checkpoint_name(training_job: Job, step: int) -> str:
    return f"{training_job.name}-{'end' if step == FINAL_STEP else f'step{step}'}"


def _run_job(
    training_job: Job, kind: Literal["finetune", "pairs", "evaluate"], name: str, workdir: Path
) -> Job:
    """Return a job on the model of a pre-training run."""
    return dataclasses.replace(
        training_job, kind=kind, name=name, workdir=workdir, needs=(training_job.name,)
    )


def _training_job(study: Study, arm: Arm, arms: Mapping[str, Arm], seed: int, workdir: Path) -> Job:
    """Return the pre-training run of an arm and a seed."""
    source_runs = {key: _run_name(arms[name], seed) for key, name in _source_arms(arm) if name}
    overrides = parse_overrides((*study.set, *arm.set))
    overrides |= {key: str(workdir / "runs" / name) for key, name in source_runs.items()}
    overrides["seed"] = str(seed)
    try:
        config = load_config(arm.config, overrides)
    except UserError as error:
        raise UserError(f"arm {arm.name!r}: {error}") from None
    name = f"{arm.name}-seed{seed}"
    needs = tuple(dict.fromkeys(source_runs.values()))  # one run may be teacher and source
    return Job("train", name, arm.name, seed, workdir / "runs" / name, needs=needs, config=config)


def checkpoint_steps(arm: Arm, key: Literal["finetune_at", "pairs_at"], config: Config) -> dict[int, float]:
    """Return {step of a checkpoint: requested share} for the shares in `key`, increasing, FINAL_STEP last.

    Raises:
        UserError: if the run does not keep such a checkpoint, or two shares are rounded to the same one.
    """
    train, interval = config.train, config.train.save_every
    shares: dict[int, float] = {}
    for share in sorted(getattr(arm, key)):
        if share < 1 and not train.steps:
            raise UserError(f"arm {arm.name!r}: train.steps is 0, expected a number, for {key} {share}")
        checkpoint_step = max(1, round(share * train.steps / interval)) * interval
        step = FINAL_STEP if share == 1 or checkpoint_step >= train.steps else checkpoint_step
        if step in shares:
            raise UserError(
                f"arm {arm.name!r}: {key} has {shares[step]} and {share}, expected different "
                f"checkpoints: there is one every {interval} of {train.steps} steps"
            )
        shares[step] = share
    first = next(iter(shares), FINAL_STEP)
    min_checkpoints = 0 if first == FINAL_STEP else -(-(train.steps - first) // interval) + 1
    if min_checkpoints > train.keep_checkpoints:
        raise UserError(
            f"arm {arm.name!r}: train.keep_checkpoints is {train.keep_checkpoints}, expected at least "
            f"{min_checkpoints}, for a checkpoint at step {first} ({key})"
        )
    return shares


def _source_arms(arm: Arm) -> tuple[tuple[str, str], ...]:
    return ("teacher.path", arm.teacher), ("init.from", arm.source)


def _run_name(arm: Arm, seed: int) -> str:
    return f"{arm.name}-seed{seed if seed in arm.seeds else arm.seeds[0]}"


def parse_overrides(texts: tuple[str, ...]) -> dict[str, str]:
    """Parse overrides 'key=value', checked by `load_study`; of equal keys the last counts."""
    return dict(text.partition("=")[::2] for text in texts)
