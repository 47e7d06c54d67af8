"""The package's logger: messages go to standard error, one line each; results of commands are printed."""

import logging
import sys
from typing import Any

logger = logging.getLogger("dwt_jax")

shown_bars: list[Any] = []
"""The tqdm bars on the terminal. A message is written above the last one."""


class _StderrHandler(logging.Handler):
    """Writes to the current standard error. A write that fails raises, as `print` does."""

    prefix = ""

    def emit(self, record: logging.LogRecord) -> None:
        program = "dwt: " * (record.levelno >= logging.ERROR)
        line = f"{program}{self.prefix}{record.getMessage()}"
        if shown_bars:
            shown_bars[-1].write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


_handler = _StderrHandler()


def set_process(index: int, has_own_log: bool) -> None:
    """Let process 0 show all messages, and other processes warnings and errors only, with their index.

    Args:
        index: index of this process.
        has_own_log: whether this process writes to its own log file, which also gets the messages.
    """
    logger.setLevel(logging.INFO if index == 0 or has_own_log else logging.WARNING)
    _handler.prefix = f"process {index}: " if index else ""


logger.addHandler(_handler)
logger.setLevel(logging.INFO)
logger.propagate = False  # handlers of the root logger (absl's, for one) would print each message again
