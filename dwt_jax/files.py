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

POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS did not fetch."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` at the end, an exception removes it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_place(out: Path) -> Path:
    """Where `--out` leads, links followed. Raises UserError if anything is there but an empty directory."""
    try:
        place = out.expanduser().resolve()
    except RuntimeError:
        raise UserError(f"--out: {out} is a link to itself, expected a new or empty directory") from None
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out: {place} holds something, expected a new or empty directory")
    for parent in place.parents:
        if (parent / "run.json").exists():
            raise UserError(f"--out: {place} lies in the run {parent}, expected a place outside of it")
    return place


def present(path: Path) -> bool:
    """Whether there is a file. Raises UserError for a link to nothing: a download cut short, not an
    absent file."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nothing, expected a file")
    return path.is_file()


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raises UserError if what a file starts with is Git LFS's."""
    if start.startswith(POINTER):
        raise UserError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull)")


def read_object(path: Path, wanted: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which says that `wanted` was expected, for anything
    else."""
    present(path)
    try:
        data = path.read_bytes()
        refuse_pointer(path, data)
        found = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}, expected {wanted}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a JSON {type(found).__name__}, expected {wanted}")
    return found


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN: a number that is not finite becomes null. `metrics.measured` undoes that."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A new directory beside `out` to build in; `publish` makes it `out`, an exception removes it.

    Leftovers of processes of this machine that are gone are removed first. The name carries
    process and machine, since containers that share a disk share process numbers too.
    """
    host = socket.gethostname()
    prefix = f".{out.name}.partial-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f"{prefix}*"):
        pid, _, on = leftover.name.removeprefix(prefix).partition(".")
        if on == host and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = out.parent / f"{prefix}{os.getpid()}.{host}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, out: Path) -> bool:
    """Rename `partial` to `out`; False if `out` holds something by now."""
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
