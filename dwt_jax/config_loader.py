"""Load a checked `Config` from a config file and command-line overrides, and convert it to JSON.

A config file is Python with a function `get_config(arg)` that returns an `ml_collections.ConfigDict`
or a dict of the values that differ from the defaults in config.py. Precedence, from lowest to highest:
the defaults, a `distill.preset`, the file, `--config.key=value` on the command line. A plain number in
place of a `Schedule` is a constant.
"""

import dataclasses
import inspect
import json
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from dwt_jax.config import Config, Data, Schedule
from dwt_jax.config_checks import check, check_data
from dwt_jax.config_imports import call_user_code, importable_neighbors, load_config_module
from dwt_jax.config_values import CommandLineText, parse_list, parse_scalar
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import user_path
from dwt_jax.models import DEFAULT_MODEL_TYPE, FAMILIES, model_config_type
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.presets import PRESETS
from dwt_jax.renamed_keys import RENAMED_KEYS, renamed_key
from dwt_jax.unused_keys import check_all_used, check_data_used


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Load the config of a file.

    Args:
        spec: `path` or `path:arg`, of a file with `get_config(arg)`.
        overrides: values by dotted key, as text: `{"train.steps": "1e3"}`.

    Raises:
        UserError: the file is missing or broken, a key is unknown (the message suggests the nearest
            one), a value has the wrong type or no effect, or settings cannot be combined.
    """
    return check_all_used(build_config(read_config_file(spec), overrides), overrides or ())


def load_model_config(spec: str, overrides: Mapping[str, str] | None = None) -> ModelConfig:
    """Load the `model` section of a config file, the only section that is checked.

    Args and errors are those of `load_config`.
    """
    model = _build_unchecked(read_config_file(spec), overrides).model
    for problem in model.problems():
        raise UserError(f"config: model.{problem}")
    return model


def load_data_config(spec: str, overrides: Mapping[str, str] | None = None) -> Data:
    """Load the `data` section of a config file, the only section that is checked.

    Args and errors are those of `load_config`.
    """
    data = check_data(_build_unchecked(read_config_file(spec), overrides).data)
    return check_data_used(data, overrides or ())


def build_config(raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Build a checked `Config` from nested mappings and overrides (see `load_config`).

    Raises:
        UserError: as `load_config`.
    """
    return check(_build_unchecked(raw, overrides))


def _build_unchecked(raw: Mapping[str, Any], overrides: Mapping[str, str] | None) -> Config:
    raw = _to_builtin(raw)
    overrides = dict(overrides or {})
    preset = overrides.get("distill.preset", _get_by_path(raw, ("distill", "preset"), "custom"))
    tree: dict[str, Any] = {}
    if preset != "custom":
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(
                f"config: distill.preset is {preset!r}{did_you_mean(str(preset), [*PRESETS, 'custom'])}"
            )
        tree = {"distill": _to_builtin(PRESETS[preset])}
    tree = _merge_dicts(tree, raw)
    return build_dataclass(Config, tree, overrides)


def build_dataclass(kind: Any, raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Any:
    """Build a dataclass from nested mappings.

    Args:
        kind: the dataclass. Its fields may be dataclasses, tuples, Literals and plain types.
        raw: values by field name; missing fields have their defaults.
        overrides: values by dotted key, as text, which take precedence.

    Raises:
        UserError: a key is unknown or a value has the wrong type.
    """
    tree = _merge_dicts({}, _to_builtin(raw))
    for key, text in (overrides or {}).items():
        _set_by_path(kind, tree, key, text)
    return _build_value(kind, tree, "")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested dicts, lists and plain values for JSON. Inverse of `build_config`."""
    return json.loads(json.dumps(dataclasses.asdict(config, dict_factory=_strip_keyword_suffix)))


def _strip_keyword_suffix(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Remove the `_` from fields whose key is a Python keyword: `from_` is the key `from`."""
    return {name.removesuffix("_"): value for name, value in fields}


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted key: `{"model.hidden_size": 128, "data.sources.0.kind": "builtin"}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def bundled_config_path(name: str) -> Path:
    """Return the path of a file of configs/, which is in the package or, in a clone, next to it."""
    package = Path(__file__).parent
    installed_path = package / "configs" / name
    return installed_path if installed_path.exists() else package.parent / "configs" / name


def read_config_file(spec: str) -> Mapping[str, Any]:
    """Run a config file, which may import the modules beside it, and return the result of its `get_config`.

    Args:
        spec: `path` or `path:arg`. A path configs/… that does not exist is looked up in the package.

    Raises:
        UserError: the file is missing, fails, or returns no mapping.
    """
    name, arg = split_spec(spec)
    path = _config_path(name)
    if not path.is_file():
        raise UserError(f"--config: no file {name!r}, expected a Python file with get_config()")
    with importable_neighbors(path.parent):
        module = load_config_module(path)
        if not hasattr(module, "get_config"):
            raise UserError(
                f"--config: {name} has no get_config(), expected a function that returns a ConfigDict"
            )
        if not arg and (parameter := _required_parameter(module.get_config)):
            raise UserError(
                f"--config: {name} needs an argument ({parameter}), expected "
                f"--config={name}:{parameter.upper()}"
            )
        config = call_user_code(
            lambda: module.get_config(arg) if arg else module.get_config(), f"{spec}: get_config"
        )
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise UserError(
            f"--config: {spec}: get_config returned {type(config).__name__}, expected a ConfigDict"
        )
    return config


def split_spec(spec: str) -> tuple[str, str]:
    """Divide `path:arg` into the path of a config file, which may have colons, and the argument or ''.

    The path is the shortest prefix that is a file; without one, the shortest that ends with .py, or
    everything before the first colon.
    """
    parts = spec.split(":")
    divisions = [(":".join(parts[:end]), ":".join(parts[end:])) for end in range(1, len(parts) + 1)]
    files = [division for division in divisions if _config_path(division[0]).is_file()]
    scripts = [division for division in divisions if division[0].endswith(".py")]
    return (files or scripts or divisions)[0]


def _config_path(name: str) -> Path:
    path = user_path(name)
    if not path.is_file() and name.startswith("configs/"):
        return bundled_config_path(name.removeprefix("configs/"))
    return path


def sibling_config(file: str, name: str) -> ModuleType:
    """Load the module NAME.py from the directory of a config file, for use in that config file.

    Args:
        file: `__file__` of the config file.
        name: name of the module, without `.py`.
    """
    path = Path(file).parent / f"{name}.py"
    with importable_neighbors(path.parent):
        return load_config_module(path)


def _required_parameter(function: Callable[..., Any]) -> str:
    """Return the name of the first parameter without a default, or ''."""
    parameters = inspect.signature(function).parameters.values()
    return next(
        (p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD), ""
    )


def _to_builtin(value: Any) -> Any:
    """Convert ConfigDicts and sequences to dicts and lists, paths to text, NumPy's numbers to Python's."""
    if hasattr(value, "to_dict"):
        value = {key: _config_dict_value(value, key) for key in value}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _to_builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_builtin(item) for item in value]
    return value


def _config_dict_value(config: Any, key: str) -> Any:
    """Return a value of a ConfigDict; None for a placeholder, which the command line may replace."""
    from ml_collections.config_dict import RequiredValueError

    try:
        return config[key]
    except RequiredValueError:
        return None


def _get_by_path(tree: Any, keys: tuple[str, ...], default: Any) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _merge_dicts(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        both_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge_dicts(merged[key], value) if both_mappings else value
    return merged


def _set_by_path(root: Any, tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set a value by its dotted key, in which numbers index lists.

    Defaults of lists are inserted first, so that one field of a default entry can be changed.
    """
    if dotted in RENAMED_KEYS:
        raise UserError(f"config: '{dotted}' is now '{RENAMED_KEYS[dotted]}'")
    *parents, last = dotted.split(".")
    node: Any = tree
    kind: Any = root
    for i, key in enumerate(parents):
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise UserError(f"--config.{dotted}: no entry {key!r}, expected a number below {len(node)}")
            kind, node = get_args(kind)[0], node[int(key)]
            continue
        hints = _field_types(kind, ".".join(parents[:i]))
        if key not in hints:
            raise _unknown_key_error(".".join(parents[: i + 1]), key, hints)
        kind = hints[key]
        if key not in node:  # one default entry of a list, so that a field of it can be set
            node[key] = _default_entries(kind) if _is_tuple_type(kind) else {}
        if kind is Schedule and not isinstance(node[key], Mapping):  # a number, of which fields are set
            node[key] = {"kind": Schedule.kind, "value": node[key]}
        if _is_tuple_type(kind) and isinstance(node[key], CommandLineText):
            node[key] = parse_list(get_args(kind)[0], node[key], ".".join(parents[: i + 1]))
        node = node[key]
        if not isinstance(node, (dict, list)):
            raise UserError(
                f"config: '{dotted}' does not exist, '{'.'.join(parents[: i + 1])}' is a plain value"
            )
    if _is_tuple_type(kind) and not dataclasses.is_dataclass(get_args(kind)[0]):
        raise UserError(f"--config.{dotted}: expected the whole list: --config.{'.'.join(parents)}=[…]")
    if not isinstance(node, dict):
        raise UserError(f"--config.{dotted}: expected a field of the entry, e.g. --config.{dotted}.path=…")
    node[last] = CommandLineText(text)


def _default_entries(kind: Any) -> list[Any]:
    """Return one default entry of a list of groups; a list of plain values begins empty."""
    entry = get_args(kind)[0]
    return [config_to_dict(typing.cast(Any, entry)())] if dataclasses.is_dataclass(entry) else []


def _is_tuple_type(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _field_types(kind: Any, path: str) -> dict[str, Any]:
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"config: '{path}' is a plain value and has no keys below it")
    return _strip_keyword_suffix(get_type_hints(kind).items())


def _build_value(kind: Any, value: Any, path: str, default: Any = None) -> Any:
    """Convert `value` to the dataclass, tuple, Literal or plain type `kind`.

    Keys that a group lacks are those of `default`, if that is such a group: the default of a field may differ
    from that of its class. A schedule that names its `kind` is a new one.
    """
    if kind is ModelConfig and isinstance(value, Mapping):
        kind = _model_config_type(value, path)
    if dataclasses.is_dataclass(kind):
        if kind is Schedule and not isinstance(value, Mapping):
            return _constant_schedule(value, path)
        if not isinstance(value, Mapping):
            keys = ", ".join(f"{path}.{name}" for name in _field_types(kind, path))
            raise UserError(f"config: {path} is {str(value)!r}, expected a group with the keys {keys}")
        hints = _field_types(kind, path)
        for key in value:
            if key not in hints:
                raise _unknown_key_error(_join_path(path, key), key, hints)
        if type(default) is not kind or (kind is Schedule and "kind" in value):
            default = None
        names = {key: f"{key}_" if iskeyword(key) else key for key in value}
        fields = {
            names[key]: _build_value(
                hints[key],
                item,
                _join_path(path, key),
                _default_of(kind if default is None else default, names[key]),
            )
            for key, item in value.items()
        }
        return typing.cast(Any, kind)(**fields) if default is None else dataclasses.replace(default, **fields)
    if _is_tuple_type(kind):
        if isinstance(value, CommandLineText):
            value = parse_list(get_args(kind)[0], value, path)
        if not isinstance(value, list):
            raise UserError(f"config: {path} is {value!r}, expected a list")
        return tuple(_build_value(get_args(kind)[0], item, f"{path}.{i}") for i, item in enumerate(value))
    return parse_scalar(kind, value, path)


def _default_of(group: Any, name: str) -> Any:
    """Return the default of a field: its value in `group`, or that in the dataclass `group`."""
    if not isinstance(group, type):
        return getattr(group, name)
    (field,) = (field for field in dataclasses.fields(group) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _constant_schedule(value: Any, path: str) -> Schedule:
    """Return the schedule that a plain number means."""
    try:
        return Schedule(value=parse_scalar(float, value, path))
    except UserError as error:
        keys = ", ".join(_field_types(Schedule, path))
        raise UserError(f"{error} or a group with the keys {keys}") from None


def _model_config_type(tree: Mapping[str, Any], path: str) -> type[ModelConfig]:
    """Return the Config of the family of `model_type`."""
    model_type = str(tree.get("model_type", DEFAULT_MODEL_TYPE))
    if model_type not in FAMILIES:
        raise UserError(f"config: {path}.model_type is {model_type!r}{did_you_mean(model_type, FAMILIES)}")
    return model_config_type(model_type)


def _unknown_key_error(path: str, key: str, valid_keys: Iterable[str]) -> UserError:
    if new_key := renamed_key(path, tuple(valid_keys)):
        return UserError(f"config: '{path}' is now '{new_key}'")
    prefix = path.removesuffix(key)
    return UserError(f"config: unknown key '{path}'{did_you_mean(key, valid_keys, prefix)}")


def _join_path(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
