"""Curves of the held-out loss: their charts, and the steps and FLOPs at which one reaches a loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dwt_jax.runs.metrics_file import sum_or_none, total_flops
from dwt_jax.study.charts import Chart, ChartLine, flop_chart
from dwt_jax.study.report import Record

Evaluations = Sequence[Mapping[str, Any]]
"""Records of evaluations.jsonl, by step."""


class TargetCrossing(NamedTuple):
    """First point at which a curve reaches a loss, interpolated between two evaluations."""

    steps: float
    flops: float  # of the student and the teacher's forward pass
    is_upper_bound: bool  # the first evaluation was already below


def steps_to_target(evaluations: Evaluations, loss: float) -> TargetCrossing | None:
    """Return the first point at which the held-out loss reached `loss`, in nats; None if it never did."""
    previous = None
    for record in evaluations:
        if not math.isfinite(record["held_out_loss"]):
            continue
        if record["held_out_loss"] <= loss:
            if previous is None:
                return TargetCrossing(record["step"], total_flops(record), is_upper_bound=True)
            share = (previous["held_out_loss"] - loss) / (previous["held_out_loss"] - record["held_out_loss"])
            steps = previous["step"] + share * (record["step"] - previous["step"])
            return TargetCrossing(
                steps,
                total_flops(previous) + share * (total_flops(record) - total_flops(previous)),
                is_upper_bound=False,
            )
        previous = record
    return None


def prior_training_flops(flops: Mapping[str, float | None]) -> float | None:
    """Return the training FLOPs of a run's teacher and source, None if unknown.

    Args:
        flops: `flops` of the run's summary.
    """
    return sum_or_none(flops.get("teacher_training"), flops.get("source_training", 0.0))


def loss_charts(
    curves: Sequence[tuple[str, Evaluations, tuple[int, int]]],
    y_label: str,
    captions: tuple[str, str],
    reference_lines: Sequence[tuple[str, float]] = (),
) -> list[Chart]:
    """Plot the held-out loss against steps and against FLOPs.

    Args:
        curves: label, evaluations, and colour and dash of each.
        y_label: label of the vertical axis.
        captions: of both charts; UNIT is that of the FLOPs.
        reference_lines: (label, loss) of each.
    """

    def lines(x: Callable[[Mapping[str, Any]], float]) -> list[ChartLine]:
        return [
            ChartLine(label, [*map(x, records)], [record["held_out_loss"] for record in records], *style)
            for label, records, style in curves
        ]

    steps = lines(lambda record: record["step"])
    more: dict[str, Any] = {"reference_lines": reference_lines, "cut": True}
    return [
        Chart("Held-out loss against steps", steps, "steps", y_label, captions[0], **more),
        flop_chart("Held-out loss against FLOPs", lines(total_flops), y_label, captions[1], **more),
    ]


def curve_records(arm: str, seed: int, evaluations: Evaluations) -> Iterator[Record]:
    """Yield the rows of the tidy table for the evaluations before the last. Losses are finite."""
    for evaluation in evaluations[:-1]:
        if math.isfinite(loss := evaluation["held_out_loss"]):
            yield Record(arm, seed, evaluation["step"], "held_out_loss", "", loss)
        yield Record(arm, seed, evaluation["step"], "total_flops", "", total_flops(evaluation))
