"""Limits of the numbers of a config, written beside the field: `Annotated[float, SHARE]`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Limit(NamedTuple):
    """What a number may be: in words, and as a function."""

    expected: str
    allows: Callable[[float], bool]


def at_least(minimum: int) -> Limit:
    """Return the limit of numbers from `minimum` on."""
    return Limit(f"at least {minimum}", lambda value: value >= minimum)


POSITIVE = Limit("more than 0", lambda value: value > 0)
SHARE = Limit("a share from 0 to 1", lambda value: 0 <= value <= 1)
OPEN_SHARE = Limit("a share above 0 and below 1", lambda value: 0 < value < 1)
DECAY = Limit("at least 0 and less than 1", lambda value: 0 <= value < 1)
SEED = Limit("at least 0 and less than 2**32", lambda value: 0 <= value < 2**32)


@functools.cache
def _type_hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def limit_problems(group: Any, name: str) -> Iterator[str]:
    """Yield one line for each number beyond the limit of its field, in a dataclass and those within.

    Args:
        group: an instance of a dataclass.
        name: its dotted key, with which each line begins; '' for the whole config.
    """
    for field, hint in _type_hints(type(group)).items():  # type: ignore[arg-type]
        value = getattr(group, field)
        key = f"{name}.{field.rstrip('_')}" if name else field
        if get_origin(hint) is Annotated:
            for limit in get_args(hint)[1:]:
                if not limit.allows(value):
                    yield f"{key} is {value}, expected {limit.expected}"
        elif dataclasses.is_dataclass(value):
            yield from limit_problems(value, key)
        elif isinstance(value, tuple):
            for i, entry in enumerate(value):
                if dataclasses.is_dataclass(entry):
                    yield from limit_problems(entry, f"{key}.{i}")
