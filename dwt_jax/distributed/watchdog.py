"""A run that hangs ends: for a process that waits for ever, nobody else can tell why."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TICKS = 20
"""So often it looks within its limit."""


@contextmanager
def watching(limit: float) -> Iterator[Callable[[], None]]:
    """A function to call whenever something is done: each step, each batch of an evaluation.

    If it is not called for `limit` seconds inside the block, every thread's stack is printed and the
    process ends with status 1. Compiling, evaluating and saving are silent for as long as one of them
    takes, so the limit must be longer. 0: never. Ticks are counted, not the clock's seconds: a
    process that is suspended has not been hanging.
    """
    over, ticks = threading.Event(), [0]

    def beat() -> None:
        ticks[0] = 0

    def watch() -> None:
        while not over.wait(limit / _TICKS):
            ticks[0] += 1
            if ticks[0] > _TICKS:
                _end(limit)

    if limit:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield beat
    finally:
        over.set()


def _end(limit: float) -> None:
    print(
        f"dwt: no step for {limit:g} s (train.watchdog): this process ends; what each of its threads does:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=2, all_threads=True)
    sys.stdout.flush()
    os._exit(1)
