"""Handling of SIGTERM and Ctrl-C: a run saves its state before it ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dwt_jax.distributed import coordination, preemption
from dwt_jax.distributed.output_streams import lasting_output


class Preempted(BaseException):
    """A signal stopped the work after everything was saved; the same command resumes it (exit status 75).

    Not an Exception: a signal during the restore of a checkpoint does not make the checkpoint invalid.
    """


class TrainingFailed(Exception):
    """The run cannot continue. The message says why; the last good checkpoint is intact."""


NOTHING_CHANGED = "stopped before the first step; nothing was changed. Rerun the same command to start again."
BETWEEN_RUNS = "stopped between two runs. Rerun the same command to resume."


class ShutdownFlag:
    """Whether a signal has arrived, on any of the processes.

    Before `arm`, a signal ends the work at once, since nothing can be lost yet. After it, the program
    calls `is_set` between steps and saves. With several processes, all of them must call `is_set`
    equally often: it turns True at the same call on every process.

    Args:
        preemption_sync: agrees on the step with the other processes; None in a single process.
        unarmed_message: message for a signal before `arm`.
    """

    def __init__(
        self,
        preemption_sync: preemption.PreemptionSync | None = None,
        unarmed_message: str = NOTHING_CHANGED,
    ) -> None:
        self._signal_received = self._armed = False
        self._preemption_sync = preemption_sync
        self._unarmed_message = unarmed_message

    def is_set(self) -> bool:
        """Return whether to save and stop now."""
        if self._preemption_sync is None:
            return self._signal_received
        return self._preemption_sync.reached_sync_point()

    def was_signaled(self) -> bool:
        """Whether a signal has arrived on this process."""
        return self._signal_received

    def arm(self) -> None:
        """From here on a signal sets the flag. Waits for all processes to call it."""
        self._armed = True
        coordination.all_gather_objects("", "the other processes to be ready")

    def handle(self, signum: int, _: FrameType | None) -> None:
        """Handle a signal; the arguments are those of `signal.signal`'s handlers.

        Raises:
            Preempted: the flag is not armed yet.
            KeyboardInterrupt: at the second Ctrl-C.
        """
        if not self._armed:
            raise Preempted(self._unarmed_message)
        if self._signal_received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal_received = True
        if self._preemption_sync is not None:
            self._preemption_sync.request_stop()


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""After these a run saves and ends: a scheduler's, Ctrl-C, a closed terminal, Slurm's --signal."""

_pending_signals: list[int] = []


def _stop_signals() -> list[signal.Signals]:
    """STOP_SIGNALS without SIGHUP if the process is to outlive its terminal (nohup)."""
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signum for signum in STOP_SIGNALS if not (is_nohup and signum == signal.SIGHUP)]


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer signals inside the block until the next `handle_signals`, which handles them.

    The handler must not raise: a module that is being imported could mistake the exception for its own
    ImportError. A second Ctrl-C still raises KeyboardInterrupt.
    """

    def defer(signum: int, _: FrameType | None) -> None:
        if _pending_signals and signum == signal.SIGINT:
            raise KeyboardInterrupt
        _pending_signals.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handlers = {signum: signal.signal(signum, defer) for signum in _stop_signals()}
    try:
        yield
    finally:
        _pending_signals.clear()
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)


@contextmanager
def handle_signals(unarmed_message: str = NOTHING_CHANGED) -> Iterator[ShutdownFlag]:
    """Make STOP_SIGNALS set the yielded flag inside the block, or raise Preempted before `ShutdownFlag.arm`.

    A closed pipe of standard output or error does so too.

    A signal that arrives while the block saves its results goes to the flag of an enclosing block: a study
    then stops after that run. Outside the main thread, where Python allows no signal handlers, the flag is
    never set.

    Args:
        unarmed_message: message for a signal before the flag is armed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield ShutdownFlag()
        return
    preemption_sync = None if coordination.is_single_process() else preemption.PreemptionSync()
    shutdown_flag = ShutdownFlag(preemption_sync, unarmed_message)
    previous_handlers = {signum: signal.signal(signum, shutdown_flag.handle) for signum in _stop_signals()}
    try:
        if _pending_signals:
            shutdown_flag.handle(_pending_signals[0], None)
        with lasting_output(lambda: shutdown_flag.handle(signal.SIGPIPE, None)):
            yield shutdown_flag
    finally:
        if preemption_sync is not None:
            preemption_sync.close()
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
    outer_flag = getattr(previous_handlers[signal.SIGTERM], "__self__", None)
    if shutdown_flag.was_signaled() and isinstance(outer_flag, ShutdownFlag):
        outer_flag.handle(signal.SIGTERM, None)
