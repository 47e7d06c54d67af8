"""SIGTERM and Ctrl-C: everything is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dwt_jax.distributed import coordination, preemption


class Preempted(BaseException):
    """Stopped by a signal with everything saved: run the same command again (exit status 75).

    Not an Exception: a signal while a checkpoint is read is no fault of the checkpoint.
    """


class TrainingFailed(Exception):
    """The run cannot go on; the message says why, the last good checkpoint is intact."""


class ShutdownFlag:
    """Whether a signal came, to any of the processes. Before `poll`, a signal ends the work at once
    (nothing is lost yet); after it, whoever works asks `is_set` between steps and saves.

    Of several processes each must ask equally often: all get True as the answer to the same question.
    """

    def __init__(self, preemption_sync: preemption.PreemptionSync | None = None) -> None:
        self._signal_received = self._armed = False
        self._preemption_sync = preemption_sync

    def is_set(self) -> bool:
        return (
            self._signal_received
            if self._preemption_sync is None
            else self._preemption_sync.reached_sync_point()
        )

    def arm(self) -> None:
        self._armed = True
        coordination.all_gather_objects("", "the other processes to be ready")

    def handle(self, signum: int, _: FrameType | None) -> None:
        if not self._armed:
            raise Preempted("stopped before it went on, nothing was changed; the same command starts again")
        if self._signal_received and signum == signal.SIGINT:  # a second Ctrl-C is meant
            raise KeyboardInterrupt
        self._signal_received = True
        if self._preemption_sync is not None:
            self._preemption_sync.request_stop()


_pending_signals: list[int] = []


@contextmanager
def defer_signals() -> Iterator[None]:
    """A signal inside the block, but outside of `handle_signals`, waits for the next `handle_signals` there. It raises
    nothing by itself: a module that is being imported would take that for an error of its own."""

    def defer(signum: int, _: FrameType | None) -> None:
        if _pending_signals and signum == signal.SIGINT:  # a second Ctrl-C is meant
            raise KeyboardInterrupt
        _pending_signals.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {signum: signal.signal(signum, defer) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _pending_signals.clear()
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


@contextmanager
def handle_signals() -> Iterator[ShutdownFlag]:
    """Handle both signals inside the block; in another thread than the main one, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield ShutdownFlag()
        return
    preemption_sync = None if coordination.is_single_process() else preemption.PreemptionSync()
    shutdown_flag = ShutdownFlag(preemption_sync)
    previous_handlers = {
        signum: signal.signal(signum, shutdown_flag.handle) for signum in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        if _pending_signals:
            shutdown_flag.handle(_pending_signals[0], None)
        yield shutdown_flag
    finally:
        if preemption_sync is not None:
            preemption_sync.close()
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
