"""SIGTERM and Ctrl-C: everything is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dwt_jax.distributed import coordination, preemption


class Stopped(BaseException):
    """Stopped by a signal with everything saved: run the same command again (exit status 75).

    Not an Exception: a signal while a checkpoint is read is no fault of the checkpoint.
    """


class Failed(Exception):
    """The run cannot go on; the message says why, the last good checkpoint is intact."""


class Stopping:
    """Whether a signal came, to any of the processes. Before `poll`, a signal ends the work at once
    (nothing is lost yet); after it, whoever works asks `is_set` between steps and saves.

    Of several processes each must ask equally often: all get True as the answer to the same question.
    """

    def __init__(self, together: preemption.Agreement | None = None) -> None:
        self._came = self._polled = False
        self._together = together

    def is_set(self) -> bool:
        return self._came if self._together is None else self._together.reached()

    def poll(self) -> None:
        self._polled = True
        coordination.gather("", "the other processes to be ready")

    def handle(self, number: int, _: FrameType | None) -> None:
        if not self._polled:
            raise Stopped("stopped before it went on, nothing was changed; the same command starts again")
        if self._came and number == signal.SIGINT:  # a second Ctrl-C is meant
            raise KeyboardInterrupt
        self._came = True
        if self._together is not None:
            self._together.ask()


_kept: list[int] = []


@contextmanager
def kept() -> Iterator[None]:
    """A signal inside the block, but outside of `signals`, waits for the next `signals` there. It raises
    nothing by itself: a module that is being imported would take that for an error of its own."""

    def keep(number: int, _: FrameType | None) -> None:
        if _kept and number == signal.SIGINT:  # a second Ctrl-C is meant
            raise KeyboardInterrupt
        _kept.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, keep) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _kept.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals() -> Iterator[Stopping]:
    """Handle both signals inside the block; in another thread than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield Stopping()
        return
    together = None if coordination.alone() else preemption.Agreement()
    stopping = Stopping(together)
    before = {number: signal.signal(number, stopping.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if _kept:
            stopping.handle(_kept[0], None)
        yield stopping
    finally:
        if together is not None:
            together.close()
        for number, handler in before.items():
            signal.signal(number, handler)
