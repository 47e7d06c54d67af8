"""Choose the initialisation of a student and the use of its teacher in short runs (`dwt pilot`).

Every candidate trains complete runs of a few per cent of the steps: `train` with smaller `train.steps`, so
that warm-up, decay and the teacher's weight are compressed too. All use the baseline's batches and masks.
The length doubles in each round, and fewer candidates remain (successive halving). The criterion is the
difference to the baseline, the student alone, extrapolated to the full run (extrapolation.py).

A short run ends above the teacher's loss. This favours a teacher that is used throughout, although it harms a
student that is better than the teacher. So the second round always has both: a candidate that uses the
teacher throughout, and one that stops early.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dwt_jax.config import Config, Distill, Init, Teacher
from dwt_jax.config_loader import build_config, read_config_file
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.shutdown import TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.eval.evaluate_model import evaluate_documents
from dwt_jax.eval.paired import paired_error
from dwt_jax.logs import logger
from dwt_jax.model_files import describe_missing_path
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import METHODS
from dwt_jax.runs.pretrained import load_pretrained, params_digest
from dwt_jax.study.extrapolation import ZERO, Estimate, extrapolate_difference, extrapolate_loss
from dwt_jax.study.run_records import read_document_losses
from dwt_jax.train.loop import train
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.setup import setup_run

MIN_STEPS = 16
"""Steps of the shortest run."""

_CONSTANT = {"distill.alpha_hard.kind": "constant", "distill.alpha_hard.value": "1"}


def _falling(end: float) -> dict[str, str]:
    soft = {"kind": "linear", "value": "4", "end": "0", "decay_start": "0", "decay_end": str(end)}
    return {**_CONSTANT, **{f"distill.alpha_soft.{key}": text for key, text in soft.items()}}


NO_TEACHER, THROUGHOUT = "no teacher", "1 : 1 throughout"
EARLY_USES = {
    "4 → 0 over 10 %": _falling(0.1),
    "4 → 0 over 25 %": _falling(0.25),
    "4 → 0 over 50 %": _falling(0.5),
}
TEACHER_USES = {
    NO_TEACHER: {},
    **EARLY_USES,
    THROUGHOUT: {**_CONSTANT, "distill.alpha_soft.kind": "constant", "distill.alpha_soft.value": "1"},
}
"""Overrides of `distill` by the words for them."""

RANDOM = "random"
INITS = {
    **{name: {"init.method": name} for name in METHODS if name != RANDOM},
    "stack, new layers add 0": {"init.method": "stack", "init.new_layers": "zero"},
}
"""Overrides of `init` by the words for them: every growth method."""


@dataclass(frozen=True)
class Candidate:
    """An initialisation, a key of INITS or RANDOM, and a use of the teacher, a key of TEACHER_USES."""

    init: str = RANDOM
    teacher: str = NO_TEACHER

    def overrides(self, teacher_path: str) -> dict[str, str]:
        """Return the config keys that select the candidate, as text."""
        keys = {**INITS[self.init], "init.from": teacher_path} if self.init != RANDOM else {}
        if self.teacher != NO_TEACHER:
            keys |= {**TEACHER_USES[self.teacher], "teacher.path": teacher_path}
        return keys

    def directory_name(self) -> str:
        """Return the candidate's name in the pilot's directory."""
        text = f"{self.init} {self.teacher}".replace("→", "to").replace(":", "to").replace("%", "percent")
        return "-".join("".join(c if c.isalnum() else " " for c in text).split())


BASELINE = Candidate()


class ShortRun(NamedTuple):
    """The end of a short run. One that diverged has a loss of inf."""

    loss: float  # held-out, in nats
    flops: float  # with the teacher's forward passes
    documents: tuple[np.ndarray, np.ndarray] | None  # sums of the loss and predictions by held-out document


@dataclass
class Result:
    """The results of a candidate's runs."""

    candidate: Candidate
    runs: dict[int, list[ShortRun]] = field(default_factory=dict)  # by their steps: one for each seed
    expected: Estimate = ZERO  # difference to the baseline after the full run

    def loss(self, steps: int) -> float:
        """Return the mean held-out loss of the runs of a length."""
        return float(np.mean([run.loss for run in self.runs[steps]]))

    def flops(self) -> float:
        """Return the FLOPs of all runs."""
        return sum(run.flops for runs in self.runs.values() for run in runs)

    def full_run_flops(self, total_steps: int) -> float:
        """Return the FLOPs of a full run: they are linear in the steps."""
        steps = max(self.runs)
        return self.runs[steps][0].flops * total_steps / steps

    def difference(self, baseline: "Result", steps: int) -> tuple[float, float]:
        """Return the mean difference to the baseline's runs of a length and its standard error.

        The error is the larger one of that over documents and that over seeds; NaN if it is unknown.
        """
        pairs = list(zip(self.runs[steps], baseline.runs[steps], strict=True))
        differences = [run.loss - other.loss for run, other in pairs]
        errors = [paired_error(run.documents, other.documents) for run, other in pairs]
        over_documents = np.linalg.norm([np.nan if error is None else error for error in errors]) / len(pairs)
        over_seeds = np.std(differences, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
        return float(np.mean(differences)), float(np.maximum(over_documents, over_seeds))


@dataclass(frozen=True)
class PilotReport:
    """The outcome of a pilot."""

    steps: int  # of the full run
    lengths: tuple[int, ...]  # steps of each round's runs
    teacher_loss: float  # held-out
    baseline_loss: float  # of the full run, extrapolated
    results: tuple[
        Result, ...
    ]  # the baseline, then the others from the best on, those with longer runs first
    refused: Mapping[str, str]  # reason by initialisation
    flops: float  # of all runs


def run_pilot(
    spec: str,
    overrides: Mapping[str, str],
    teacher: str,
    workdir: Path,
    budget: float,
    seeds: int = 1,
) -> PilotReport:
    """Run the candidates and rank them. Finished runs in `workdir` are not repeated.

    Args:
        spec: config of the full run, as `path[:arg]`. Its teacher and the method of its growth are ignored.
        overrides: {dotted key: text} of the command line.
        teacher: model directory or run directory of the teacher, which is also the source to grow.
        workdir: directory of the runs.
        budget: maximum steps of all runs of the pilot, in full runs.
        seeds: number of runs of each candidate and length, with the config's seed and the next ones.

    Raises:
        UserError: as `train` does, or the budget is too small.
        Preempted: after a signal.
        TrainingFailed: the baseline diverged.
    """
    if not Path(teacher).is_dir():  # before the data are prepared
        raise UserError(f"--teacher: {describe_missing_path(teacher)}, expected a model or run directory")
    load = functools.partial(load_candidate, spec, overrides, teacher)
    with tempfile.TemporaryDirectory(prefix="dwt-pilot-") as folder:
        run = setup_run(load(BASELINE), Path(folder))
    total = run.config.train.steps
    inits, refused = _supported_inits(run, teacher, load)
    teacher_loss = evaluate_documents(teacher, run.data)[1]["held_out_loss"]
    uses = [Candidate(RANDOM, use) for use in TEACHER_USES if use != NO_TEACHER]
    candidates = [BASELINE, *map(Candidate, inits), *uses]
    lengths = round_lengths(total, budget / seeds, (len(candidates), 6, 3))
    logger.info(
        f"pilot: {len(candidates)} candidates, rounds of {', '.join(map(str, lengths))} of {total} steps"
    )
    results: dict[Candidate, Result] = {}
    for round_index, steps in enumerate(lengths):
        for candidate in candidates:
            logger.info(f"pilot: {steps} steps, {candidate.init}, {candidate.teacher}")
            result = results.setdefault(candidate, Result(candidate))
            result.runs[steps] = _train_short(load(candidate), candidate, steps, seeds, workdir)
        _extrapolate(results, total, teacher_loss)
        ranked = sorted(candidates[1:], key=lambda candidate: results[candidate].expected.mean)
        candidates = [BASELINE, *(second_round(ranked) if round_index == 0 else ranked[:2])]
    baseline, *others = results.values()
    others.sort(key=lambda result: (-max(result.runs), result.expected.mean))
    return PilotReport(
        steps=total,
        lengths=lengths,
        teacher_loss=teacher_loss,
        baseline_loss=extrapolate_loss(lengths, [baseline.loss(steps) for steps in lengths], total),
        results=(baseline, *others),
        refused=refused,
        flops=float(np.nansum([result.flops() for result in results.values()])),
    )


def load_candidate(spec: str, overrides: Mapping[str, str], teacher: str, candidate: Candidate) -> Config:
    """Load the config of a candidate's full run.

    Parts of `teacher`, `distill` and `init` that the candidate does not use have their defaults. Keys that
    only the config's own schedule or method uses (`distill.match_margin`) are ignored and not an error.
    """
    only_teacher = {"teacher.path": teacher, "teacher.paths": "", "teacher.weights": ""}
    keys = {**overrides, **only_teacher, **candidate.overrides(teacher)}
    config = build_config(read_config_file(spec), keys)
    if candidate.teacher == NO_TEACHER:
        config = dataclasses.replace(config, teacher=Teacher(), distill=Distill())
    return config if candidate.init != RANDOM else dataclasses.replace(config, init=Init())


def round_lengths(total_steps: int, budget: float, counts: Sequence[int]) -> tuple[int, ...]:
    """Return the steps of each round's runs: twice as many as before, in the last round at most half a run.

    Args:
        total_steps: of the full run.
        budget: maximum steps of all runs, in full runs.
        counts: runs of each round.

    Raises:
        UserError: the budget is too small.
    """
    factors = [2**i for i in range(len(counts))]
    share = budget / sum(count * factor for count, factor in zip(counts, factors, strict=True))
    lengths = tuple(int(total_steps * min(share, 0.5 / factors[-1]) * factor) for factor in factors)
    if lengths[0] < MIN_STEPS:
        raise UserError(
            f"--budget is {budget:g}: the shortest runs would have {lengths[0]} of {total_steps} steps, "
            f"expected at least {MIN_STEPS}"
        )
    return lengths


def second_round(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Choose the candidates of the second round; in the first, a candidate is grown or has a teacher.

    Returns:
        The two best grown candidates, the best one that stops the teacher early, the one that uses it
        throughout, and the best grown one with that early stop.
    """
    best_inits = [candidate for candidate in ranked if candidate.init != RANDOM][:2]
    early = next(candidate for candidate in ranked if candidate.teacher in EARLY_USES)
    both = [dataclasses.replace(early, init=candidate.init) for candidate in best_inits[:1]]
    return [*best_inits, early, Candidate(RANDOM, THROUGHOUT), *both]


def _supported_inits(
    run: RunContext, teacher: str, load: Callable[[Candidate], Config]
) -> tuple[list[str], dict[str, str]]:
    """Return the keys of INITS that the pair of models supports, and {key: reason} of the others.

    Of keys that give the same parameters only the first is returned. LiGO is left out: its training costs
    the same for a short run.
    """
    vocabulary = load_vocabulary(run.data / "tokenizer")
    source = load_pretrained("--teacher", teacher, vocabulary, allow_fewer_tokens=True)
    names, refused, digests = [], {"ligo": "its learning is not shorter in a short run"}, set()
    for name in INITS:
        init = load(Candidate(name)).init
        try:
            params, _ = remap_params(
                source.params,
                source.model,
                run.config.model,
                init.method,
                jax.random.key(run.config.seed),
                options=init,
            )
        except UserError as error:
            refused[name] = str(error).partition(": ")[2]
            continue
        if (digest := params_digest(params)) not in digests and name not in refused:
            digests.add(digest)
            names.append(name)
    return names, refused


def _train_short(
    config: Config, candidate: Candidate, steps: int, seeds: int, workdir: Path
) -> list[ShortRun]:
    """Train a candidate for `steps` steps, once for each seed. Divergence is a loss of inf."""
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        run_dir = workdir / f"{candidate.directory_name()}-{steps}-seed{seed}"
        try:
            summary = train(_shortened(config, steps, seed), run_dir)
        except TrainingFailed:
            if candidate == BASELINE:
                raise
            runs.append(ShortRun(np.inf, np.nan, None))
            continue
        documents = read_document_losses(run_dir / "documents.npz")
        runs.append(ShortRun(summary["held_out"]["held_out_loss"], summary["flops"]["total"], documents))
    return runs


def _shortened(config: Config, steps: int, seed: int) -> Config:
    """Return the config of a complete run of fewer steps, which is evaluated at its end."""
    train_config = dataclasses.replace(
        config.train,
        steps=steps,
        epochs=0.0,
        eval_every=0,
        log_every=max(1, steps // 4),
        save_every=min(config.train.save_every, steps),
        keep_checkpoints=1,
    )
    return dataclasses.replace(config, seed=seed, train=train_config)


def _extrapolate(results: Mapping[Candidate, Result], total_steps: int, teacher_loss: float) -> None:
    """Set the expected result of each candidate after the full run."""
    baseline = results[BASELINE]
    losses = [baseline.loss(steps) for steps in baseline.runs]
    expected_loss = extrapolate_loss(list(baseline.runs), losses, total_steps)
    for candidate, result in results.items():
        if candidate == BASELINE:
            continue
        differences, errors = zip(*(result.difference(baseline, steps) for steps in result.runs), strict=True)
        # A teacher that stays helps a student that is worse than itself and harms one that is better.
        lasting = candidate.teacher == THROUGHOUT and expected_loss < teacher_loss
        result.expected = extrapolate_difference(
            list(result.runs), differences, errors, total_steps, lasting=lasting
        )
