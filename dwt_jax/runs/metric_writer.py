"""Write the metrics of a run: JSON lines, TensorBoard, Weights & Biases, and log lines or a progress bar."""

import hashlib
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from dwt_jax.config import Train
from dwt_jax.distributed import coordination
from dwt_jax.files import json_text
from dwt_jax.runs.metrics_file import truncate_after
from dwt_jax.text_format import format_step, format_with_error


class MetricWriter:
    """Writes the metrics of one run."""

    def __init__(self, workdir: Path, train: Train, step: int, name: str, active: bool = True):
        """Open the outputs, and drop records after `step` that an interrupted run wrote.

        Args:
            workdir: directory of the run.
            train: settings of the run.
            step: completed steps.
            name: name of the run in log lines.
            active: whether this process writes. If not, there are log lines only.
        """
        self._steps, self._name = train.steps, name
        self._file: TextIO | None = None
        self._writers: list[Callable[[dict[str, Any]], None]] = []
        self._bar: Any = None
        self._exit_stack = ExitStack()
        if not active:
            return
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            truncate_after(workdir / file, step)
        self._file = self._exit_stack.enter_context(
            open(workdir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        )
        self._evaluations = self._exit_stack.enter_context(
            open(workdir / "evaluations.jsonl", "a", encoding="utf-8", buffering=1)
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
        # Not SummaryWriter, whose thread dies of a full disk, after which its queue blocks.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        (workdir / "tensorboard").mkdir(exist_ok=True)
        writer = EventsWriter(str(workdir / "tensorboard" / "events"))
        # TensorBoard drops what an interrupted run wrote after this step.
        start = Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        writer.write_event(start)

        def write(record: dict[str, Any]) -> None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    summary = scalar(key, value)
                    writer.write_event(Event(step=record["step"], wall_time=time.time(), summary=summary))
            writer.flush()

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
        """Write the metrics of a training step.

        Args:
            record: the metrics, with the step.
            eta: seconds until the end of the run.
        """
        if self._file is not None:
            self._write(self._file, record)
        if self._bar is None:
            self.log_message(format_step(record, self._steps, eta))
        else:
            fields = format_step(record, self._steps, eta).split("  ")[1:-1]  # the bar has step and ETA
            self._bar.set_postfix_str("  ".join(fields), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def _write(self, file: TextIO, record: dict[str, Any]) -> None:
        file.write(json_text(record) + "\n")
        for write in self._writers:
            write({key: x for key, x in record.items() if not isinstance(x, float) or math.isfinite(x)})

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Write the result of an evaluation."""
        if self._file is not None:
            self._write(self._evaluations, record)
        loss = format_with_error(record["held_out_loss"], record["standard_error"])
        self.log_message(f"step {record['step']}: held-out loss {loss}")

    def log_message(self, text: str) -> None:
        """Print a log line, above the progress bar if there is one."""
        if self._bar is None:
            coordination.log_on_main(f"{self._name}: {text}")
        else:
            self._bar.write(f"{self._name}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Close all outputs."""
        self._exit_stack.close()


class ThroughputMeter:
    """Measures FLOPs and tokens per second since the last read.

    The first interval begins after the first step, which includes compilation.

    Attributes:
        wait: seconds spent waiting for data, which the caller adds.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._flops, self._tokens = 0.0, 0
        self.wait = 0.0

    def add(self, tokens: int, flops: float) -> None:
        """Count a step of `tokens` tokens and `flops` FLOPs."""
        if self._start == 0:
            self._start = time.perf_counter()
        else:
            self._flops, self._tokens = self._flops + flops, self._tokens + tokens

    def restart(self) -> None:
        """Begin a new interval, to exclude an evaluation."""
        self._start, self._flops, self._tokens, self.wait = time.perf_counter(), 0.0, 0, 0.0

    def read_and_reset(self) -> tuple[float, float, float]:
        """Return FLOP/s, tokens/s and the share of time spent waiting for data; begin a new interval."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        result = self._flops / seconds, self._tokens / seconds, min(self.wait / seconds, 1.0)
        self.restart()
        return result
