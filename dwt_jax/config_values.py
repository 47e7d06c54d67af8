"""Plain values and lists of a config, from Python and from text of the command line."""

import dataclasses
import json
import re
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.renamed_keys import RENAMED_VALUES


class CommandLineText(str):
    """A value from the command line, which is parsed as the type of its field."""


def parse_list(entry: Any, text: str, path: str) -> list[Any]:
    """Parse a list from the command line: JSON, or plain values with commas between them."""
    if not (dataclasses.is_dataclass(entry) or text.lstrip().startswith(("[", "{", '"'))):
        return [CommandLineText(item.strip()) for item in text.split(",")] if text.strip() else []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"config: {path} is {str(text)!r}, expected JSON ({error})") from None
    if not isinstance(value, list):
        raise UserError(f"config: {path} is {str(text)!r}, expected a list")
    return value


def parse_scalar(kind: Any, value: Any, path: str) -> Any:
    """Convert a value to a plain type.

    Args:
        kind: int, float, bool, str or a Literal of strings.
        value: a Python value, or text from the command line.
        path: dotted key, for the error message.

    Raises:
        UserError: the value is not of that type.
    """
    is_text = isinstance(value, CommandLineText)
    raw_value = str(value) if is_text else value
    if get_origin(kind) is Literal:
        if raw_value not in get_args(kind):
            if (new_value := RENAMED_VALUES.get(str(raw_value))) in get_args(kind):
                raise UserError(f"config: {path} is {raw_value!r}, which is now {new_value!r}")
            raise UserError(f"config: {path} is {raw_value!r}{did_you_mean(str(raw_value), get_args(kind))}")
        return raw_value
    if kind is str:
        if isinstance(value, str):
            return str(value)
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if is_text and raw_value.lower() in ("true", "1", "false", "0"):
            return raw_value.lower() in ("true", "1")
    elif not isinstance(value, bool) and (is_text or isinstance(value, (int, float))):
        number = _parse_number(raw_value)
        if number is not None and (kind is float or number == int(number)):
            with suppress(OverflowError):  # a float of a whole number with hundreds of digits
                return kind(number)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    raise UserError(f"config: {path} is {raw_value!r}, expected {expected}")


def _parse_number(value: Any) -> int | float | None:
    """Return the number, or None if it is not finite. Integers stay exact; '1e3' is one too."""
    try:
        return int(value) if not isinstance(value, float) else _float_or_none(value)
    except ValueError:
        try:
            return _float_or_none(value)
        except ValueError:
            return None


def _float_or_none(value: float | str) -> float | None:
    """Return the value as a float, or None beyond a float's range: '1e400' is not inf, '1e-400' not 0."""
    number = float(value)
    mantissa = value.lower().partition("e")[0] if isinstance(value, str) else ""
    is_too_small = number == 0 and re.search("[1-9]", mantissa)
    return number if abs(number) < float("inf") and not is_too_small else None
