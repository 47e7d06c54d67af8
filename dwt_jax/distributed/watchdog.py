"""A watchdog that ends a process which makes no progress, and prints where each thread is."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TICKS_PER_TIMEOUT = 20


@contextmanager
def hang_watchdog(timeout: float) -> Iterator[Callable[[], None]]:
    """Abort the process if the yielded function is not called for `timeout` seconds.

    The stack of every thread is printed, and the process exits with status 1. Ticks of a timer are
    counted, not wall-clock time: a suspended process does not hang.

    Args:
        timeout: seconds; 0 disables the watchdog. It must be longer than compilation, an evaluation
            batch or a save, since none of them calls the function before it is done.

    Yields:
        A function to call after each unit of work, e.g. a step or a batch of an evaluation.
    """
    stop_event, ticks = threading.Event(), [0]

    def heartbeat() -> None:
        ticks[0] = 0

    def monitor() -> None:
        while not stop_event.wait(timeout / _TICKS_PER_TIMEOUT):
            ticks[0] += 1
            if ticks[0] > _TICKS_PER_TIMEOUT:
                _abort(timeout)

    if timeout:
        threading.Thread(target=monitor, name="watchdog", daemon=True).start()
    try:
        yield heartbeat
    finally:
        stop_event.set()


def _abort(timeout: float) -> None:
    # Not through the logger: the thread that hangs may hold its lock.
    text = f"dwt: no step for {timeout:g} s (train.watchdog); aborting this process. Stacks of its threads:\n"
    os.write(2, text.encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    sys.stdout.flush()
    os._exit(1)
