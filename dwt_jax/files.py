"""Atomic writing of files and directories, and reading of JSON files."""

import errno
import glob
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock

from dwt_jax.errors import UserError

LFS_POINTER_PREFIX = b"version https://git-lfs"
"""The first bytes of a file that Git LFS has not downloaded."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically.

    Yields:
        A temporary path in the same directory. It is synced and renamed to `path` at the end of the block,
        and removed if the block raises.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent, recursive=False)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path, recursive: bool = True) -> None:
    """Flush a file, or a directory and its contents, to disk.

    Without this a rename may reach the disk before the content, and a power cut leaves empty files.

    Args:
        path: the file or directory.
        recursive: of a directory, whether to sync its files and directories too.
    """
    if recursive and path.is_dir():
        for child in path.iterdir():
            if not child.is_symlink():
                sync(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with sync_if_supported(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sync_if_supported(path: Path) -> Iterator[None]:
    """Ignore the error of a file system that cannot sync, and add the path to other errors.

    Args:
        path: the file or directory that the block syncs.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from error


def user_path(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home directory.

    A shell leaves `~` as it is in `--workdir=~/runs`.

    Raises:
        UserError: the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home directory is unknown, expected a path without ~") from None


def resolve_output_dir(out: Path) -> Path:
    """Resolve the path given as --out: `~` and symbolic links.

    Raises:
        UserError: something other than an empty directory exists at that path, or it is inside a run.
    """
    try:
        path = user_path(out).resolve()
    except RuntimeError:
        raise UserError(f"--out: {out} is a link to itself, expected a new or empty directory") from None
    if path.exists() and (not path.is_dir() or not is_empty_dir(path)):
        raise UserError(f"--out: {path} is not empty; expected a new or empty directory")
    for parent in path.parents:
        if (parent / "run.json").exists():
            raise UserError(f"--out: {path} is inside the run {parent}, expected a path outside of it")
    return path


def _is_link_loop(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def resolve_output_file(out: Path) -> Path:
    """Resolve the path of a file given as --out: expand `~` and follow symbolic links to the file to write.

    Raises:
        UserError: the path is a directory, a device or a pipe (a rename would replace it), or has no parent.
    """
    path, problem = user_path(out), ""
    if path.is_dir():
        problem = "is a directory"
    elif path.exists() and not path.is_file():
        problem = "is no regular file"
    elif path.is_symlink() and _is_link_loop(path):
        problem = "is a link to itself"
    elif not (parent := (path.resolve() if path.is_symlink() else path).parent).is_dir():
        problem = f"is in {parent}, which is no directory"
    if problem:
        raise UserError(f"--out: {out} {problem}, expected a file in a directory")
    return path.resolve()


_SYSTEM_NAMES = (  # patterns, in lower case
    *("lost+found", ".nfs*", ".snapshot", "@eadir", ".trash-*"),
    *(".ds_store", "._*", ".trashes", ".fseventsd", ".spotlight-v100", ".temporaryitems", "__macosx"),
    *("system volume information", "$recycle.bin", "desktop.ini", "thumbs.db"),
)


def is_system_name(name: str) -> bool:
    """Return whether file systems or file managers create files or folders of this name."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _SYSTEM_NAMES)


def list_directory(path: Any) -> list[Any]:
    """List a directory, without the entries that file systems and file managers create.

    Args:
        path: a Path, or an epath of an object store.
    """
    return [child for child in path.iterdir() if not is_system_name(child.name)]


def acquire_lock(path: Path, wait: bool = False) -> FileLock | None:
    """Lock a file, which is created if needed, against other processes until the lock is released.

    Args:
        path: the file. It stays where it is. A link is followed.
        wait: wait until it can be locked.

    Returns:
        The lock; None if the file system has no locks.

    Raises:
        filelock.Timeout: another process has the lock, and `wait` is false. (It is an OSError.)
        OSError: the file cannot be created or opened.
    """
    # No marker file instead: one would be left where a process is killed.
    lock = FileLock(os.path.realpath(path), fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=0.2)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return lock


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


def is_file_or_raise(path: Path) -> bool:
    """Return whether `path` is a file.

    Raises:
        UserError: `path` is a broken symbolic link, which is an incomplete download rather than an
            absent file.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a broken symbolic link, expected a file")
    return path.is_file()


def reject_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise UserError if `start`, the first bytes of the file `path`, are those of a Git LFS pointer."""
    if start.startswith(LFS_POINTER_PREFIX):
        raise UserError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull)")


def read_json_object(path: Path, expected: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        expected: what the file should hold, for the error message.

    Raises:
        UserError: the file cannot be read, or it holds anything else.
    """
    if not is_file_or_raise(path) and path.exists():  # reading a FIFO would block
        raise UserError(f"{path}: not a regular file, expected {expected}")
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
    """Encode a value as JSON, which has no NaN: a number that is not finite becomes null.

    `metrics_file.restore_nans` is the inverse for metrics.
    """
    return json.dumps(_nonfinite_to_null(value), indent=indent, allow_nan=False)


def _nonfinite_to_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _nonfinite_to_null(item) for key, item in value.items()}
    return [_nonfinite_to_null(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def atomic_dir(out: Path) -> Iterator[Path]:
    """Build a directory atomically.

    Directories left over by dead processes of this host are removed first. The temporary name contains
    process id and host name, since containers that share a disk may have the same process ids.

    Yields:
        A new temporary directory next to `out`, or inside it if `out` is a mount point or its parent cannot
        be written to. `commit_dir` moves it to `out`; without that it is removed at the end of the block.
    """
    host = socket.gethostname()
    prefix = _partial_prefix(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = out if _cannot_be_replaced(out) else out.parent
    for leftover in parent.glob(f"{glob.escape(prefix)}*"):
        pid, _, owner_host = leftover.name.removeprefix(prefix).partition(".")
        if (
            owner_host == host
            and pid.isdigit()
            and (int(pid) == os.getpid() or not _process_exists(int(pid)))
        ):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = parent / f"{prefix}{os.getpid()}.{host}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def commit_dir(partial: Path, out: Path) -> bool:
    """Sync `partial` and move it to `out`. Returns False if `out` is not an empty directory by now.

    The directory is renamed. If `out` cannot be replaced, the contents are moved into it in order of
    modification time: the file that was written last marks a directory as complete.
    """
    sync(partial)
    try:
        if partial.parent != out:
            partial.rename(out)
            sync(out.parent, recursive=False)
            return True
    except OSError as error:
        if error.errno not in _CANNOT_REPLACE or not out.exists():
            raise
    if not out.is_dir() or not is_empty_dir(out):
        return False
    children = sorted(partial.iterdir(), key=lambda child: (child.is_file(), child.stat().st_mtime_ns))
    for child in children:
        shutil.move(child, out / child.name)
    sync(out, recursive=False)
    return True


_CANNOT_REPLACE = (
    *(errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR),
    *(errno.EBUSY, errno.EACCES, errno.EPERM, errno.EXDEV, errno.EROFS),
)


def is_empty_dir(path: Path) -> bool:
    """Return whether a directory is empty, except for entries of a file system or of `atomic_dir`."""
    prefix = _partial_prefix(path)
    return all(child.name.startswith(prefix) for child in list_directory(path))


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _cannot_be_replaced(out: Path) -> bool:
    """Whether `out` is a directory to which no other can be renamed."""
    return out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK))


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON object that dwt wrote. Raises UserError as `read_json_object` does."""
    return read_json_object(path, "JSON written by dwt")


def read_intact_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that dwt wrote; None if there is no such file, or if it is damaged.

    A power cut or a full disk may leave an empty file, or the beginning of one.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
