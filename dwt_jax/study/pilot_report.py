"""The result of a pilot as text and as JSON."""

import dataclasses
import shlex
from typing import Any

import numpy as np

from dwt_jax.study.pilot import BASELINE, NO_TEACHER, RANDOM, THROUGHOUT, Candidate, PilotReport, Result
from dwt_jax.text_format import format_float, format_share, format_table


def format_pilot(report: PilotReport, teacher: str) -> str:
    """Return a table of the candidates, the recommendation, and the flags that select it."""
    baseline = report.results[0]
    baseline_flops = baseline.full_run_flops(report.steps)
    header = ("", "init", "teacher", *(f"{steps} steps" for steps in report.lengths))
    rows = [(*header, f"expected at {report.steps:,} steps", "FLOPs")]
    for rank, result in enumerate(report.results):
        differences = [_format_difference(result, baseline, steps) for steps in report.lengths]
        expected = f"{format_float(report.baseline_loss, 3)}" if rank == 0 else _format_expected(result)
        more = 100 * (result.full_run_flops(report.steps) / baseline_flops - 1)
        flops = f"{baseline_flops:.3g}" if rank == 0 else f"{format_float(more, 1, signed=True)} %"
        candidate = result.candidate
        rows.append((str(rank or ""), candidate.init, candidate.teacher, *differences, expected, flops))
    lines = format_table(rows)
    lines += [f"refused: {name}: {reason}" for name, reason in report.refused.items()]
    share = format_share(report.flops / baseline_flops)
    lines += [
        "",
        f"The teacher's held-out loss is {format_float(report.teacher_loss, 3)}. The pilot took "
        f"{report.flops:.3g} FLOPs, {share} of a full run.",
        advice(report),
    ]
    flags = [f"--config.{key}={value}" for key, value in best(report).overrides(teacher).items()]
    return "\n".join([*lines, *(["", " ".join(map(shlex.quote, flags))] if flags else [])])


def best(report: PilotReport) -> Candidate:
    """Return the first candidate if its whole interval is below the baseline, else the baseline."""
    winner = report.results[1]
    return winner.candidate if winner.expected.high < 0 else BASELINE


def advice(report: PilotReport) -> str:
    """Return the recommendation as one sentence, with the expected difference."""
    candidate = best(report)
    baseline = report.results[0]
    if candidate == BASELINE:
        return (
            "Train the student alone: no candidate is expected to end below it by more than its interval "
            f"(loss {format_float(report.baseline_loss, 2)}, "
            f"{baseline.full_run_flops(report.steps):.2g} FLOPs)."
        )
    result = next(each for each in report.results if each.candidate == candidate)
    begin = "Initialise at random" if candidate.init == RANDOM else f"Grow the teacher ({candidate.init})"
    use = "train without a teacher"
    if candidate.teacher != NO_TEACHER:
        use = f"use the teacher {candidate.teacher}"
    low, high = (format_float(x, 3, signed=True) for x in (result.expected.low, result.expected.high))
    text = (
        f"{begin} and {use}: expected {format_float(result.expected.mean, 3, signed=True)} nats "
        f"[{low}, {high}] relative to the student alone at {result.full_run_flops(report.steps):.2g} FLOPs"
    )
    other = report.results[2]
    other_text = f"{other.candidate.init}, {other.candidate.teacher}"
    text += f"; {other_text}: {format_float(other.expected.mean, 3, signed=True)}"
    if candidate.teacher == THROUGHOUT and baseline.loss(report.lengths[-1]) > report.teacher_loss:
        text += ". The runs ended above the teacher's loss, so they cannot show whether it harms later"
    return text + "."


def pilot_to_dict(report: PilotReport, teacher: str) -> dict[str, Any]:
    """Return the result as JSON values; a number that is not finite is null."""
    baseline = report.results[0]
    results = [
        {
            **dataclasses.asdict(result.candidate),
            "rounds": [_round_to_dict(result, baseline, steps) for steps in result.runs],
            "expected_difference": [_finite(x) for x in result.expected],
            "flops": _finite(result.flops()),
            "full_run_flops": _finite(result.full_run_flops(report.steps)),
        }
        for result in report.results
    ]
    return {
        "steps": report.steps,
        "teacher_held_out_loss": report.teacher_loss,
        "expected_loss_alone": report.baseline_loss,
        "flops": report.flops,
        "advice": advice(report),
        "overrides": best(report).overrides(teacher),
        "results": results,
        "refused": dict(report.refused),
    }


def _round_to_dict(result: Result, baseline: Result, steps: int) -> dict[str, Any]:
    difference, error = result.difference(baseline, steps)
    return {
        "steps": steps,
        "held_out_losses": [_finite(run.loss) for run in result.runs[steps]],
        "difference": _finite(difference),
        "standard_error": _finite(error),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _format_difference(result: Result, baseline: Result, steps: int) -> str:
    if steps not in result.runs:
        return ""
    if result is baseline:
        return format_float(result.loss(steps), 3)
    difference, error = result.difference(baseline, steps)
    return f"{format_float(difference, 3, signed=True)} ± {format_float(error, 3)}"


def _format_expected(result: Result) -> str:
    mean, low, high = (format_float(x, 3, signed=True) for x in result.expected)
    return f"{mean} [{low}, {high}]"
