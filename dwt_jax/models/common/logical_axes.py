"""Logical axes: what the axes of every parameter mean, declared once by each family.

Sharding, the weight-decay mask, the conversion to Hugging Face and remapping read them; none of
these names a leaf. An axis is a name and a fan: `in` (the kernel contracts over it), `out` (its
output has it) or neither.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Axis(NamedTuple):
    """One axis of a parameter.

    contracted_with: the operand that this output is contracted with, where that has no fan `in`:
    `output_embedding` (tied to the input embedding) or `keys` (of attention); `residual` where the output is
    added to the residual stream as it is; `rms_norm` for the gain of a norm of the residual stream that
    subtracts no mean (`rms_norm+output_embedding` for the last one).
    """

    name: str  # layer, embed, head, kv_head, head_dim, mlp, vocab, position, type, label, qkv, glu
    fan: str  # in, out or ""
    contracted_with: str = ""


Axes = tuple[Axis, ...]
ParamAxes = Mapping[str, Axes]
"""{'layers/mlp/input/kernel': (Axis('layer', ''), Axis('embed', 'in'), Axis('mlp', 'out')), …}"""


def _parse_axes(text: str) -> Axes:
    """'layer in:embed out:mlp out:head_dim>keys' → axes."""

    def parse_axis(item: str) -> Axis:
        item, _, contracted_with = item.partition(">")
        fan, _, name = item.rpartition(":")
        return Axis(name, fan, contracted_with)

    return tuple(parse_axis(item) for item in text.split())


def dense_axes(inputs: str, outputs: str) -> dict[str, str]:
    """Return the axis texts of a dense layer: kernel [*inputs, *outputs] and bias [*outputs]."""
    return {"kernel": f"{inputs} {outputs}", "bias": outputs}


def flatten_axes(tree: Any, path: str = "", prefix: str = "") -> dict[str, Axes]:
    """Return the axes of every leaf by its path, from a nested dict of axis texts.

    Leaves below `layers` get a leading `layer` axis.
    """
    if isinstance(tree, str):
        return {path: _parse_axes(tree if "layer" in tree else prefix + tree)}
    flat: dict[str, Axes] = {}
    for name, item in tree.items():
        layer = "layer " if path == "layers" else prefix
        flat |= flatten_axes(item, f"{path}/{name}" if path else name, layer)
    return flat


_INIT_TO_ONE = ("scale", "weight", "gate")


def init_value(path: str) -> float:
    """Return the initial value of a leaf that is not a matrix.

    An absent leaf is equivalent to one with this value (0: an absent table adds nothing).
    """
    return 1.0 if path.rpartition("/")[2] in _INIT_TO_ONE else 0.0


def is_gate(path: str) -> bool:
    """Return whether the leaf is a gate: not trained, but a function of the step (remap/gates.py)."""
    return path.rpartition("/")[2] in ("weight", "gate")


def has_norm_weights(param_axes: ParamAxes) -> bool:
    """Return whether norms of the family may weight their channels (remap/gates.py)."""
    return any(path.rpartition("/")[2] == "weight" for path in param_axes)


def path_name(path: tuple[Any, ...]) -> str:
    """Return a jax key path as 'layers/mlp/input/kernel'."""
    return "/".join(_key_name(part) for part in path)


def _key_name(part: Any) -> str:
    """Of a dict's key, a sequence's index or a dataclass's attribute."""
    return str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))


def map_with_axes(function: Callable[..., Any], param_axes: ParamAxes, params: Any, *rest: Any) -> Any:
    """Map `function(axes, leaf, *more)` over a tree of parameters and trees like it.

    Raises:
        KeyError: `param_axes` lacks a leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *more: function(param_axes[path_name(path)], leaf, *more), params, *rest
    )


def has_rms_norms(param_axes: ParamAxes) -> bool:
    """Return whether the norms of the residual stream subtract no mean."""
    return any(axis.contracted_with.startswith("rms_norm") for axes in param_axes.values() for axis in axes)


def is_matrix(axes: Axes) -> bool:
    """Return whether a leaf has an `out` axis and an axis besides that and `layer`."""
    input_axes = [axis for axis in axes if axis.fan != "out" and axis.name != "layer"]
    return bool(input_axes) and any(axis.fan == "out" for axis in axes)


def kernel_dims(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the (input, output) dimensions of a hidden layer's kernel; None: the leaf is something else.

    A leaf with a row per token, position, type or class is a table or a classifier. Dimensions without a
    fan (`layer`) number kernels that are stacked in one leaf.
    """
    inputs, outputs = (tuple(i for i, axis in enumerate(axes) if axis.fan == fan) for fan in ("in", "out"))
    is_table = any(axis.name in ("vocab", "position", "type", "label") for axis in axes)
    return None if is_table or not inputs or not outputs else (inputs, outputs)


def decay_mask(param_axes: ParamAxes, params: Any) -> Any:
    """Return True for matrices and embedding tables, False for biases and norms."""
    return map_with_axes(lambda axes, _: is_matrix(axes), param_axes, params)
