"""What a run says of itself: `metrics.jsonl`, TensorBoard, Weights & Biases, and a line or a
bar for whoever watches."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from dwt_jax.config import Train
from dwt_jax.distributed import coordination
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, json_text


def format_duration(seconds: float) -> str:
    """'1:02:03' or '2:03'"""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_count(count: float) -> str:
    """'67.0M', '412k'"""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def format_step(record: dict[str, Any], steps: int, eta: float) -> str:
    """One logged step for a person."""
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {record['loss']:.4f}",
        f"hard {record['hard_loss']:.4f}",
    ]
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
    return "  ".join([*parts, f"ETA {format_duration(eta)}"])


def restore_nans(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record from a JSON file, where null stands for what was not finite: NaN again."""
    suffixes = ("loss", "error", "perplexity", "norm")
    return {
        key: math.nan if value is None and key.endswith(suffixes) else value for key, value in record.items()
    }


def format_float(value: float, decimals: int, signed: bool = False) -> str:
    """With thousands separated, and a real minus sign; '–' for what is not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{round(value, decimals) + 0.0:{'+' if signed else ''},.{decimals}f}".replace("-", "−")


def format_with_error(value: float, error: float) -> str:
    """'5.7792 ± 0.0140'; of one document the error is not known."""
    return f"{format_float(value, 4)} ± {error:.4f}" if math.isfinite(error) else format_float(value, 4)


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


class MetricWriter:
    """Writes the records of one run; with `active=False` (all processes but the first) no file, and says
    only what `coordination.log_on_main` lets through."""

    def __init__(self, workdir: Path, train: Train, step: int, name: str, active: bool = True):
        self._steps, self._name = train.steps, name
        self._file: TextIO | None = None
        self._writers: list[Callable[[dict[str, Any]], None]] = []
        self._bar: Any = None
        self._exit_stack = ExitStack()
        if not active:
            return
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            truncate_after(workdir / file, step)
        self._file = self._exit_stack.enter_context(open(workdir / "metrics.jsonl", "a", buffering=1))
        self._evaluations = self._exit_stack.enter_context(
            open(workdir / "evaluations.jsonl", "a", buffering=1)
        )
        if train.tensorboard:
            self._add_tensorboard(workdir, step)
        if train.wandb_project:
            self._add_wandb(train.wandb_project, workdir, name)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=train.steps, initial=step, desc=name, unit="step", dynamic_ncols=True)
            self._exit_stack.callback(self._bar.close)

    def _add_tensorboard(self, workdir: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

        def write(record: dict[str, Any]) -> None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    writer.add_scalar(key, value, record["step"])

        self._writers.append(write)
        self._exit_stack.callback(writer.close)

    def _add_wandb(self, project: str, workdir: Path, name: str) -> None:
        import wandb

        # The same name for the same directory: a resumed run goes on there too.
        identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        wandb.init(project=project, name=name, dir=str(workdir), id=identity, resume="allow")
        self._writers.append(lambda record: wandb.log(record, step=record["step"]))
        self._exit_stack.callback(wandb.finish)

    def log_step(self, record: dict[str, Any], eta: float) -> None:
        """One logged training step."""
        if self._file is not None:
            self._write(self._file, record)
        if self._bar is None:
            self.log_message(format_step(record, self._steps, eta))
        else:
            fields = format_step(record, self._steps, eta).split("  ")[
                1:-1
            ]  # the bar has step and ETA itself
            self._bar.set_postfix_str("  ".join(fields), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def _write(self, file: TextIO, record: dict[str, Any]) -> None:
        file.write(json_text(record) + "\n")
        for write in self._writers:
            write({key: x for key, x in record.items() if not isinstance(x, float) or math.isfinite(x)})

    def log_evaluation(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._write(self._evaluations, record)
        loss = format_with_error(record["held_out_loss"], record["standard_error"])
        self.log_message(f"step {record['step']}: held-out loss {loss}")

    def log_message(self, text: str) -> None:
        """A line for whoever watches, above the bar if there is one."""
        if self._bar is None:
            coordination.log_on_main(f"{self._name}: {text}")
        else:
            self._bar.write(f"{self._name}: {text}", file=sys.stderr)

    def close(self) -> None:
        self._exit_stack.close()


class ThroughputMeter:
    """Steps and tokens per second since the last `take`, the first interval without its first
    step (the compilation)."""

    def __init__(self) -> None:
        self._start = 0.0
        self._steps = self._tokens = 0
        self.wait = 0.0

    def add(self, tokens: int) -> None:
        if self._start == 0:
            self._start = time.perf_counter()
        else:
            self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def restart(self) -> None:
        """Leave out what happened since the last `take`: an evaluation is not training."""
        self._start, self._steps, self._tokens, self.wait = time.perf_counter(), 0, 0, 0.0

    def read_and_reset(self) -> tuple[float, float, float]:
        """(steps/s, tokens/s, share of the time spent waiting for data)"""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        result = self._steps / seconds, self._tokens / seconds, min(self.wait / seconds, 1.0)
        self.restart()
        return result
