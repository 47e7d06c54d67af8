"""Exit statuses of the command line, and which exception ends with which."""

import os
import sys
from collections.abc import Callable
from typing import Any

from dwt_jax.errors import ReportedElsewhere, SaveFailed, UserError, out_of_space_reason

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_RESUMABLE, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


def exit_status(run: Callable[[], int | None]) -> int:
    """Call `run` and return its exit status; report user errors and known failures in one line on stderr."""
    try:
        return int(run() or EXIT_OK)
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"dwt: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # `dwt … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("dwt: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SaveFailed as error:
        print(f"dwt: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except Exception as error:
        if reason := out_of_space_reason(error):
            reason = reason[0].lower() + reason[1:]
            print(f"dwt: {reason}; completed files are kept", file=sys.stderr)
            return EXIT_FAILURE
        if not isinstance(error, OSError) or error.filename is None:
            raise
        print(f"dwt: {error.filename}: {error.strerror}, expected an accessible path", file=sys.stderr)
        return EXIT_USER_ERROR


def training_exit_status(run: Callable[[], Any]) -> int | None:
    """Call `run`, which trains, and return the exit status if it ends early, None if it completes."""
    from dwt_jax.distributed.coordination import PeerExited, process_index
    from dwt_jax.distributed.shutdown import Preempted, TrainingFailed

    try:
        run()
    except Preempted as preemption:
        print(f"dwt: {preemption}", file=sys.stderr)
        return EXIT_RESUMABLE
    except TrainingFailed as failure:  # raised in all processes
        if process_index() == 0:
            print(f"dwt: {failure}", file=sys.stderr)
        return EXIT_FAILURE
    except PeerExited as peer_exit:
        print(f"dwt: {peer_exit}", file=sys.stderr)
        return peer_exit.status or EXIT_FAILURE
    return None
