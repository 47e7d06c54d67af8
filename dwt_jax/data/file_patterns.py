"""Find the files that a pattern with `*`, `?`, `[…]` and `**` matches."""

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path

from dwt_jax.errors import UserError
from dwt_jax.files import is_system_name


def matching_files(pattern: str) -> list[Path]:
    """Return the files that match a pattern, sorted by name.

    Like `glob.glob(recursive=True)`, with these differences:

    * A path component that exists literally is not expanded, so names may have brackets.
    * `**` enters each folder once. (glob follows links to parent folders repeatedly.)
    * Of a file with several names only the first name is returned.
    * No wildcard matches a file of a file manager, such as desktop.ini.
    * A match that cannot be read is an error, because a part of the corpus would be missing.

    Raises:
        UserError: a broken link matches, or a folder cannot be read.
    """
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    by_file: dict[str, Path] = {}
    for name in sorted(_expand(root, parts)):
        if _is_file(name):
            by_file.setdefault(os.path.realpath(name), Path(name))
    return [*by_file.values()]


def _is_file(name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        _reject_broken_link(name)
        return False
    except OSError as error:  # a folder above it that may not be entered, a link to itself
        raise UserError(f"{name}: {error.strerror}, expected a file that can be read") from None


def _reject_broken_link(name: str) -> None:
    if os.path.islink(name) and not os.path.exists(name):
        raise UserError(f"{name}: a broken symbolic link, expected its target to exist")


def _expand(root: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield what the parts of a pattern match below a folder."""
    if not parts:
        yield root
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for folder in _folders(root):
            yield from _expand(folder, rest or ["*"])
    elif not has_magic(first) or os.path.lexists(os.path.join(root, first)):
        yield from _expand(os.path.join(root, first), rest)
    else:
        for name in fnmatch.filter(_list_names(root), first):
            if (first.startswith(".") or not name.startswith(".")) and not is_system_name(name):
                _reject_broken_link(os.path.join(root, name))
                yield from _expand(os.path.join(root, name), rest)


def _folders(root: str) -> Iterator[str]:
    """Yield a folder and those below it that are not hidden, each once, also through links."""
    entered, waiting = set(), [root]
    while waiting:
        folder = waiting.pop()
        real_path = os.path.realpath(folder)
        if real_path in entered or not os.path.isdir(real_path):
            continue
        entered.add(real_path)
        yield folder
        names = [name for name in _list_names(folder) if not (name.startswith(".") or is_system_name(name))]
        paths = [os.path.join(folder, name) for name in sorted(names, reverse=True)]
        waiting += [path for path in paths if os.path.isdir(path)]


def _list_names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}, expected a folder that can be read") from None
