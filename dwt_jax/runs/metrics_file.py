"""Read and repair the JSON-lines files of a run, and sum their FLOPs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, json_text


def restore_nans(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a JSON file with NaN for null, which stands for a value that is not finite."""
    suffixes = ("loss", "error", "perplexity", "norm", "per_byte")
    return {
        key: math.nan if value is None and key.endswith(suffixes) else value for key, value in record.items()
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, or [] if it does not exist.

    Raises:
        UserError: a line is not a record with a step.
    """
    if not path.exists():
        return []
    records = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):  # incomplete after a kill: the next resume drops it
            break
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}: holds {text[:60]!r}, expected records that dwt wrote")
        records.append(restore_nans(record))
    return records


def truncate_after(path: Path, step: int) -> int:
    """Drop the records after `step` (and an incomplete last line) before appending to a file.

    Returns:
        The number of records that were dropped.
    """
    records = read_jsonl(path)
    lines = [json_text(record) + "\n" for record in records if record["step"] <= step]
    with atomic_write(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return len(records) - len(lines)


def total_flops(record: Mapping[str, Any]) -> float:
    """Return the FLOPs up to a record's step, including the teacher's forward passes."""
    return record["student_flops"] + record["teacher_flops"]


def sum_or_none(*parts: float | None) -> float | None:
    """Return the sum, or None if one of the values is unknown (None)."""
    values = [value for value in parts if value is not None]
    return sum(values) if len(values) == len(parts) else None
