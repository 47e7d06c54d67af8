"""Numbers, durations and log lines as text."""

import math
from collections.abc import Sequence
from typing import Any


def format_duration(seconds: float) -> str:
    """Format seconds as '1:02:03' or '2:03'."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_count(count: float) -> str:
    """Format a large count as '67.0M' or '412k'."""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def format_share(share: float) -> str:
    """Format a share as '12.5 %', a share of ten or more as '1,234 %'."""
    return f"{share * 100:.3g} %" if share < 9.995 else f"{share * 100:,.0f} %"


def format_metrics(record: dict[str, Any]) -> str:
    """Format the metrics of one step, as in a line of metrics.jsonl, for a log line."""
    parts = [f"loss {record['loss']:.4f}", f"hard {record['hard_loss']:.4f}"]
    if record["teacher_hard_loss"] is not None:
        parts += [
            f"soft {record['soft_loss']:.4f}",
            f"teacher {record['teacher_hard_loss']:.4f}",
            f"alpha {record['alpha_hard']:.2g}:{record['alpha_soft']:.2g}",
            f"t {record['temperature']:.2g}",
        ]
    parts += [f"lr {record['learning_rate']:.2e}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    return "  ".join(parts)


def format_float(value: float, decimals: int, signed: bool = False) -> str:
    """Format a number with thousands separators and a typographic minus sign; '–' if it is not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{round(value, decimals) + 0.0:{'+' if signed else ''},.{decimals}f}".replace("-", "−")


def format_with_error(value: float, error: float) -> str:
    """Format a value as '5.7792 ± 0.0140'; omit an error that is not finite (a single document)."""
    return f"{format_float(value, 4)} ± {error:.4f}" if math.isfinite(error) else format_float(value, 4)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
