"""Progress of long jobs: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from dwt_jax.logs import logger, shown_bars
from dwt_jax.text_format import format_duration

LINE_SECONDS, BAR_SECONDS = 10.0, 0.5
"""Shortest time between two lines, and between two states of the bar."""


class Progress:
    """Shows how much of some work is done.

    Attributes:
        done: amount of work that is done.
        seconds: time since the start.
    """

    def __init__(self, name: str, total: int, unit: str = "step", done: int = 0, always: bool = False):
        """Show the bar, if standard error is a terminal and this process shows messages.

        Args:
            name: how the bar and each line begin.
            total: amount of work in all; 0 if that is unknown.
            unit: what is counted. "B": bytes, of which lines show the share.
            done: amount of work that was done before.
            always: show the state at each call of `advance`.
        """
        self.done, self._name, self._total, self._unit, self._start = done, name, total, unit, done
        self._start_time = self._last_time = time.perf_counter()
        self._always = always
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm

            is_bytes = unit == "B"
            self._bar = tqdm(
                total=total or None,
                initial=done,
                desc=name,
                unit=unit if is_bytes else f" {unit}",
                unit_scale=is_bytes,
                miniters=1,
                dynamic_ncols=True,
            )
            shown_bars.append(self._bar)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start_time, 1e-9)

    def advance(
        self, amount: int = 1, status: Callable[[], str] | None = None, eta: float | None = None
    ) -> None:
        """Add finished work, and show the state if it was last shown some time ago.

        Args:
            amount: amount of work since the last call.
            status: called if the state is shown; returns the text to show. Default: the speed.
            eta: remaining seconds. Default: estimated from the speed so far.
        """
        self.done += amount
        now = time.perf_counter()
        wait = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if not self._always and now - self._last_time < wait:
            return
        self._last_time = now
        speed = (self.done - self._start) / self.seconds
        if self._bar is not None:
            self._bar.set_postfix_str(status() if status else "", refresh=False)
            self._bar.update(self.done - self._bar.n)
            return
        parts = [status() if status else f"{speed:,.0f} {self._unit}/s"]
        if self._total:
            is_bytes = self._unit == "B"
            share, count = f"{self.done / self._total:.0%}", f"{self._unit} {self.done}/{self._total}"
            parts.insert(0, share if is_bytes else count)
            if eta is None and speed and self.done <= self._total:
                eta = (self._total - self.done) / speed
            parts.append("" if eta is None else f"ETA {format_duration(eta)}")
        logger.info(f"{self._name}: {'  '.join(filter(None, parts))}")

    def close(self) -> None:
        """End the bar, with all work that was counted."""
        if self._bar is not None:
            self._bar.update(self.done - self._bar.n)
            shown_bars.remove(self._bar)
            self._bar.close()
            self._bar = None
