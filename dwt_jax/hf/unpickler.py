"""What a pickle that torch wrote says about tensors, without running it.

A pickle is a program for its reader: which functions are called, and with what, is up to the file.
So none of Python's unpicklers gets to see it. `unpickled` knows the instructions that torch writes
for a dict of tensors and the few functions of `_GLOBALS`, all of them here. What it does not know it
refuses, by name. (A table in `Unpickler.find_class` would not do: the size of the memo, the
attributes of what the table gives out and the depth of what is hashed would still be up to the file.)
"""

import io
import itertools
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MOST = 2**20  # instructions followed at most, since one byte of pickle can take a hundred of memory

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),  # the last two from Python 2
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(Exception):
    """A file that is not what it should be: what was found, expected what."""


@dataclass(frozen=True)
class Storage:
    """Elements that tensors are views of."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class View:
    """A tensor as its pickle tells it, offset and strides in elements; `place` checks them."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def quoted(value: object) -> str:
    """What a file says, fit for a line of output."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def unpickled(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the pickle in `stream` makes; the stream is left where it ends.

    The storages that it refers to are added to `storages`. Raises Refused, and IndexError, KeyError
    or ValueError where instructions make no sense.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what the stack was before each open mark
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in itertools.islice(pickletools.genops(stream), MOST):
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" as name:
                stack.append({} if name == "EMPTY_DICT" else [])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case name if name in _TUPLES:
                stack.append(tuple(_popped(stack, _TUPLES[name])))
            case "APPEND" | "SETITEM" as name:
                items = _popped(stack, 1 if name == "APPEND" else 2)
                _PUTS[name](stack[-1], items)
            case "APPENDS" | "SETITEMS" as name:
                items, stack = stack, below.pop()
                _PUTS[name](stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_known(*_popped(stack, 2)))
            case "REDUCE":
                stack.append(_called(*_popped(stack, 2)))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), {} if storages is None else storages))
            case "BUILD":  # attributes: a state dict has `_metadata`, the versions of its modules
                del stack[-1]
                _update(stack[-1], [])
            case name:
                of = f" of {quoted(argument)}" if name == "INST" else ""
                raise Refused(f"holds the pickle instruction {name}{of}, expected tensors only")
    raise Refused(f"holds a pickle of more than {MOST} instructions, expected a state dict")


def _popped(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("pop from an empty stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise Refused(f"appends to {kind_of(target)}, expected a list")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    """Put key, value, key, value, … into a dict. Keys are strings: hashing anything deep overflows
    the stack of the process."""
    if type(target) is not dict:
        raise Refused(f"sets items or attributes of {kind_of(target)}, expected a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise Refused(f"holds a dict with {kind_of(key)} as a key, expected names")
        target[key] = value


def _known(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise Refused("holds a global without a name, expected tensors only")
    found = f"{module}.{name}"
    if found not in _GLOBALS:
        raise Refused(f"holds {quoted(found)[1:-1]}, expected tensors only")
    return _GLOBALS[found]


def _called(function: Any, arguments: Any) -> Any:
    if not callable(function) or type(arguments) is not tuple:
        raise Refused(f"calls {kind_of(function)}, expected tensors only")
    return function(arguments)


def _storage(identity: Any, storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent id stands for: ("storage", type, key, device, elements), in the
    older format followed by None."""
    match identity:
        case ("storage", np.dtype() as dtype, str(key), _, int(size)) if size >= 0:
            pass
        case ("storage", np.dtype() as dtype, str(key), _, int(size), None) if size >= 0:
            pass
        case _:
            raise Refused("refers to something that is no storage, expected tensors only")
    storage = Storage(key, dtype, size)
    if storages.setdefault(key, storage) != storage:
        raise Refused(f"holds storage {quoted(key)} in two ways, expected one type and size")
    return storage


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """collections.OrderedDict(), or of [[key, value], …], as Python 2 wrote it."""
    made: dict[str, Any] = {}
    match arguments:
        case ():
            pass
        case (list(pairs),) if all(type(pair) is list for pair in pairs):
            for pair in pairs:
                _update(made, pair)
        case _:
            raise Refused("makes an OrderedDict of something else than pairs, expected a state dict")
    return made


def _tensor(arguments: tuple[Any, ...]) -> View:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, flags),
    or the first four only. The flags say that the elements are to be negated or conjugated."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if not any(rest[2:]):
            return View(storage, storage.dtype, offset, shape, strides)
    raise Refused("rebuilds a tensor in an unknown way, expected storage, offset, shape and strides")


def _typed_tensor(arguments: tuple[Any, ...]) -> View:
    """torch._utils._rebuild_tensor_v3: as v2, with the type of an untyped storage before the flags."""
    view = _tensor(arguments[:6])
    match arguments[6:]:
        case (np.dtype() as dtype, *flags) if not any(flags):
            return View(view.storage, dtype, view.offset, view.shape, view.strides)
    raise Refused("rebuilds a tensor in an unknown way, expected its type")


def _parameter(arguments: tuple[Any, ...]) -> View:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)"""
    match arguments:
        case (View() as view, _, _):
            return view
    raise Refused("rebuilds a parameter in an unknown way, expected a tensor")


def kind_of(value: Any) -> str:
    return "a tensor" if type(value) is View else f"a value of type {type(value).__name__}"


_PUTS = {"APPEND": _extend, "APPENDS": _extend, "SETITEM": _update, "SETITEMS": _update}

_STORED: dict[str, Any] = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}

# All that a pickle may name, and what it means here.
_GLOBALS: dict[str, np.dtype | Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}Storage": np.dtype(kind) for name, kind in _STORED.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
}
