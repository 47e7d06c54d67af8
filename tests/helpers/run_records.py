"""What a run wrote, and runs that must be equal."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def records(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def without_time(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in ("tokens_per_second", "mfu", "data_wait")}


def assert_same_run(left: Path, right: Path, begin: int = 0) -> None:
    """Parameters bit for bit, and every record after the step `begin` but for the times in it."""
    a, b = (load_file(run / "model" / "model.safetensors") for run in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name].view(np.uint32), b[name].view(np.uint32)), name
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a, b = ([without_time(r) for r in records(run, name) if r["step"] > begin] for run in (left, right))
        assert a == b
        assert a


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def cut_after(whole, cut, step):
    """A copy of a run that was killed right after the checkpoint of a step."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    for later in (cut / "checkpoints").iterdir():
        if later.name.isdigit() and int(later.name) > step:
            shutil.rmtree(later)
