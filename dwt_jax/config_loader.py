"""From a config file and a command line to a checked `Config`, and back to JSON.

A config file is Python with `get_config(arg)` that returns an `ml_collections.ConfigDict`
(or a dict). It says only what differs from the defaults in config.py. What wins, from
weakest: the defaults, a `distill.preset`, the file, `--config.key=value` on the command line.
"""

import dataclasses
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dwt_jax.config import Config, Model, check, model_problems
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.presets import PRESETS


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of `path[:arg]`, with `overrides` ({'train.steps': '1e3', …}) on top.

    Raises UserError for a missing or broken file, an unknown key (with the nearest known
    one), a value of the wrong type and settings that cannot go together.
    """
    return build(read_file(spec), overrides)


def load_model(spec: str, overrides: Mapping[str, str] | None = None) -> Model:
    """The `model` of a config, the only part that is checked: for what needs its sizes alone."""
    model = _unchecked(read_file(spec), overrides).model
    for problem in model_problems(model):
        raise UserError(f"config: model.{problem}")
    return model


def build(raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """A checked Config from nested mappings, in the order of precedence given above."""
    return check(_unchecked(raw, overrides))


def _unchecked(raw: Mapping[str, Any], overrides: Mapping[str, str] | None) -> Config:
    raw = _plain(raw)
    overrides = dict(overrides or {})
    preset = overrides.get("distill.preset", _get(raw, ("distill", "preset"), "custom"))
    tree: dict[str, Any] = {}
    if preset != "custom":
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(
                f"config: distill.preset is {preset!r}{did_you_mean(str(preset), [*PRESETS, 'custom'])}"
            )
        tree = {"distill": _plain(PRESETS[preset])}
    tree = _merge(tree, raw)
    return construct(Config, tree, overrides)


def construct(kind: Any, raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Any:
    """The dataclass `kind` from nested mappings with `overrides` on top. Raises UserError for unknown
    keys and wrong types."""
    tree = _merge({}, _plain(raw))
    for key, text in (overrides or {}).items():
        _put(kind, tree, key, text)
    return _construct(kind, tree, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts, lists and plain values: what `config.json` holds; `build` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config, dict_factory=_by_key)))


def _by_key(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A field whose key is a word of Python's has a `_` at its end: `from_` is the key `from`."""
    return {name.removesuffix("_"): value for name, value in fields}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model.hidden_size': 128, 'data.sources.0.kind': 'builtin', …}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_path(name: str) -> Path:
    """A file of configs/: inside the package where it is installed, beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def read_file(spec: str) -> Mapping[str, Any]:
    """What `get_config` of `path[:arg]` returns."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--config: no file {name!r}, expected a Python file with get_config()")
    module = _module(path)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"--config: {name} has no get_config(), expected a function that returns a ConfigDict"
        )
    if not arg and (wanted := _required(module.get_config)):
        raise UserError(
            f"--config: {name} needs an argument ({wanted}), expected --config={name}:{wanted.upper()}"
        )
    found = _run(lambda: module.get_config(arg) if arg else module.get_config(), f"{spec}: get_config")
    if not isinstance(found, Mapping) and not hasattr(found, "to_dict"):
        raise UserError(
            f"--config: {spec}: get_config returned {type(found).__name__}, expected a ConfigDict"
        )
    return found


def beside(file: str, name: str) -> ModuleType:
    """For config files: the module NAME.py in the folder of `file`, the one that asks."""
    return _module(Path(file).parent / f"{name}.py")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dwt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {str(path)!r} is not a Python file, expected one with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    loader = spec.loader
    # Without bytecode: Python knows that by the second of a file's time, and would take an edit for the old.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        _run(lambda: loader.exec_module(module), f"{path} fails to load")
    finally:
        sys.dont_write_bytecode = before
    return module


def _required(function: Callable[..., Any]) -> str:
    """The name of the first parameter that has no default; '' if there is none."""
    parameters = inspect.signature(function).parameters.values()
    return next(
        (p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD), ""
    )


def _run(call: Callable[[], Any], what: str) -> Any:
    """The user's own code: whatever it raises is told in one line."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise UserError(f"--config: {what}: {type(error).__name__}: {message}") from error


def _plain(value: Any) -> Any:
    """ConfigDicts, tuples and the like as dicts and lists."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _get(tree: Any, keys: tuple[str, ...], default: Any) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _put(root: Any, tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set a value by its dotted key; numbers index lists. Defaults are filled in on the way,
    so that one field of a default source can be changed."""
    *parents, last = dotted.split(".")
    node: Any = tree
    kind: Any = root
    for i, key in enumerate(parents):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"--config.{dotted}: no entry {key!r}, expected a number below {len(node)}")
            kind, node = get_args(kind)[0], node[int(key)]
            continue
        hints = _hints(kind, ".".join(parents[:i]))
        if key not in hints:
            raise _unknown(".".join(parents[: i + 1]), key, hints)
        kind = hints[key]
        if key not in node:  # one default entry of a list, so that a field of it can be set
            node[key] = [to_dict(get_args(kind)[0]())] if _is_tuple(kind) else {}
        node = node[key]
        if not isinstance(node, (dict, list)):
            raise UserError(
                f"config: '{dotted}' does not exist, '{'.'.join(parents[: i + 1])}' is a plain value"
            )
    if not isinstance(node, dict):
        raise UserError(f"--config.{dotted}: expected a field of the entry, e.g. --config.{dotted}.path=…")
    node[last] = _Text(text)


class _Text(str):
    """A value typed on the command line: to be read as whatever type the field has."""


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _hints(kind: Any, path: str) -> dict[str, Any]:
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"config: '{path}' is a plain value and has no keys below it")
    return _by_key(get_type_hints(kind).items())


def _construct(kind: Any, value: Any, path: str) -> Any:
    """`value` as an instance of the dataclass, tuple, Literal or plain type `kind`."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            keys = ", ".join(f"{path}.{name}" for name in _hints(kind, path))
            raise UserError(f"config: {path} is {str(value)!r}, expected a group with the keys {keys}")
        hints = _hints(kind, path)
        for key in value:
            if key not in hints:
                raise _unknown(_join(path, key), key, hints)
        fields = {key: _construct(hints[key], item, _join(path, key)) for key, item in value.items()}
        return typing.cast(Any, kind)(
            **{f"{key}_" if iskeyword(key) else key: x for key, x in fields.items()}
        )
    if _is_tuple(kind):
        if isinstance(value, _Text):
            value = _json(value, path)
        if not isinstance(value, list):
            raise UserError(f"config: {path} is {value!r}, expected a list")
        return tuple(_construct(get_args(kind)[0], item, f"{path}.{i}") for i, item in enumerate(value))
    return scalar(kind, value, path)


def _unknown(path: str, key: str, known: Iterable[str]) -> UserError:
    prefix = path.removesuffix(key)
    return UserError(f"config: unknown key '{path}'{did_you_mean(key, known, prefix)}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"config: {path} is {str(text)!r}, expected JSON ({error})") from None


def scalar(kind: Any, value: Any, path: str) -> Any:
    """`value` as a Literal or plain type `kind`; UserError naming `path` where it is none."""
    typed = isinstance(value, _Text)
    found = str(value) if typed else value
    if get_origin(kind) is Literal:
        if found not in get_args(kind):
            raise UserError(f"config: {path} is {found!r}{did_you_mean(str(found), get_args(kind))}")
        return found
    if kind is str:
        if isinstance(value, str):
            return str(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if typed and found.lower() in ("true", "1", "false", "0"):
            return found.lower() in ("true", "1")
    elif not isinstance(value, bool) and (typed or isinstance(value, (int, float))):
        number = _number(found)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    raise UserError(f"config: {path} is {found!r}, expected {expected}")


def _number(value: Any) -> int | float | None:
    """None for what is not a finite number. Whole numbers stay exact ('1e3' is one too)."""
    try:
        return int(value) if not isinstance(value, float) else _finite(value)
    except ValueError:
        try:
            return _finite(float(value))
        except ValueError:
            return None


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
