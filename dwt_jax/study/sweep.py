"""A study: named arms, each a config and its seeds, and the jobs that they come to.

A study's config file is Python like every other, its `get_config` returns the fields of
`Grid`. No jax here: `dwt study --list` answers at once.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dwt_jax.config import Config
from dwt_jax.config_loader import config_path, construct, read_file
from dwt_jax.config_loader import load as load_config
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.study.paper_results import ARMS

LOSSES = ("held_out_loss", "loss_elsewhere")  # in nats, lower is better; all else are scores


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
    paper: str = ""  # the paper's arm that it repeats, one of study/paper_results.py's ARMS; empty: none


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
    at: float = 1.0  # share of the steps: of a score one that both arms are fine-tuned at, of a loss 1
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


@dataclass(frozen=True)
class Place:
    """Where a run of the queue is, and what of: all that a report needs to know of it."""

    kind: Literal["train", "finetune", "evaluate"]
    name: str
    arm: str
    seed: int
    workdir: Path
    step: int = 0  # of a fine-tuning: the checkpoint, END for the finished model
    share: float = 0.0  # of a fine-tuning: the share of the steps that was asked for
    tasks: tuple[str, ...] = ()  # of a fine-tuning

    def is_done(self) -> bool:
        if self.kind == "finetune":
            return all((self.workdir / task / "results.json").exists() for task in self.tasks)
        return (self.workdir / ("summary.json" if self.kind == "train" else "results.json")).exists()


@dataclass(frozen=True)
class Job(Place):
    """One run of the queue: pre-training, or something done with the run `needs[0]`: fine-tuning one of
    its checkpoints, evaluating it elsewhere."""

    needs: tuple[str, ...] = ()  # names of jobs
    config: Config = field(default_factory=Config)  # of the pre-training


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Grid:
    """The study of `path[:arg]`. Raises UserError naming the key, what was found, what was expected."""
    grid = construct(Grid, read_file(spec), overrides)
    for problem in problems(grid):
        raise UserError(f"config: {problem}")
    return grid


def problems(grid: Grid) -> Iterator[str]:
    """What cannot be so, lazily, each a line that begins with the key."""
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
        if arm.paper and arm.paper not in ARMS:
            yield f"{where}.paper is {arm.paper!r}{did_you_mean(arm.paper, ARMS)}"
        yield from _pair_problems(f"{where}.set", arm.set)
    yield from _pair_problems("set", grid.set)
    yield from _pair_problems("finetuning.set", grid.finetuning.set)
    yield from _pair_problems("elsewhere.set", grid.elsewhere.set)
    if grid.baseline and grid.baseline not in names:
        yield f"baseline is {grid.baseline!r}{did_you_mean(grid.baseline, names)}"
    for i, claim in enumerate(grid.claims):
        yield from _claim_problems(f"claims.{i}", claim, grid)


def _claim_problems(where: str, claim: Claim, grid: Grid) -> Iterator[str]:
    arms = {arm.name: arm for arm in grid.arms}
    for key in ("arm", "against"):
        name = getattr(claim, key)
        if (key == "arm" or name) and name not in arms:
            yield f"{where}.{key} is {name!r}{did_you_mean(name, arms)}"
    measures = [*LOSSES, "average", *grid.finetuning.tasks]
    if claim.measure not in measures:
        yield f"{where}.measure is {claim.measure!r}{did_you_mean(claim.measure, measures)}"
    if not claim.against and not grid.baseline:
        yield f"{where}.against is empty, expected an arm: there is no baseline"
    if claim.measure == "loss_elsewhere" and not grid.elsewhere.config:
        yield f"{where}.measure is 'loss_elsewhere', expected elsewhere.config for it"
    if claim.measure in LOSSES:
        if claim.at != 1:
            yield f"{where}.at is {claim.at}, expected 1 for a loss"
        return
    for name in (claim.arm, claim.against or grid.baseline):
        if claim.at not in arms[name].finetune_at:
            shares = ", ".join(map(str, arms[name].finetune_at)) or "none"
            yield f"{where}.at is {claim.at}, expected a share that {name!r} is fine-tuned at: {shares}"


def _pair_problems(where: str, texts: tuple[str, ...]) -> Iterator[str]:
    for text in texts:
        if not text.partition("=")[1]:
            yield f"{where} has {text!r}, expected key=value"


def jobs_of(grid: Grid, workdir: Path) -> tuple[Job, ...]:
    """Every run, in an order in which each comes after what it needs. Raises UserError for a config
    that cannot be, naming the arm."""
    found: list[Job] = []
    arms = {arm.name: arm for arm in grid.arms}
    for arm in grid.arms:
        for seed in arm.seeds:
            borrowed = {key: _run_of(arms[name], seed) for key, name in _borrowed(arm) if name}
            overrides = pairs((*grid.set, *arm.set))
            overrides |= {key: str(workdir / "runs" / name) for key, name in borrowed.items()}
            overrides["seed"] = str(seed)
            try:
                config = load_config(anywhere(arm.config), overrides)
            except UserError as error:
                raise UserError(f"arm {arm.name!r}: {error}") from None
            name = f"{arm.name}-seed{seed}"
            needs = tuple(borrowed.values())
            place = workdir / "runs" / name
            found.append(Job("train", name, arm.name, seed, place, needs=needs, config=config))
    for pre in tuple(found):
        after = functools.partial(Job, arm=pre.arm, seed=pre.seed, needs=(pre.name,), config=pre.config)
        if grid.elsewhere.config:
            place = workdir / "elsewhere" / pre.name
            found.append(after("evaluate", f"{pre.name}-elsewhere", workdir=place))
        for step, share in fine_tuned_at(arms[pre.arm], pre.config).items():
            name = f"{pre.name}-{'end' if step == END else f'step{step}'}"
            place = workdir / "finetuned" / name
            tasks = grid.finetuning.tasks
            found.append(after("finetune", name, workdir=place, step=step, share=share, tasks=tasks))
    return tuple(found)


def fine_tuned_at(arm: Arm, config: Config) -> dict[int, float]:
    """{step at which an arm is fine-tuned: the share that asked for it}, rising, END last. Raises
    UserError where the run does not keep that checkpoint, and for two shares of one."""
    train, every = config.train, config.train.checkpoint_every
    found: dict[int, float] = {}
    for share in sorted(arm.finetune_at):
        if share < 1 and not train.steps:
            raise UserError(f"arm {arm.name!r}: train.steps is 0, expected a number, for finetune_at {share}")
        near = max(1, round(share * train.steps / every)) * every
        step = END if share == 1 or near >= train.steps else near
        if step in found:
            raise UserError(
                f"arm {arm.name!r}: finetune_at has {found[step]} and {share}, expected different "
                f"checkpoints: there is one every {every} of {train.steps} steps"
            )
        found[step] = share
    first = next(iter(found), END)
    needed = 0 if first == END else -(-(train.steps - first) // every) + 1
    if needed > train.keep_checkpoints:
        raise UserError(
            f"arm {arm.name!r}: train.keep_checkpoints is {train.keep_checkpoints}, expected at least "
            f"{needed}, to fine-tune at step {first}"
        )
    return found


def _borrowed(arm: Arm) -> tuple[tuple[str, str], ...]:
    return ("teacher.path", arm.teacher), ("init.from", arm.source)


def _run_of(arm: Arm, seed: int) -> str:
    return f"{arm.name}-seed{seed if seed in arm.seeds else arm.seeds[0]}"


def pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """Of 'key=value', the last of equals; `load` has looked that each is one."""
    return dict(text.partition("=")[::2] for text in texts)


def anywhere(spec: str) -> str:
    """A config of configs/, from wherever dwt was started; others are where they are."""
    name, colon, argument = spec.partition(":")
    if not Path(name).is_file() and name.startswith("configs/"):
        name = str(config_path(name.removeprefix("configs/")))
    return f"{name}{colon}{argument}"
