"""Write the metrics of a run: JSON lines, TensorBoard, Weights & Biases, and log lines or a progress bar."""

import functools
import hashlib
import importlib.util
import math
import netrc
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from dwt_jax.config import Train
from dwt_jax.errors import UserError
from dwt_jax.files import json_text, read_intact_json, sync_if_supported
from dwt_jax.logs import logger
from dwt_jax.progress import Progress
from dwt_jax.runs.metrics_file import truncate_after
from dwt_jax.runs.run_dir import RUN_ID_KEY
from dwt_jax.text_format import format_float, format_metrics, format_with_error


class MetricWriter:
    """Writes the metrics of one run.

    Attributes:
        num_dropped: records of an interrupted run after its last checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        train: Train,
        step: int,
        name: str,
        active: bool = True,
        config: Mapping[str, Any] | None = None,
    ):
        """Open the outputs, and drop records after `step` that an interrupted run wrote.

        Args:
            workdir: directory of the run.
            train: settings of the run.
            step: completed steps.
            name: name of the run in log lines.
            active: whether this process writes metrics. If not, it only logs lines.
            config: all settings of the run, for Weights & Biases.
        """
        self._name = name
        self._file: TextIO | None = None
        self._writers: list[Callable[[dict[str, Any]], None]] = []
        self._exit_stack = ExitStack()
        self.num_dropped = 0
        if active:
            self._open_outputs(workdir, train, step, config or {})
        self._progress = Progress(name, train.steps, done=step, always=True)  # last: nothing fails after it
        self._exit_stack.callback(self._progress.close)

    def _open_outputs(self, workdir: Path, train: Train, step: int, config: Mapping[str, Any]) -> None:
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            self.num_dropped += truncate_after(workdir / file, step)
        self._file = self._exit_stack.enter_context(
            open(workdir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        )
        self._evaluations = self._exit_stack.enter_context(
            open(workdir / "evaluations.jsonl", "a", encoding="utf-8", buffering=1)
        )
        if train.tensorboard:
            self._add_tensorboard(workdir, step)
        if train.wandb_project:
            self._add_wandb(train.wandb_project, workdir, self._name, config)

    def _add_tensorboard(self, workdir: Path, step: int) -> None:
        # Not SummaryWriter, whose thread dies of a full disk, after which its queue blocks.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        directory = workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        writer = EventsWriter(str(directory / "events"))
        # TensorBoard drops what an interrupted run wrote after this step.
        start = Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        writer.write_event(start)

        def write(record: dict[str, Any]) -> None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    summary = scalar(key, value)
                    writer.write_event(Event(step=record["step"], wall_time=time.time(), summary=summary))
            with sync_if_supported(directory):
                writer.flush()

        def close() -> None:
            with sync_if_supported(directory):
                writer.close()

        self._writers.append(write)
        self._exit_stack.callback(close)

    def _add_wandb(self, project: str, workdir: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        # A resumed run continues there, another run in the same directory does not. Runs of earlier versions
        # have no id, and had one of their path.
        run_id = (read_intact_json(workdir / "run.json") or {}).get(RUN_ID_KEY)
        run_id = run_id or hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        try:
            wandb.init(
                project=project, name=name, dir=str(workdir), id=run_id, resume="allow", config=dict(config)
            )
        except Exception as error:  # of its own types: no network, another key, no such project
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"config: train.wandb_project: {project} cannot be used: {reason}") from error
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
        steps = record["step"] - self._progress.done
        self._progress.advance(steps, functools.partial(format_metrics, record), eta)

    def _write(self, file: TextIO, record: dict[str, Any]) -> None:
        file.write(json_text(record) + "\n")
        for write in self._writers:
            write({key: x for key, x in record.items() if not isinstance(x, float) or math.isfinite(x)})

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Write the result of an evaluation."""
        if self._file is not None:
            self._write(self._evaluations, record)
        loss = format_with_error(record["held_out_loss"], record["standard_error"])
        bits = record.get("bits_per_byte")
        per_byte = "" if bits is None else f", {format_float(bits, 4)} bits per byte"
        self.log_message(f"step {record['step']}: held-out loss {loss}{per_byte}")

    def log_message(self, text: str) -> None:
        """Log a message with the name of the run."""
        logger.info(f"{self._name}: {text}")

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


def wandb_problem() -> str:
    """Describe what Weights & Biases needs; '' if runs can be logged.

    Without this check it asks for a missing key, or fails, only at the first record.
    """
    if importlib.util.find_spec("wandb") is None:
        return "the package wandb installed"
    if os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun"):
        return ""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        path = os.environ.get("NETRC")  # else ~/.netrc
        has_key = netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        has_key = False
    return "" if has_key else f"a key for {host} in WANDB_API_KEY (or wandb login), or WANDB_MODE=offline"
