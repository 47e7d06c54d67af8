"""Words between the processes of a run, through JAX's coordination service: no device takes part.

A process that runs alone talks to itself: every function answers at once. All processes must
call them in the same order, as they must the compiled programs.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dwt_jax.errors import ReportedElsewhere, UserError

T = TypeVar("T")

PROCESS_LOGS_ENV = "DWT_PROCESS_LOGS"
"""A directory: each process but the first writes what it says there, to a file of its own."""

_EXIT_STATUS_PREFIX = "dwt/now/left/"  # + process: the status that it ended with
_ALL_EXITED_PREFIX, _FAREWELL_PREFIX = (
    "dwt/over/",
    "dwt/gone/",
)  # what process 0 says at the end, and what the others do
_call_ids = itertools.count()


class PeerExited(Exception):
    """Another process ended, so this one cannot go on. `status`: that one's exit status."""

    def __init__(self, process: int, status: int):
        super().__init__(
            f"process {process} ended with status {status}, so process {process_index()} ends too"
        )
        self.status = status


def coordination_client() -> Any:
    """That of the coordination service. JAX has no public name for it; Orbax uses the same one."""
    return _distributed_state().client if _distributed_state() else None


def _distributed_state() -> Any:
    """Of jax, if that was imported: without it nothing can be connected."""
    module = sys.modules.get("jax._src.distributed")
    return module.global_state if module else None


def process_index() -> int:
    """Of this process. Unlike jax.process_index() it starts no backend."""
    return _distributed_state().process_id if _distributed_state() else 0


def process_count() -> int:
    return _distributed_state().num_processes if _distributed_state() else 1


def is_single_process() -> bool:
    return coordination_client() is None


def log_on_main(text: str) -> None:
    """A line from process 0; from the others only into their logs, where those were asked for."""
    if process_index() == 0 or os.environ.get(PROCESS_LOGS_ENV):
        print(text, flush=True)


def all_gather_objects(value: Any, waiting_for: str = "") -> list[Any]:
    """Every process's `value` (JSON) in order. Nobody goes on before all have given theirs.

    waiting_for: said by whoever waits for long. Raises Ended when a process has ended meanwhile.
    """
    if is_single_process():
        return [json.loads(json.dumps(value))]
    return all_gather_with_key(f"turn/{next(_call_ids)}", value, waiting_for)


def all_gather_with_key(name: str, value: Any, waiting_for: str = "") -> list[Any]:
    """`all_gather_objects` under a name that is used once. Process 0 collects: 3 messages a process."""
    key = f"dwt/{name}/"
    coordination_client().key_value_set(f"{key}{process_index()}", json.dumps(value))
    if process_index() == 0:
        values = [json.loads(_wait_for_value(f"{key}{i}", waiting_for)) for i in range(process_count())]
        coordination_client().key_value_set(f"{key}all", json.dumps(values))
    return json.loads(_wait_for_value(f"{key}all", waiting_for))


def _wait_for_value(key: str, waiting_for: str) -> str:
    """A value that will be set. Waits by the second, so that a signal or an end is noticed."""
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
            print(f"dwt: process {process_index()} waits for {waiting_for}", file=sys.stderr, flush=True)
            has_logged = True


def run_on_all(work: Callable[[], T]) -> T:
    """`work()`, if it goes well in all processes.

    A UserError or a file's OSError in some is a UserError in all of them, told by process 0 alone.
    """
    if is_single_process():
        return work()
    problem = None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"{error.filename}: {error.strerror}, expected a path that can be used"
    _raise_if_any(all_gather_objects(problem))
    return result


def _raise_if_any(problems: list[str | None]) -> None:
    process, problem = next(((i, text) for i, text in enumerate(problems) if text), (0, None))
    if problem is None:
        return
    error_type = UserError if process_index() == 0 else ReportedElsewhere
    raise error_type(problem if problems[0] == problem else f"process {process}: {problem}")


def run_on_main(work: Callable[[], T], waiting_for: str = "process 0") -> T:
    """What `work()` gives in process 0, in all of them (JSON). The others wait.

    Mistakes as in `run_on_all`.
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
            if error.filename is None:
                raise
            outcome = {"problem": f"{error.filename}: {error.strerror}, expected a path that can be used"}
    outcome = all_gather_objects(outcome, waiting_for)[0]
    _raise_if_any([outcome.get("problem")])
    return outcome["value"]


def assert_equal_across_processes(values: dict[str, Any]) -> None:
    """Raises UserError, which names the first difference, unless `values` (JSON) are those of process 0."""
    if is_single_process():
        return
    for process, other in enumerate(all_values := all_gather_objects(values)):
        for key in {**all_values[0], **other}:
            expected = all_values[0].get(key)
            if other.get(key) != expected:
                _raise_if_any(
                    [
                        f"{key} is {other.get(key)!r} in process {process}, expected {expected!r} as in process 0"
                    ]
                )


def report_exit(status: int) -> None:
    """Tell the others that this process ends."""
    coordination_client().key_value_set(f"{_EXIT_STATUS_PREFIX}{process_index()}", str(status), True)


def exited_processes(include_self: bool = False) -> dict[int, int]:
    """The processes that have ended, with their statuses."""
    statuses = {
        int(key.rpartition("/")[2]): int(value)
        for key, value in coordination_client().key_value_dir_get(_EXIT_STATUS_PREFIX)
    }
    return {
        process: status for process, status in statuses.items() if include_self or process != process_index()
    }


def all_exited() -> bool:
    """Whether all processes have ended. Process 0 says so: its number of them is the one that counts."""
    if process_index():
        return bool(coordination_client().key_value_dir_get(_ALL_EXITED_PREFIX))
    return len(exited_processes(include_self=True)) == process_count()


def final_barrier() -> None:
    """The last words of a process that has left. Process 0 waits a little for those of the others: jax aborts
    whoever loses it."""
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
    time.sleep(0.2)  # from their last words to their ends
