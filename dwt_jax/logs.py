"""The package's logger: messages go to standard error, one line each; results of commands are printed."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

logger = logging.getLogger("dwt_jax")

shown_bars: list[Any] = []
"""The tqdm bars on the terminal."""


@contextmanager
def above_bars(stream: TextIO) -> Iterator[None]:
    """Clear the bars while the block writes to standard output or error, and draw them again below."""
    if shown_bars:
        with shown_bars[-1].external_write_mode(file=stream):
            yield
    else:
        yield


class _StderrHandler(logging.Handler):
    """Writes to the current standard error. A write that fails raises, as `print` does."""

    process = ""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:
            return
        program = "dwt: " * (record.levelno >= logging.ERROR)
        process = self.process * (record.levelno >= logging.WARNING)
        with above_bars(sys.stderr):
            print(f"{program}{process}{record.getMessage()}", file=sys.stderr, flush=True)


_handler = _StderrHandler()


def set_process(index: int, has_own_log: bool) -> None:
    """Set which messages one of several processes shows: process 0 all, the others warnings and errors.

    Warnings and errors of the others begin with their index.

    Args:
        index: index of this process.
        has_own_log: whether this process writes to its own log file, which also gets the messages.
    """
    logger.setLevel(logging.INFO if index == 0 or has_own_log else logging.WARNING)
    _handler.process = f"process {index}: " if index else ""


logger.addHandler(_handler)
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
logger.propagate = False  # handlers of the root logger (absl's, for one) would print each message again
