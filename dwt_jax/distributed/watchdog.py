"""A run that hangs ends: for a process that waits for ever, nobody else can tell why."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TICKS_PER_TIMEOUT = 20
"""So often it looks within its limit."""


@contextmanager
def hang_watchdog(timeout: float) -> Iterator[Callable[[], None]]:
    """A function to call whenever something is done: each step, each batch of an evaluation.

    If it is not called for `limit` seconds inside the block, every thread's stack is printed and the
    process ends with status 1. Compiling, evaluating and saving are silent for as long as one of them
    takes, so the limit must be longer. 0: never. Ticks are counted, not the clock's seconds: a
    process that is suspended has not been hanging.
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
    print(
        f"dwt: no step for {timeout:g} s (train.watchdog): this process ends; what each of its threads does:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=2, all_threads=True)
    sys.stdout.flush()
    os._exit(1)
