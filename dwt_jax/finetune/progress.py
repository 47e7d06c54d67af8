"""Progress of a fine-tuning: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from typing import Any

import numpy as np

from dwt_jax.text_format import format_duration

LOG_INTERVAL_SECONDS = 10.0


class FinetuneProgress:
    """Counts and reports steps. The loss is copied to the host only when it is printed."""

    def __init__(self, name: str, steps: int):
        self._name, self._steps, self._step, self._examples = name, steps, 0, 0
        self._bar: Any = None

    def __enter__(self) -> "FinetuneProgress":
        self._start_time = self._last_log_time = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._steps, desc=self._name, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, loss: Any, examples: int) -> None:
        """Count a step.

        Args:
            loss: the S losses, on the device.
            examples: examples in the batch, over all seeds.
        """
        self._step, self._examples = self._step + 1, self._examples + examples
        now = time.perf_counter()
        if now - self._last_log_time < (LOG_INTERVAL_SECONDS if self._bar is None else 0.5):
            return
        self._last_log_time = now
        status = f"loss {np.mean(loss):.4f}  {self._examples / (now - self._start_time):,.1f} examples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        eta = format_duration((now - self._start_time) * (self._steps / self._step - 1))
        print(f"{self._name}: step {self._step}/{self._steps}  {status}  ETA {eta}", flush=True)

    def log(self, text: str) -> None:
        """Print a line, above the bar if one is shown."""
        if self._bar is None:
            print(f"{self._name}: {text}", flush=True)
        else:
            self._bar.write(f"{self._name}: {text}", file=sys.stderr)
