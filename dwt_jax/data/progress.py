"""Progress of long jobs: a bar on a terminal, a log line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 5.0


class Progress:
    """Progress of one source, in bytes of text and as a fraction of the stored bytes."""

    def __init__(self, name: str, stored_total: int, log: Callable[[str], None]):
        """Start the clock, and the bar if stderr is a terminal.

        Args:
            name: how each line begins.
            stored_total: bytes on disk; 0 if unknown.
            log: called with each line.
        """
        self._name, self._stored_total, self._log = name, stored_total, log
        self._stored_bytes = self._text_bytes = 0
        self._start_time = self._last_log_time = time.monotonic()
        self._bar = self._new_bar() if sys.stderr.isatty() else None

    def _new_bar(self) -> Any:
        from tqdm import tqdm

        bar_format = None
        if self._stored_total:
            bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        total = self._stored_total or None
        return tqdm(desc=self._name, total=total, unit="B", unit_scale=True, bar_format=bar_format)

    def advance(self, stored_bytes: int, text_bytes: int) -> None:
        """Report work done since the last call.

        Args:
            stored_bytes: bytes read from disk.
            text_bytes: bytes of UTF-8 text decoded from them.
        """
        self._stored_bytes += stored_bytes
        self._text_bytes += text_bytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._format_speed(now), refresh=False)
            self._bar.update(stored_bytes if self._stored_total else text_bytes)
        elif now - self._last_log_time >= LINE_SECONDS:
            self._last_log_time = now
            self._log(f"{self._name}: {self._format_speed(now)}{self._format_eta(now)}")

    def close(self) -> None:
        """Remove the bar and log the totals."""
        if self._bar is not None:
            self._bar.close()
        self._log(f"{self._name}: {self._format_speed(time.monotonic())}, done")

    def _format_speed(self, now: float) -> str:
        seconds = max(now - self._start_time, 1e-9)
        megabytes = self._text_bytes / 1e6
        return f"{megabytes:.1f} MB of text, {megabytes / seconds:.1f} MB/s"

    def _format_eta(self, now: float) -> str:
        fraction = self._stored_bytes / self._stored_total if self._stored_total else 0.0
        if not 0 < fraction <= 1:
            return ""
        seconds = round((now - self._start_time) * (1 - fraction) / fraction)
        return f", {fraction:.0%}, {seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
