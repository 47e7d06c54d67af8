"""SIGTERM and Ctrl-C: everything is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Stopped by a signal with everything saved: run the same command again (exit status 75).

    Not an Exception: a signal while a checkpoint is read is no fault of the checkpoint.
    """


class Stopping:
    """Whether a signal came. Before `poll`, a signal ends the work at once (nothing is lost
    yet); after it, whoever works asks `is_set` between steps and saves."""

    def __init__(self) -> None:
        self._came = self._polled = False

    def is_set(self) -> bool:
        return self._came

    def poll(self) -> None:
        self._polled = True

    def handle(self, number: int, _: FrameType | None) -> None:
        if not self._polled:
            raise Stopped("stopped before it went on, nothing was changed; the same command starts again")
        if self._came and number == signal.SIGINT:  # a second Ctrl-C is meant
            raise KeyboardInterrupt
        self._came = True


@contextmanager
def signals() -> Iterator[Stopping]:
    """Handle both signals inside the block; in another thread than the main one, do nothing."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stopping.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
