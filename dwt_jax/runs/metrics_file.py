"""Read and mend the JSON-lines files of a run, and sum what they count."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, json_text


def restore_nans(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record from a JSON file, where null stands for what was not finite: NaN again."""
    suffixes = ("loss", "error", "perplexity", "norm")
    return {
        key: math.nan if value is None and key.endswith(suffixes) else value for key, value in record.items()
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; [] if there is none."""
    if not path.exists():
        return []
    records = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):  # torn by a kill: the next resume drops it
            break
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}: holds {text[:60]!r}, expected records that dwt wrote")
        records.append(restore_nans(record))
    return records


def truncate_after(path: Path, step: int) -> None:
    """Drop the records after `step` (and a torn last line) of a file that is to be appended to."""
    lines = [json_text(record) + "\n" for record in read_jsonl(path) if record["step"] <= step]
    with atomic_write(path) as partial:
        partial.write_text("".join(lines))


def total_flops(record: Mapping[str, Any]) -> float:
    """FLOPs up to a record's step, the teacher's forward charged."""
    return record["student_flops"] + record["teacher_flops"]


def sum_or_none(*parts: float | None) -> float | None:
    """Their sum, None where one of them is not known."""
    values = [value for value in parts if value is not None]
    return sum(values) if len(values) == len(parts) else None
