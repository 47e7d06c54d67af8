"""Messages of dwt_jax that are logged inside a block."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dwt_jax.logs import logger


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []

    class ListHandler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler = ListHandler()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
