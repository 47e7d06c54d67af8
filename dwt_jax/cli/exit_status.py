"""Exit statuses of the command line, and the exceptions that lead to them."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dwt_jax import runtime_env
from dwt_jax.errors import ReportedElsewhere, SaveFailed, UserError, out_of_space_reason
from dwt_jax.logs import logger

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_RESUMABLE, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


class EndedBySignal(KeyboardInterrupt):
    """A signal ends the command, as Ctrl-C does."""

    def __init__(self, signum: int):
        self.signal = signal.Signals(signum)


@contextmanager
def raise_at_signals() -> Iterator[None]:
    """Make SIGTERM, SIGHUP and SIGUSR1 end the block as Ctrl-C does, so that no partial file is left.

    Inner blocks that save before they stop install their own handlers. A second signal ends the process
    at once. An ignored signal (nohup) stays ignored.

    Raises:
        EndedBySignal: after a signal.
    """

    def handle(signum: int, _: FrameType | None) -> None:
        restore()
        raise EndedBySignal(signum)

    def restore() -> None:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:  # not if it is ignored from here on
                signal.signal(number, handler)

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(signum) is signal.SIG_DFL:
                previous[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        restore()


def exit_status(run: Callable[[], int | None]) -> int:
    """Call `run` and return its exit status; report user errors and known failures in one line on stderr."""
    try:
        return int(run() or EXIT_OK)
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except UserError as error:
        logger.error(error)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `dwt … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except EndedBySignal as error:
        logger.error(f"ended by {error.signal.name}; completed files are kept")
        return 128 + error.signal  # as a shell reports it
    except KeyboardInterrupt:
        logger.error("interrupted")
        return EXIT_INTERRUPTED
    except SaveFailed as error:
        logger.error(error)
        return EXIT_FAILURE
    except Exception as error:
        if reason := out_of_space_reason(error):
            reason = reason[0].lower() + reason[1:]
            logger.error(f"{reason}; completed files are kept")
            return EXIT_FAILURE
        if reason := runtime_env.backend_problem(error):
            logger.error(f"{reason}")
            return EXIT_USER_ERROR
        if not isinstance(error, OSError) or error.filename is None:
            raise
        logger.error(f"{error.filename}: {error.strerror}, expected an accessible path")
        return EXIT_USER_ERROR


def training_exit_status(run: Callable[[], Any]) -> int | None:
    """Call `run`, which trains, and return the exit status if it ends early, None if it completes."""
    from dwt_jax.distributed.coordination import PeerExited, process_index
    from dwt_jax.distributed.shutdown import Preempted, TrainingFailed

    try:
        run()
    except Preempted as preemption:
        logger.error(f"{preemption}")
        return EXIT_RESUMABLE
    except TrainingFailed as failure:  # raised in all processes
        if process_index() == 0:
            logger.error(f"{failure}")
        return EXIT_FAILURE
    except PeerExited as peer_exit:
        logger.error(f"{peer_exit}")
        return peer_exit.status or EXIT_FAILURE
    return None
