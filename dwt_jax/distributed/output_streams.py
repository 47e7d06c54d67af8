"""Standard output and error that survive a closed pipe or terminal."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _LastingStream:
    """A text stream that drops what is written once its pipe or terminal is gone."""

    def __init__(self, stream: TextIO, on_broken_pipe: Callable[[], None]):
        self._stream, self._on_broken_pipe = stream, on_broken_pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._survive_closing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._survive_closing():
            self._stream.flush()

    @contextmanager
    def _survive_closing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            _drop_output(self._stream.fileno())
            if error.errno == errno.EPIPE:
                self._on_broken_pipe()


def _drop_output(descriptor: int) -> None:
    """Let what is written to a file, as by standard output and error at once (`2>&1`), go nowhere."""
    closed, devnull = os.fstat(descriptor), os.open(os.devnull, os.O_WRONLY)
    for number in {descriptor, 1, 2}:
        with suppress(OSError):  # one that is not open
            if os.path.samestat(os.fstat(number), closed):
                os.dup2(devnull, number)
    os.close(devnull)


@contextmanager
def lasting_output(on_broken_pipe: Callable[[], None]) -> Iterator[None]:
    """Within the block, ignore closed pipes and terminals of standard output and error.

    The system reports a closed terminal by SIGHUP. If SIGHUP is ignored (nohup), the work outlives the
    terminal.

    Args:
        on_broken_pipe: called when the reader of standard output or error has ended (`dwt … | head`).
    """
    previous = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_LastingStream(stream, on_broken_pipe) for stream in previous)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = previous
