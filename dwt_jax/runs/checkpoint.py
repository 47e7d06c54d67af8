"""Training state on disk: Orbax, asynchronous, checked when it is read back.

A checkpoint that was cut short is an error in Orbax, but a flipped bit inside an array is
not. So a checksum of every leaf is stored beside the state and compared on restore.
"""

import functools
import gc
import itertools
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dwt_jax.distributed import coordination
from dwt_jax.errors import UserError

State = TypeVar("State")  # any tree of arrays

_ITEM = "default"  # what Orbax calls the one thing that is saved


def checksum(state: Any) -> jax.Array:
    """uint32 [leaves]: of each leaf the sum of its words, weighted by odd numbers, mod 2³², on every
    device of the first leaf's.

    Integer sums do not depend on the order, so any sharding gives the same.
    """
    return _jit_checksum(_replicated_sharding(jax.tree.leaves(state)[0].sharding))(state)


def _replicated_sharding(sharding: Any) -> Any:
    """The sharding that repeats an array on all devices of `where`."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


@functools.cache
def _jit_checksum(sharding: Any) -> Any:

    def leaf(x: jax.Array) -> jax.Array:
        bits = x.reshape(-1)
        if bits.dtype.itemsize == 4:
            bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        elif bits.dtype.itemsize == 2:
            bits = jax.lax.bitcast_convert_type(bits, jnp.uint16)
        weights = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        return (bits.astype(jnp.uint32) * weights).sum(dtype=jnp.uint32)

    return jax.jit(lambda state: jnp.stack([leaf(x) for x in jax.tree.leaves(state)]), out_shardings=sharding)


_barrier_counts: dict[str, Iterator[int]] = defaultdict(itertools.count)  # Orbax names some barriers alike


def _barrier(*, key: str, timeout_ms: int) -> None:
    """A barrier of Orbax's writing threads. Its own waits for 20 minutes in two cases that end here at once:
    for a process that has ended, and in one whose writing failed: on its way out that asks for a barrier at
    which the others are not. The watchdog has the last word, not timeout_ms."""
    if sys.exc_info()[0] is None:
        coordination.all_gather_with_key(f"checkpoint/{key}/{next(_barrier_counts[key])}", None)


class Checkpoints:
    """The checkpoints of one run. Saving returns at once; errors of the writing threads are
    raised by the next call."""

    def __init__(self, directory: Any, max_to_keep: int, read_only: bool = False):
        """directory: absolute; a path of etils may be one on an object store."""
        self.directory, self._read_only = epath.Path(directory), read_only
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if read_only else 1,
            max_to_keep=None if read_only else max_to_keep,
            enable_async_checkpointing=not read_only,
            async_options=None
            if coordination.is_single_process()
            else ocp.AsyncOptions(barrier_sync_fn=_barrier),
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        with _silence_orbax():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: State) -> None:
        """Write `state` as the checkpoint of `step` in the background, unless it is there."""
        self._manager.check_for_errors()
        if step not in coordination.run_on_main(self.steps):
            item = {"state": state, "checksum": checksum(state)}
            with jax.transfer_guard("allow"):  # Orbax copies to the host in its own way
                self._manager.save(step, args=ocp.args.StandardSave(item))

    def restore(
        self, target: State, log: Callable[[str], None], only_step: int | None = None
    ) -> tuple[State, int] | None:
        """The newest sound state (or that of the step `only`) and its step, laid out like the
        abstract `like`; None if there is no checkpoint at all.

        Damaged ones are reported and, once a sound one is found, moved to
        `checkpoints-damaged/`; nothing is moved when read-only. Raises UserError, and moves
        nothing, when there are checkpoints and none of them can be read.
        """
        steps = (
            sorted(coordination.run_on_main(self.steps), reverse=True) if only_step is None else [only_step]
        )
        damaged_steps: list[int] = []
        for step in steps:
            state, reason = self._try_restore(step, target)
            if state is None:
                log(
                    f"checkpoint {step} is damaged{', trying the one before' * (only_step is None)}: {reason}"
                )
                damaged_steps.append(step)
                continue
            if not self._read_only:
                for damaged_step in damaged_steps:
                    self._quarantine(damaged_step)
            return state, step
        if steps:
            raise UserError(
                f"{self.directory}: none of the checkpoints {sorted(steps)} can be read, expected a "
                "sound one; nothing was changed"
                + ("; start again in a new --workdir" if not self._read_only else "")
            )
        return None

    def steps(self) -> list[int]:
        """Those of the checkpoints that are kept, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until everything is on disk. Raises what the writing threads raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def _try_restore(self, step: int, target: State) -> tuple[State | None, str]:
        """The state of a step, or None and why not: what is damaged for one process is so for all.

        Not by the manager: its reading ends with a collective, in which those who could read would wait
        for ever for one who could not.
        """
        item, problem = None, ""
        try:
            with _silence_orbax():
                item = self._read(step, target)
        except Exception as error:  # Orbax raises many kinds for a damaged file
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # not the checkpoint's fault
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        problem = next(filter(None, coordination.all_gather_objects(problem)), "")
        if problem or item is None:
            return None, problem
        if not np.array_equal(checksum(item["state"]), item["checksum"]):
            return None, "the checksums of its arrays differ from those stored with it"
        return item["state"], ""

    def _read(self, step: int, target: State) -> dict[str, Any]:
        """What `save` wrote: {state, checksum}."""
        replicated = _replicated_sharding(jax.tree.leaves(target)[0].sharding)
        abstract_checksum = jax.ShapeDtypeStruct(
            (len(jax.tree.leaves(target)),), jnp.uint32, sharding=replicated
        )
        restore_args = ocp.args.StandardRestore({"state": target, "checksum": abstract_checksum})
        handler = ocp.StandardCheckpointHandler()
        try:
            return handler.restore(self.directory / str(step) / _ITEM, args=restore_args)
        finally:
            handler.close()

    @property
    def _quarantine_dir(self) -> epath.Path:
        return self.directory.with_name(self.directory.name + "-damaged")

    def _quarantine(self, step: int) -> None:
        def move() -> None:
            self._quarantine_dir.mkdir(exist_ok=True)
            target = self._quarantine_dir / str(step)
            if target.exists():
                target.rmtree()
            _move_directory(self.directory / str(step), target)

        coordination.run_on_main(move)
        self._manager.reload()


def _move_directory(source: epath.Path, target: epath.Path) -> None:
    """A folder. On an object store etils wants the folder above, and there are no empty ones; what it removes
    itself it does not remember as being there."""
    if "://" not in str(source):
        source.rename(target)
        return
    store, _ = fsspec.core.url_to_fs(str(source))
    store.copy(str(source), str(target), recursive=True)
    source.rmtree()


@contextmanager
def _silence_orbax() -> Iterator[None]:
    """Without Orbax's warnings, and the tracebacks that its coroutines and the threads below them print
    when a read fails: the exception that counts is raised."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = lambda _: None, lambda *_: None
    levels = {"absl": logging.ERROR, "asyncio": logging.CRITICAL}
    previous_levels = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    except Exception:
        time.sleep(0.5)  # reads that are still under way report that their loop is closed
        raise
    finally:
        gc.collect()
        sys.unraisablehook, sys.excepthook = hooks
        for name, level in previous_levels.items():
            logging.getLogger(name).setLevel(level)
