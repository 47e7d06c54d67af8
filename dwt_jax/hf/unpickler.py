"""Parse a pickle of a dict of tensors that torch wrote, without executing it.

A pickle is a program: the file decides which functions are called, and with which arguments. Python's
unpicklers are therefore not used. `parse_pickle` supports the instructions that torch writes
for a dict of tensors and the few functions in `_GLOBALS`, all defined in this module. Any other
instruction or function is refused by name. (A whitelist in `Unpickler.find_class` is not enough: the size
of the memo, the attributes of the whitelisted objects and the depth of hashed values would still be
controlled by the file.)
"""

import io
import itertools
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

MAX_OPCODES = 2**20
"""Limit of instructions: one byte of pickle can use a hundred bytes of memory."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),  # the last two from Python 2
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnsupportedFile(Exception):
    """A file that is damaged or not supported. The message says what it holds and what is expected."""


@dataclass(frozen=True)
class Storage:
    """Elements of which tensors are views."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as described by its pickle. `torch_pickle.make_tensor_span` checks the values."""

    storage: Storage
    dtype: np.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


def short_repr(value: object) -> str:
    """Return an ASCII `repr` of at most about 200 characters, for messages."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def parse_pickle(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """Return the value of a pickle.

    Args:
        stream: the pickle; afterwards the stream is at its end.
        storages: a dict to which the storages of the pickle are added.

    Raises:
        UnsupportedFile: an instruction or a function that is not supported.
        IndexError, KeyError, ValueError: invalid instructions.
    """
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []  # the stacks below each open mark
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
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE" as name:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
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
    """Put key, value, key, value, … into a dict. Only strings are accepted as keys: hashing a deeply
    nested key overflows the stack of the process."""
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
    """The storage of a persistent id: ("storage", type, key, device, elements), in the older format
    followed by None."""
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
    """collections.OrderedDict(), or with [[key, value], …], as Python 2 wrote it."""
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
    or only the first four. Flags (elements to be negated or conjugated) are refused."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *rest) if not any(rest[2:]):
            return TensorView(storage, storage.dtype, offset, shape, strides)
    raise UnsupportedFile("rebuilds a tensor in an unknown way, expected storage, offset, shape and strides")


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> TensorView:
    """torch._utils._rebuild_tensor_v3: as v2, with the dtype of an untyped storage before the flags."""
    view = _rebuild_tensor(arguments[:6])
    match arguments[6:]:
        case (np.dtype() as dtype, *flags) if not any(flags):
            return TensorView(view.storage, dtype, view.offset, view.shape, view.strides)
    raise UnsupportedFile("rebuilds a tensor in an unknown way, expected its type")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> TensorView:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)."""
    match arguments:
        case (TensorView() as view, _, _):
            return view
    raise UnsupportedFile("rebuilds a parameter in an unknown way, expected a tensor")


def type_name(value: Any) -> str:
    """Return the type of a parsed value, for messages."""
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

# Every global that a pickle may name, and its replacement.
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
