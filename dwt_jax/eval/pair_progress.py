"""Progress of the evaluation on minimal pairs: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from typing import Any

from dwt_jax.text_format import format_duration

LOG_INTERVAL_SECONDS = 10.0


class PairProgress:
    """Reports pairs on stderr. What is counted is scored tokens, which take equal time; pairs do not."""

    def __init__(self, pairs: int, tokens: int):
        """Take the number of pairs that are still to be scored, and of the tokens of their sentences."""
        self._pairs, self._tokens, self._tokens_done = pairs, max(tokens, 1), 0
        self._bar: Any = None

    def __enter__(self) -> "PairProgress":
        self._start_time = self._last_log_time = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._pairs, desc="pairs", unit="pair", dynamic_ncols=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, tokens: int) -> None:
        """Count scored tokens."""
        self._tokens_done += tokens
        fraction = self._tokens_done / self._tokens
        pairs = int(self._pairs * fraction)
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(pairs - self._bar.n)
        elif now - self._last_log_time >= LOG_INTERVAL_SECONDS:
            self._last_log_time = now
            seconds = now - self._start_time
            eta = format_duration(seconds * (1 / fraction - 1))
            print(
                f"pairs {pairs:,}/{self._pairs:,}  {pairs / seconds:,.0f} pairs/s  ETA {eta}",
                file=sys.stderr,
                flush=True,
            )
