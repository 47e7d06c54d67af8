"""Save and restore the training state with Orbax, asynchronously and with checksums.

Orbax reports a truncated checkpoint, but not a flipped bit inside an array. So a checksum of every leaf
is stored with the state and compared on restore.
"""

import functools
import gc
import itertools
import logging
import os
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dwt_jax.distributed import coordination
from dwt_jax.errors import SaveFailed, UserError, out_of_space_reason
from dwt_jax.logs import logger

State = TypeVar("State")  # any tree of arrays

_ITEM = "default"  # Orbax's name of a checkpoint's only item


def checksum(state: Any) -> jax.Array:
    """Return a checksum of every leaf, uint32 [leaves], replicated on the devices of the first leaf.

    A checksum is the sum of the leaf's elements as integers, weighted by odd numbers, mod 2³². Integer sums
    do not depend on the order, so every sharding gives the same.
    """
    return _jit_checksum(_replicated_sharding(jax.tree.leaves(state)[0].sharding))(state)


def _replicated_sharding(sharding: Any) -> Any:
    """The sharding that replicates an array on the devices of `sharding`."""
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


_barrier_counts: dict[str, Iterator[int]] = defaultdict(itertools.count)  # Orbax uses some keys repeatedly


def _barrier(*, key: str, timeout_ms: int) -> None:
    """A barrier for Orbax's writing threads.

    Orbax's own waits for 20 minutes in two cases that end at once here: another process has exited, or
    writing failed in this one, which then asks for a barrier that the others do not reach. The watchdog
    ends a process that hangs, so timeout_ms is not used.
    """
    if sys.exc_info()[0] is None:
        coordination.all_gather_with_key(f"checkpoint/{key}/{next(_barrier_counts[key])}", None)


class Checkpoints:
    """The checkpoints of one run. They are saved in the background; `check` raises the errors."""

    def __init__(self, directory: Any, max_to_keep: int, read_only: bool = False):
        """Open the checkpoints of a directory.

        Args:
            directory: absolute path, or an etils path on an object store.
            max_to_keep: number of checkpoints to keep; the oldest are deleted.
            read_only: whether to leave the directory unchanged.
        """
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
        self._failure: Exception | None = None  # of a save
        if not read_only:
            _report_failed_saves_once()
        with _silence_orbax():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: State) -> None:
        """Write the checkpoint of a step in the background, unless it exists. Raises as `check` does."""
        self.check()
        if step not in coordination.run_on_main(self.steps):
            item = {"state": state, "checksum": checksum(state)}
            with (
                jax.transfer_guard("allow"),
                self._failed_writes(),
            ):  # Orbax copies to the host in its own way
                self._manager.save(step, args=ocp.args.StandardSave(item))
            threading.Thread(target=self._watch_save, name="watch_save", daemon=True).start()

    def _watch_save(self) -> None:
        """Wait for the save in progress, and keep its error for `check`: Orbax raises it only in `wait`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failure = error

    def check(self) -> None:
        """Raise the error of a save that has failed by now. A save in progress is not waited for.

        Raises:
            SaveFailed: a checkpoint cannot be written, most likely because the disk is full.
        """
        if self._failure is not None:
            with self._failed_writes():
                raise self._failure

    @contextmanager
    def _failed_writes(self) -> Iterator[None]:
        """Convert write errors to SaveFailed: Orbax raises various exceptions."""
        try:
            yield
        except Exception as error:
            message = " ".join(str(error).split())
            if not (out_of_space_reason(error) or isinstance(error, OSError) or "Error writing" in message):
                raise
            reason = out_of_space_reason(error) or message[-200:]
            raise SaveFailed(
                f"{self.directory}: a checkpoint cannot be written: {reason}; those before it are intact. "
                "Rerun the same command to resume."
            ) from error

    def restore(self, target: State, only_step: int | None = None) -> tuple[State, int] | None:
        """Restore the latest intact checkpoint.

        Damaged checkpoints are reported and, once an intact one is read, moved to `checkpoints-damaged/`
        (not if read-only).

        Args:
            target: abstract state (shapes, dtypes and shardings) to restore into.
            only_step: the only step to try. None: all, latest first.

        Returns:
            The state and its step, or None if there are no checkpoints.

        Raises:
            UserError: none of the checkpoints can be read. Nothing is moved.
        """
        steps = (
            sorted(coordination.run_on_main(self.steps), reverse=True) if only_step is None else [only_step]
        )
        damaged_steps: list[int] = []
        for step in steps:
            state, reason = self._try_restore(step, target)
            if state is None:
                # Every process reads the same checkpoint: one of them warns.
                level = logging.WARNING if coordination.process_index() == 0 else logging.INFO
                next_try = ", trying the one before" if only_step is None else ""
                logger.log(level, f"checkpoint {step} is damaged{next_try}: {reason}")
                damaged_steps.append(step)
                continue
            if not self._read_only:
                for damaged_step in damaged_steps:
                    self._quarantine(damaged_step)
            return state, step
        if steps:
            raise UserError(
                f"{self.directory}: none of the checkpoints {sorted(steps)} can be read, expected an "
                "intact one; nothing was changed"
                + ("; start again in a new --workdir" if not self._read_only else "")
            )
        return None

    def steps(self) -> list[int]:
        """Return the steps of the saved checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Wait until all checkpoints are on disk, and raise errors of the writing threads."""
        self.check()
        with self._failed_writes():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Release Orbax's resources."""
        try:
            self._manager.close()
        except Exception:
            if self._failure is None:  # else raised by `check`
                raise

    def _try_restore(self, step: int, target: State) -> tuple[State | None, str]:
        """The state of a step, or None and the reason. If one process cannot read it, all return None.

        Orbax's manager is not used: its restore ends with a collective, which would wait for ever for a
        process that cannot read.
        """
        item, problem = None, ""
        try:
            with _silence_orbax():
                item = self._read(step, target)
        except Exception as error:  # Orbax raises various exceptions for a damaged file
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the checkpoint is not the cause
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        problem = next(filter(None, coordination.all_gather_objects(problem)), "")
        if problem or item is None:
            return None, problem
        if not np.array_equal(checksum(item["state"]), item["checksum"]):
            return None, "the checksums of its arrays differ from those stored with it"
        return item["state"], ""

    def _read(self, step: int, target: State) -> dict[str, Any]:
        """Read what `save` wrote: {state, checksum}."""
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
    """Move a directory. etils cannot rename on object stores, so copy and delete through fsspec."""
    if "://" not in str(source):
        source.rename(target)
        return
    store, _ = fsspec.core.url_to_fs(str(source))
    store.copy(str(source), str(target), recursive=True)
    source.rmtree()


@functools.cache
def _report_failed_saves_once() -> None:
    """From here on, leave a failed save to its exception: Orbax's threads print dozens of tracebacks too.

    Some come long after the failure, when futures and coroutines are collected.
    """

    def is_other(record: logging.LogRecord) -> bool:
        is_orbax = f"{os.sep}orbax{os.sep}" in record.pathname and record.exc_info is not None
        return not is_orbax and "exception was never retrieved" not in record.getMessage()

    def is_late_write(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_other)
    warnings.filterwarnings("ignore", "coroutine .*write_fragment.* was never awaited", RuntimeWarning)
    excepthook, unraisablehook = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: is_late_write(error) or excepthook(kind, error, trace)
    sys.unraisablehook = lambda args: is_late_write(args.exc_value) or unraisablehook(args)


@contextmanager
def _silence_orbax() -> Iterator[None]:
    """Suppress Orbax's warnings, and the tracebacks that its threads print in addition to the exception."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = lambda _: None, lambda *_: None
    levels = {"absl": logging.ERROR, "asyncio": logging.CRITICAL}
    previous_levels = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    except Exception:
        time.sleep(0.5)  # pending reads report that their event loop is closed
        raise
    finally:
        gc.collect()
        sys.unraisablehook, sys.excepthook = hooks
        for name, level in previous_levels.items():
            logging.getLogger(name).setLevel(level)
