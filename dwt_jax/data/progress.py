"""How far a long job is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 5.0


class Progress:
    """Counts text done, in bytes, and the share of what lies on disk, where that is known."""

    def __init__(self, name: str, stored_total: int, log: Callable[[str], None]):
        self._name, self._total, self._log = name, stored_total, log
        self._stored = self._text = 0
        self._start_time = self._last_log_time = time.monotonic()
        self._bar = self._new_bar() if sys.stderr.isatty() else None

    def _new_bar(self) -> Any:
        from tqdm import tqdm

        bar_format = (
            "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}" if self._total else None
        )
        return tqdm(
            desc=self._name, total=self._total or None, unit="B", unit_scale=True, bar_format=bar_format
        )

    def advance(self, stored: int, text: int) -> None:
        """stored: bytes on disk that were read; text: bytes of UTF-8 that came out of them."""
        self._stored, self._text = self._stored + stored, self._text + text
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._format_speed(now), refresh=False)
            self._bar.update(stored if self._total else text)
        elif now - self._last_log_time >= LINE_SECONDS:
            self._last_log_time = now
            self._log(f"{self._name}: {self._format_speed(now)}{self._format_eta(now)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._log(f"{self._name}: {self._format_speed(time.monotonic())}, done")

    def _format_speed(self, now: float) -> str:
        seconds = max(now - self._start_time, 1e-9)
        return f"{self._text / 1e6:.1f} MB of text, {self._text / 1e6 / seconds:.1f} MB/s"

    def _format_eta(self, now: float) -> str:
        fraction = self._stored / self._total if self._total else 0.0
        if not 0 < fraction <= 1:
            return ""
        seconds = round((now - self._start_time) * (1 - fraction) / fraction)
        return f", {fraction:.0%}, {seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
