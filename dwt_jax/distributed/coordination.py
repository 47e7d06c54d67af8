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

from dwt_jax.errors import SaidElsewhere, UserError

T = TypeVar("T")

LOGS = "DWT_PROCESS_LOGS"
"""A directory: each process but the first writes what it says there, to a file of its own."""

_LEFT = "dwt/now/left/"  # + process: the status that it ended with
_OVER, _GONE = "dwt/over/", "dwt/gone/"  # what process 0 says at the end, and what the others do
_turns = itertools.count()


class Ended(Exception):
    """Another process ended, so this one cannot go on. `status`: that one's exit status."""

    def __init__(self, process: int, status: int):
        super().__init__(f"process {process} ended with status {status}, so process {index()} ends too")
        self.status = status


def client() -> Any:
    """That of the coordination service. JAX has no public name for it; Orbax uses the same one."""
    return _state().client if _state() else None


def _state() -> Any:
    """Of jax, if that was imported: without it nothing can be connected."""
    module = sys.modules.get("jax._src.distributed")
    return module.global_state if module else None


def index() -> int:
    """Of this process. Unlike jax.process_index() it starts no backend."""
    return _state().process_id if _state() else 0


def count() -> int:
    return _state().num_processes if _state() else 1


def alone() -> bool:
    return client() is None


def say(text: str) -> None:
    """A line from process 0; from the others only into their logs, where those were asked for."""
    if index() == 0 or os.environ.get(LOGS):
        print(text, flush=True)


def gather(value: Any, waiting_for: str = "") -> list[Any]:
    """Every process's `value` (JSON) in order. Nobody goes on before all have given theirs.

    waiting_for: said by whoever waits for long. Raises Ended when a process has ended meanwhile.
    """
    if alone():
        return [json.loads(json.dumps(value))]
    return exchange(f"turn/{next(_turns)}", value, waiting_for)


def exchange(name: str, value: Any, waiting_for: str = "") -> list[Any]:
    """`gather` under a name that is used once. Process 0 collects: 3 messages a process."""
    key = f"dwt/{name}/"
    client().key_value_set(f"{key}{index()}", json.dumps(value))
    if index() == 0:
        values = [json.loads(_get(f"{key}{i}", waiting_for)) for i in range(count())]
        client().key_value_set(f"{key}all", json.dumps(values))
    return json.loads(_get(f"{key}all", waiting_for))


def _get(key: str, waiting_for: str) -> str:
    """A value that will be set. Waits by the second, so that a signal or an end is noticed."""
    began, said = time.monotonic(), not waiting_for
    while True:
        try:
            return client().blocking_key_value_get(key, 1000)
        except RuntimeError as error:  # JaxRuntimeError is one
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for process, status in left().items():
            raise Ended(process, status)
        if not said and time.monotonic() - began > 5:
            print(f"dwt: process {index()} waits for {waiting_for}", file=sys.stderr, flush=True)
            said = True


def together(work: Callable[[], T]) -> T:
    """`work()`, if it goes well in all processes.

    A UserError or a file's OSError in some is a UserError in all of them, told by process 0 alone.
    """
    if alone():
        return work()
    problem = None
    try:
        found = work()
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"{error.filename}: {error.strerror}, expected a path that can be used"
    _agree(gather(problem))
    return found


def _agree(problems: list[str | None]) -> None:
    process, problem = next(((i, text) for i, text in enumerate(problems) if text), (0, None))
    if problem is None:
        return
    kind = UserError if index() == 0 else SaidElsewhere
    raise kind(problem if problems[0] == problem else f"process {process}: {problem}")


def first(work: Callable[[], T], waiting_for: str = "process 0") -> T:
    """What `work()` gives in process 0, in all of them (JSON). The others wait.

    Mistakes as in `together`.
    """
    if alone():
        return work()
    told: dict[str, Any] = {}
    if index() == 0:
        try:
            told = {"value": work()}
        except UserError as error:
            told = {"problem": str(error)}
        except OSError as error:
            if error.filename is None:
                raise
            told = {"problem": f"{error.filename}: {error.strerror}, expected a path that can be used"}
    told = gather(told, waiting_for)[0]
    _agree([told.get("problem")])
    return told["value"]


def same(values: dict[str, Any]) -> None:
    """Raises UserError, which names the first difference, unless `values` (JSON) are those of process 0."""
    if alone():
        return
    for process, theirs in enumerate(every := gather(values)):
        for key in {**every[0], **theirs}:
            ours = every[0].get(key)
            if theirs.get(key) != ours:
                _agree(
                    [f"{key} is {theirs.get(key)!r} in process {process}, expected {ours!r} as in process 0"]
                )


def leave(status: int) -> None:
    """Tell the others that this process ends."""
    client().key_value_set(f"{_LEFT}{index()}", str(status), True)


def left(itself: bool = False) -> dict[int, int]:
    """The processes that have ended, with their statuses."""
    found = {int(key.rpartition("/")[2]): int(value) for key, value in client().key_value_dir_get(_LEFT)}
    return {process: status for process, status in found.items() if itself or process != index()}


def all_left() -> bool:
    """Whether all processes have ended. Process 0 says so: its number of them is the one that counts."""
    if index():
        return bool(client().key_value_dir_get(_OVER))
    return len(left(itself=True)) == count()


def part() -> None:
    """The last words of a process that has left. Process 0 waits a little for those of the others: jax aborts
    whoever loses it."""
    if index():
        client().key_value_set(f"{_GONE}{index()}", "", True)
        return
    client().key_value_set(f"{_OVER}0", "", True)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and len(client().key_value_dir_get(_GONE)) < count() - 1:
        time.sleep(0.05)
    time.sleep(0.2)  # from their last words to their ends
