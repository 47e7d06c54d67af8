"""A study: named arms, each a config and its seeds, and the jobs that they come to.

A study's config file is Python like every other, its `get_config` returns the fields of
`Grid`. No jax here: `dwt study --list` answers at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from dwt_jax.config import Config
from dwt_jax.config_file import config_path, construct, read_file
from dwt_jax.config_file import load as load_config
from dwt_jax.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Arm:
    """One way to pre-train, with every seed."""

    name: str = ""
    label: str = ""  # in the report; empty: the name
    role: Literal["student", "teacher"] = "student"
    config: str = ""  # a pre-training config, path[:arg]
    set: tuple[str, ...] = ()  # 'key=value', as on the command line
    teacher: str = ""  # the arm that teaches it: its run of the same seed, else of its first
    source: str = ""  # the arm that it is grown from (init.from), likewise
    seeds: tuple[int, ...] = (0,)
    # Fine-tuned after these shares of its steps, each rounded to a checkpoint; 1: at the end. Empty: never.
    finetune_at: tuple[float, ...] = ()


@dataclass(frozen=True)
class FineTuning:
    """What chosen checkpoints are fine-tuned on."""

    config: str = ""  # as of dwt finetune
    tasks: tuple[str, ...] = ()
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Elsewhere:
    """Held-out text of another domain, on which every finished run is evaluated; empty: none."""

    config: str = ""  # a pre-training config, of which `data` is read; the tokenizer is the runs'
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A finding that the report holds to our runs."""

    text: str = ""
    arm: str = ""
    against: str = ""  # empty: the baseline
    measure: str = "held_out_loss"  # or `loss_elsewhere`, `average` over tasks, or a task
    at: float = 1.0  # share of the steps
    expected: Literal["better", "worse"] = "better"
    paper: str = ""  # what the paper has, with its place


@dataclass(frozen=True)
class Grid:
    title: str = ""
    baseline: str = ""  # the arm that the others are compared with: the student alone
    arms: tuple[Arm, ...] = ()
    set: tuple[str, ...] = ()  # for every arm, before its own
    finetuning: FineTuning = field(default_factory=FineTuning)
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    claims: tuple[Claim, ...] = ()


END = -1


class Job(NamedTuple):
    """One run of the queue: pre-training, or something done with the run `needs[0]`: fine-tuning one of
    its checkpoints, evaluating it elsewhere."""

    kind: Literal["train", "finetune", "evaluate"]
    name: str
    arm: str
    seed: int
    workdir: Path
    needs: tuple[str, ...]  # names of jobs
    config: Config  # of the pre-training
    step: int = 0  # of a fine-tuning: the checkpoint, END for the finished model
    tasks: tuple[str, ...] = ()  # of a fine-tuning

    def is_done(self) -> bool:
        if self.kind == "finetune":
            return all((self.workdir / task / "results.json").exists() for task in self.tasks)
        return (self.workdir / ("summary.json" if self.kind == "train" else "results.json")).exists()


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Grid:
    """The study of `path[:arg]`. Raises UserError naming the key, what was found, what was expected."""
    grid = construct(Grid, read_file(spec), overrides)
    for problem in _problems(grid):
        raise UserError(f"config: {problem}")
    return grid


def _problems(grid: Grid) -> Iterator[str]:
    names = [arm.name for arm in grid.arms]
    if not names:
        yield "arms is empty, expected at least one"
    for i, arm in enumerate(grid.arms):
        where = f"arms.{i}"
        if not arm.name or not arm.name.replace("-", "").replace("_", "").isalnum():
            yield f"{where}.name is {arm.name!r}, expected letters, digits, - and _"
        if names.count(arm.name) > 1:
            yield f"{where}.name is {arm.name!r}, expected each name once"
        if not arm.config:
            yield f"{where}.config is empty, expected a pre-training config"
        if not arm.seeds or len(set(arm.seeds)) < len(arm.seeds):
            yield f"{where}.seeds is {list(arm.seeds)}, expected different numbers"
        for key in ("teacher", "source"):
            other = getattr(arm, key)
            if other and other not in names[:i]:
                yield f"{where}.{key} is {other!r}, expected an arm before it{did_you_mean(other, names[:i])}"
        if any(not 0 < share <= 1 for share in arm.finetune_at):
            yield f"{where}.finetune_at is {list(arm.finetune_at)}, expected shares above 0, at most 1"
        if arm.finetune_at and not (grid.finetuning.config and grid.finetuning.tasks):
            yield f"{where}.finetune_at is set, expected finetuning.config and finetuning.tasks"
    if grid.baseline and grid.baseline not in names:
        yield f"baseline is {grid.baseline!r}{did_you_mean(grid.baseline, names)}"
    for i, claim in enumerate(grid.claims):
        for key in ("arm", "against"):
            name = getattr(claim, key)
            if (key == "arm" or name) and name not in names:
                yield f"claims.{i}.{key} is {name!r}{did_you_mean(name, names)}"
        measures = ["held_out_loss", "loss_elsewhere", "average", *grid.finetuning.tasks]
        if claim.measure not in measures:
            yield f"claims.{i}.measure is {claim.measure!r}{did_you_mean(claim.measure, measures)}"
        if not claim.against and not grid.baseline:
            yield f"claims.{i}.against is empty, expected an arm: there is no baseline"


def jobs_of(grid: Grid, workdir: Path) -> tuple[Job, ...]:
    """Every run, in an order in which each comes after what it needs. Raises UserError for a config
    that cannot be, naming the arm."""
    found: list[Job] = []
    arms = {arm.name: arm for arm in grid.arms}
    for arm in grid.arms:
        for seed in arm.seeds:
            borrowed = {key: _run_of(arms[name], seed) for key, name in _borrowed(arm) if name}
            overrides = dict(_pair(text, arm.name) for text in (*grid.set, *arm.set))
            overrides |= {key: str(workdir / "runs" / name) for key, name in borrowed.items()}
            overrides["seed"] = str(seed)
            try:
                config = load_config(anywhere(arm.config), overrides)
            except UserError as error:
                raise UserError(f"arm {arm.name!r}: {error}") from None
            name = f"{arm.name}-seed{seed}"
            needs = tuple(borrowed.values())
            found.append(Job("train", name, arm.name, seed, workdir / "runs" / name, needs, config))
    for pre in tuple(found):
        if grid.elsewhere.config:
            name = f"{pre.name}-elsewhere"
            place = workdir / "elsewhere" / pre.name
            found.append(Job("evaluate", name, pre.arm, pre.seed, place, (pre.name,), pre.config))
        for step in fine_tuned_at(arms[pre.arm], pre.config):
            name = f"{pre.name}-{'end' if step == END else f'step{step}'}"
            place = workdir / "finetuned" / name
            tasks = grid.finetuning.tasks
            found.append(
                Job("finetune", name, pre.arm, pre.seed, place, (pre.name,), pre.config, step, tasks)
            )
    return tuple(found)


def fine_tuned_at(arm: Arm, config: Config) -> tuple[int, ...]:
    """The steps at which an arm is fine-tuned: checkpoints that it keeps, then END. Raises UserError
    where it does not keep them all."""
    train, every = config.train, config.train.checkpoint_every
    amid = [share for share in arm.finetune_at if share < 1]
    if amid and not train.steps:
        raise UserError(f"arm {arm.name!r}: train.steps is 0, expected a number, for finetune_at {amid[0]}")
    steps = sorted({max(1, round(share * train.steps / every)) * every for share in amid})
    needed = -(-(train.steps - steps[0]) // every) + 1 if steps else 0
    if needed > train.keep_checkpoints:
        raise UserError(
            f"arm {arm.name!r}: train.keep_checkpoints is {train.keep_checkpoints}, expected at least "
            f"{needed}, to fine-tune at step {steps[0]}"
        )
    ends = [END] if len(amid) < len(arm.finetune_at) else []
    return (*(step for step in steps if step < train.steps), *ends)


def _borrowed(arm: Arm) -> tuple[tuple[str, str], ...]:
    return ("teacher.path", arm.teacher), ("init.from", arm.source)


def _run_of(arm: Arm, seed: int) -> str:
    return f"{arm.name}-seed{seed if seed in arm.seeds else arm.seeds[0]}"


def _pair(text: str, arm: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"arm {arm!r}: set has {text!r}, expected key=value")
    return key, value


def anywhere(spec: str) -> str:
    """A config of configs/, from wherever dwt was started; others are where they are."""
    name, colon, argument = spec.partition(":")
    if not Path(name).is_file() and name.startswith("configs/"):
        name = str(config_path(name.removeprefix("configs/")))
    return f"{name}{colon}{argument}"
