"""What a pickle that torch wrote says about tensors, without running it.

A pickle is a program for its reader: which functions are called, and with what, is up to the file.
So none of Python's unpicklers gets to see it. `parse_pickle` knows the instructions that torch writes
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

MAX_OPCODES = 2**20  # instructions followed at most, since one byte of pickle can take a hundred of memory

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),  # the last two from Python 2
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnsupportedFile(Exception):
    """A file that is not what it should be: what was found, expected what."""


@dataclass(frozen=True)
class Storage:
    """Elements that tensors are views of."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as its pickle tells it, offset and strides in elements; `place` checks them."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def short_repr(value: object) -> str:
    """What a file says, fit for a line of output."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def parse_pickle(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the pickle in `stream` makes; the stream is left where it ends.

    The storages that it refers to are added to `storages`. Raises Refused, and IndexError, KeyError
    or ValueError where instructions make no sense.
    """
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []  # what the stack was before each open mark
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in itertools.islice(pickletools.genops(stream), MAX_OPCODES):
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
                outer_stacks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer_stacks.pop()
                stack.append(tuple(items))
            case name if name in _TUPLES:
                stack.append(tuple(_pop_items(stack, _TUPLES[name])))
            case "APPEND" | "SETITEM" as name:
                items = _pop_items(stack, 1 if name == "APPEND" else 2)
                _MUTATORS[name](stack[-1], items)
            case "APPENDS" | "SETITEMS" as name:
                items, stack = stack, outer_stacks.pop()
                _MUTATORS[name](stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_resolve_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_resolve_global(*_pop_items(stack, 2)))
            case "REDUCE":
                stack.append(_call_allowed(*_pop_items(stack, 2)))
            case "BINPERSID":
                stack.append(_make_storage(stack.pop(), {} if storages is None else storages))
            case "BUILD":  # attributes: a state dict has `_metadata`, the versions of its modules
                del stack[-1]
                _update_dict(stack[-1], [])
            case name:
                detail = f" of {short_repr(argument)}" if name == "INST" else ""
                raise UnsupportedFile(f"holds the pickle instruction {name}{detail}, expected tensors only")
    raise UnsupportedFile(f"holds a pickle of more than {MAX_OPCODES} instructions, expected a state dict")


def _pop_items(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("pop from an empty stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def _extend_list(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise UnsupportedFile(f"appends to {type_name(target)}, expected a list")
    target.extend(items)


def _update_dict(target: Any, items: list[Any]) -> None:
    """Put key, value, key, value, … into a dict. Keys are strings: hashing anything deep overflows
    the stack of the process."""
    if type(target) is not dict:
        raise UnsupportedFile(f"sets items or attributes of {type_name(target)}, expected a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise UnsupportedFile(f"holds a dict with {type_name(key)} as a key, expected names")
        target[key] = value


def _resolve_global(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise UnsupportedFile("holds a global without a name, expected tensors only")
    qualified_name = f"{module}.{name}"
    if qualified_name not in _GLOBALS:
        raise UnsupportedFile(f"holds {short_repr(qualified_name)[1:-1]}, expected tensors only")
    return _GLOBALS[qualified_name]


def _call_allowed(function: Any, arguments: Any) -> Any:
    if not callable(function) or type(arguments) is not tuple:
        raise UnsupportedFile(f"calls {type_name(function)}, expected tensors only")
    return function(arguments)


def _make_storage(persistent_id: Any, storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent id stands for: ("storage", type, key, device, elements), in the
    older format followed by None."""
    match persistent_id:
        case ("storage", np.dtype() as dtype, str(key), _, int(size)) if size >= 0:
            pass
        case ("storage", np.dtype() as dtype, str(key), _, int(size), None) if size >= 0:
            pass
        case _:
            raise UnsupportedFile("refers to something that is no storage, expected tensors only")
    storage = Storage(key, dtype, size)
    if storages.setdefault(key, storage) != storage:
        raise UnsupportedFile(f"holds storage {short_repr(key)} in two ways, expected one type and size")
    return storage


def _make_ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """collections.OrderedDict(), or of [[key, value], …], as Python 2 wrote it."""
    result: dict[str, Any] = {}
    match arguments:
        case ():
            pass
        case (list(pairs),) if all(type(pair) is list for pair in pairs):
            for pair in pairs:
                _update_dict(result, pair)
        case _:
            raise UnsupportedFile("makes an OrderedDict of something else than pairs, expected a state dict")
    return result


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TensorView:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, flags),
    or the first four only. The flags say that the elements are to be negated or conjugated."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if not any(rest[2:]):
            return TensorView(storage, storage.dtype, offset, shape, strides)
    raise UnsupportedFile("rebuilds a tensor in an unknown way, expected storage, offset, shape and strides")


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> TensorView:
    """torch._utils._rebuild_tensor_v3: as v2, with the type of an untyped storage before the flags."""
    view = _rebuild_tensor(arguments[:6])
    match arguments[6:]:
        case (np.dtype() as dtype, *flags) if not any(flags):
            return TensorView(view.storage, dtype, view.offset, view.shape, view.strides)
    raise UnsupportedFile("rebuilds a tensor in an unknown way, expected its type")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> TensorView:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)"""
    match arguments:
        case (TensorView() as view, _, _):
            return view
    raise UnsupportedFile("rebuilds a parameter in an unknown way, expected a tensor")


def type_name(value: Any) -> str:
    return "a tensor" if type(value) is TensorView else f"a value of type {type(value).__name__}"


_MUTATORS = {
    "APPEND": _extend_list,
    "APPENDS": _extend_list,
    "SETITEM": _update_dict,
    "SETITEMS": _update_dict,
}

_STORAGE_DTYPES: dict[str, Any] = {
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
    "collections.OrderedDict": _make_ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **{f"torch.{name}Storage": np.dtype(kind) for name, kind in _STORAGE_DTYPES.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    **{f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")},
}
