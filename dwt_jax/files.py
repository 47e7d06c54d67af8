"""Files and directories that are whole or absent: built under another name, then renamed."""

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError

LFS_POINTER_PREFIX = b"version https://git-lfs"
"""How a file begins that Git LFS did not fetch."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` at the end, an exception removes it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def resolve_output_dir(out: Path) -> Path:
    """Where `--out` leads, links followed. Raises UserError if anything is there but an empty directory."""
    try:
        path = out.expanduser().resolve()
    except RuntimeError:
        raise UserError(f"--out: {out} is a link to itself, expected a new or empty directory") from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--out: {path} is not empty; expected a new or empty directory")
    for parent in path.parents:
        if (parent / "run.json").exists():
            raise UserError(f"--out: {path} lies in the run {parent}, expected a place outside of it")
    return path


def is_file_or_raise(path: Path) -> bool:
    """Whether there is a file. Raises UserError for a link to nothing: a download cut short, not an
    absent file."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nothing, expected a file")
    return path.is_file()


def reject_lfs_pointer(path: Path, start: bytes) -> None:
    """Raises UserError if what a file starts with is Git LFS's."""
    if start.startswith(LFS_POINTER_PREFIX):
        raise UserError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull)")


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which says that `wanted` was expected, for anything
    else."""
    is_file_or_raise(path)
    try:
        data = path.read_bytes()
        reject_lfs_pointer(path, data)
        value = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}, expected {expected}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, expected {expected}")
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN: a number that is not finite becomes null. `metric_writer.restore_nans` undoes that."""
    return json.dumps(_nonfinite_to_null(value), indent=indent, allow_nan=False)


def _nonfinite_to_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nonfinite_to_null(item) for key, item in value.items()}
    return [_nonfinite_to_null(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def atomic_dir(out: Path) -> Iterator[Path]:
    """A new directory beside `out` to build in; `commit_dir` makes it `out`, an exception removes it.

    Leftovers of processes of this machine that are gone are removed first. The name carries
    process and machine, since containers that share a disk share process numbers too.
    """
    host = socket.gethostname()
    prefix = f".{out.name}.partial-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{prefix}*"):
        pid, _, owner_host = leftover.name.removeprefix(prefix).partition(".")
        if (
            owner_host == host
            and pid.isdigit()
            and (int(pid) == os.getpid() or not _process_exists(int(pid)))
        ):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = out.parent / f"{prefix}{os.getpid()}.{host}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def commit_dir(partial: Path, out: Path) -> bool:
    """Rename `partial` to `out`; False if `out` holds something by now."""
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json_text(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The object in a JSON file of ours; UserError for anything else."""
    return read_json_object(path, "JSON that dwt wrote")
