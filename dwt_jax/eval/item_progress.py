"""Progress of work on many items on stderr: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from typing import Any

from dwt_jax.text_format import format_duration

LOG_INTERVAL_SECONDS = 10.0


class ItemProgress:
    """Reports items on stderr. What is counted is units of work that take equal time; items may not."""

    def __init__(self, noun: str, items: int, units: int):
        """Take the name of the items in the plural, their number, and the number of units of work in them."""
        self._noun, self._items, self._units, self._units_done = noun, items, max(units, 1), 0
        self._bar: Any = None

    def __enter__(self) -> "ItemProgress":
        self._start_time = self._last_log_time = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._items, desc=self._noun, unit=f" {self._noun}", dynamic_ncols=True, delay=1
            )
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int) -> None:
        """Count units of work."""
        self._units_done += units
        fraction = self._units_done / self._units
        items = int(self._items * fraction)
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(items - self._bar.n)
        elif now - self._last_log_time >= LOG_INTERVAL_SECONDS:
            self._last_log_time = now
            seconds = now - self._start_time
            eta = format_duration(seconds * (1 / fraction - 1))
            print(
                f"{self._noun} {items:,}/{self._items:,}  {items / seconds:,.0f} {self._noun}/s  ETA {eta}",
                file=sys.stderr,
                flush=True,
            )
