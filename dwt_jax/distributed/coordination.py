"""Host-side messages between processes, through JAX's coordination service. No device takes part.

In a single process every function returns at once. With several processes, all of
them must call these functions in the same order, as they must call compiled programs.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dwt_jax.errors import ReportedElsewhere, UserError, out_of_space_reason
from dwt_jax.logs import logger

T = TypeVar("T")

PROCESS_LOGS_ENV = "DWT_PROCESS_LOGS"
"""A directory: every process except process 0 writes its output to a file in it."""

HEARTBEAT_TIMEOUT_ENV = "DWT_HEARTBEAT_TIMEOUT"

_EXIT_STATUS_PREFIX = "dwt/now/left/"  # + process index: its exit status
_ALL_EXITED_PREFIX = "dwt/over/"  # + 0: process 0 has seen all processes exit
_FAREWELL_PREFIX = "dwt/gone/"  # + process index: that process is about to exit
_call_ids = itertools.count()


class PeerExited(Exception):
    """Another process exited, so this one cannot continue.

    Attributes:
        status: the exit status of the other process.
    """

    def __init__(self, process: int, status: int):
        super().__init__(
            f"process {process} ended with status {status}, so process {process_index()} ends too"
        )
        self.status = status


def env_seconds(name: str, default: float) -> float:
    """Read a duration in seconds from the environment.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}: {text!r}, expected a number of seconds above 0")
    return value


def heartbeat_timeout() -> float:
    """Return the seconds after which a process that does not answer is considered dead."""
    return env_seconds(HEARTBEAT_TIMEOUT_ENV, 60)


def coordination_client() -> Any:
    """Return the client of the coordination service, or None in a single process.

    JAX has no public name for it; Orbax uses the same one.
    """
    return _distributed_state().client if _distributed_state() else None


def _distributed_state() -> Any:
    """JAX's distributed state, or None before jax is imported: nothing can be connected then."""
    module = sys.modules.get("jax._src.distributed")
    return module.global_state if module else None


def process_index() -> int:
    """Return the index of this process. Unlike jax.process_index(), this starts no backend."""
    return _distributed_state().process_id if _distributed_state() else 0


def process_count() -> int:
    """Return the number of processes. Unlike jax.process_count(), this starts no backend."""
    return _distributed_state().num_processes if _distributed_state() else 1


def is_single_process() -> bool:
    """Return whether this process is not connected to others."""
    return coordination_client() is None


def all_gather_objects(value: Any, waiting_for: str = "") -> list[Any]:
    """Gather `value` from all processes. Returns once every process has called.

    Args:
        value: anything that JSON can represent.
        waiting_for: printed by a process that waits for more than 5 seconds.

    Returns:
        The values of all processes, by process index.

    Raises:
        PeerExited: another process exited in the meantime.
    """
    if is_single_process():
        return [json.loads(json.dumps(value))]
    return all_gather_with_key(f"turn/{next(_call_ids)}", value, waiting_for)


def all_gather_with_key(name: str, value: Any, waiting_for: str = "") -> list[Any]:
    """Gather as `all_gather_objects` does, under a key that is used once.

    Process 0 collects the values, so this takes three messages a process.
    """
    key = f"dwt/{name}/"
    coordination_client().key_value_set(f"{key}{process_index()}", json.dumps(value))
    if process_index() == 0:
        values = [json.loads(_wait_for_value(f"{key}{i}", waiting_for)) for i in range(process_count())]
        coordination_client().key_value_set(f"{key}all", json.dumps(values))
    return json.loads(_wait_for_value(f"{key}all", waiting_for))


def _wait_for_value(key: str, waiting_for: str) -> str:
    """Wait for a key to be set, a second at a time, so that signals and exits are noticed."""
    start_time, has_logged = time.monotonic(), not waiting_for
    while True:
        try:
            return coordination_client().blocking_key_value_get(key, 1000)
        except RuntimeError as error:  # JaxRuntimeError is one
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for process, status in exited_processes().items():
            raise PeerExited(process, status)
        if not has_logged and time.monotonic() - start_time > 5:
            logger.warning(f"waiting for {waiting_for}")
            has_logged = True


def run_on_all(work: Callable[[], T]) -> T:
    """Call `work` on every process and return its result if it succeeds on all of them.

    Raises:
        UserError: some process raised UserError, or OSError for a file. All processes raise; only
            process 0 prints the message.
    """
    if is_single_process():
        return work()
    problem = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.filename is None or out_of_space_reason(error):
            raise
        problem = _describe_file_error(error)
    _raise_if_any(all_gather_objects(problem))
    return result


def _describe_file_error(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}, expected a path that can be used"


def _raise_if_any(problems: list[str | None]) -> None:
    process, problem = next(((i, text) for i, text in enumerate(problems) if text), (0, None))
    if problem is None:
        return
    error_type = UserError if process_index() == 0 else ReportedElsewhere
    raise error_type(problem if problems[0] == problem else f"process {process}: {problem}")


def run_on_main(work: Callable[[], T], waiting_for: str = "process 0") -> T:
    """Call `work` on process 0 and broadcast its result. The other processes wait.

    Args:
        work: a function whose result JSON can represent.
        waiting_for: printed by a process that waits for more than 5 seconds.

    Raises:
        UserError: as in `run_on_all`.
    """
    if is_single_process():
        return work()
    outcome: dict[str, Any] = {}
    if process_index() == 0:
        try:
            outcome = {"value": work()}
        except UserError as error:
            outcome = {"problem": str(error)}
        except OSError as error:
            if error.filename is None or out_of_space_reason(error):
                raise
            outcome = {"problem": _describe_file_error(error)}
    outcome = all_gather_objects(outcome, waiting_for)[0]
    _raise_if_any([outcome.get("problem")])
    return outcome["value"]


def assert_equal_across_processes(values: dict[str, Any]) -> None:
    """Check that `values` (JSON) are the same on all processes.

    Raises:
        UserError: a value differs from that of process 0. The message names the first difference.
    """
    if is_single_process():
        return
    for process, other in enumerate(all_values := all_gather_objects(values)):
        for key in {**all_values[0], **other}:
            value, expected = other.get(key), all_values[0].get(key)
            if value != expected:
                _raise_if_any(
                    [f"{key} is {value!r} in process {process}, expected {expected!r} as in process 0"]
                )


def report_exit(status: int) -> None:
    """Publish that this process exits with `status`."""
    coordination_client().key_value_set(f"{_EXIT_STATUS_PREFIX}{process_index()}", str(status), True)


def exited_processes(include_self: bool = False) -> dict[int, int]:
    """Return the exit status of every process that has published one, by process index."""
    statuses = {
        int(key.rpartition("/")[2]): int(value)
        for key, value in coordination_client().key_value_dir_get(_EXIT_STATUS_PREFIX)
    }
    return {
        process: status for process, status in statuses.items() if include_self or process != process_index()
    }


def all_exited() -> bool:
    """Return whether all processes have exited.

    Process 0 decides, with its own number of processes; the others read its answer.
    """
    if process_index():
        return bool(coordination_client().key_value_dir_get(_ALL_EXITED_PREFIX))
    return len(exited_processes(include_self=True)) == process_count()


def final_barrier() -> None:
    """Wait at the final barrier before exit.

    Process 0 hosts the coordination service and waits briefly for the others: JAX aborts any
    process that loses it.
    """
    if process_index():
        coordination_client().key_value_set(f"{_FAREWELL_PREFIX}{process_index()}", "", True)
        return
    coordination_client().key_value_set(f"{_ALL_EXITED_PREFIX}0", "", True)
    deadline = time.monotonic() + 5
    while (
        time.monotonic() < deadline
        and len(coordination_client().key_value_dir_get(_FAREWELL_PREFIX)) < process_count() - 1
    ):
        time.sleep(0.05)
    time.sleep(0.2)  # between its last message and its exit a process takes a moment
