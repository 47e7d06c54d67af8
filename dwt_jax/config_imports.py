"""Run config files. A config file may import modules from its own directory."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from dwt_jax.errors import UserError

_scopes: list[tuple[Path, set[str]]] = []
"""The folders of the configs that are being loaded, the innermost last, and what was imported from each."""


def _find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
    """Find a top-level module in the innermost folder. Names of the standard library are not looked up."""
    if path is not None or name in sys.stdlib_module_names:
        return None
    directory, names = _scopes[-1]
    spec = PathFinder.find_spec(name, [str(directory)])
    if spec is None or spec.loader is None:  # None: any folder, such as wandb/, of which none is meant
        return None
    names.add(name)
    return spec


_FINDER: Any = SimpleNamespace(find_spec=_find_spec)


@contextmanager
def importable_neighbors(directory: Path) -> Iterator[None]:
    """Within the block, let `import NAME` search a folder first for NAME.py and NAME/__init__.py.

    At the end the imported modules are removed from sys.modules. Modules of an enclosing block are hidden,
    so configs in two folders can import different modules of the same name. sys.path is not changed. No
    bytecode is written: Python compares modification times in seconds and would miss an edit within one.
    """
    hidden = _forget_modules({name for _, names in _scopes for name in names})
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    names: set[str] = set()
    if not _scopes:
        sys.meta_path.insert(0, _FINDER)
    _scopes.append((directory.absolute(), names))
    try:
        yield
    finally:
        _scopes.pop()
        if not _scopes:
            sys.meta_path.remove(_FINDER)
        sys.dont_write_bytecode = bytecode
        _forget_modules(names)
        sys.modules.update(hidden)


def _forget_modules(names: set[str]) -> dict[str, ModuleType]:
    """Remove top-level modules and all below them from sys.modules, and return them."""
    imported = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in imported}


def load_config_module(path: Path) -> ModuleType:
    """Run a Python file and return it as a module.

    Raises:
        UserError: it is not a Python file, or it fails.
    """
    spec = importlib.util.spec_from_file_location(f"dwt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {str(path)!r} is not a Python file, expected one with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader = spec.loader
    call_user_code(lambda: loader.exec_module(module), f"{path} fails to load")
    return module


def call_user_code(call: Callable[[], Any], context: str) -> Any:
    """Call code of the user's config file; any exception, and sys.exit, becomes a one-line UserError."""
    try:
        return call()
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(f"--config: {context}: it calls sys.exit({error}), expected it to return") from error
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, ImportError) and message.startswith("attempted relative import"):
            message += ", expected the module by its name alone (import NAME, not from .NAME)"
        raise UserError(f"--config: {context}: {type(error).__name__}: {message}") from error
