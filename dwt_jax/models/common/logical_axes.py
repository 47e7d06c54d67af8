"""The role table: what the axes of every parameter mean, declared once.

Read by the sharding, the weight-decay mask, the Hugging Face bridge and remapping: none of
them names a leaf. An axis is a name and a side:
`in` (the kernel contracts over it), `out` (its output has it) or neither.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Axis(NamedTuple):
    name: str  # layer, embed, head, head_dim, mlp, vocab, position, type, label
    fan: str  # in, out or ""
    contracted_with: str = (
        ""  # what else a product sums this output with, where that has no side `in`: words, keys
    )


def _parse_axes(text: str) -> tuple[Axis, ...]:
    """'layer in:embed out:mlp out:head_dim>keys' → axes."""

    def parse_axis(item: str) -> Axis:
        item, _, contracted_with = item.partition(">")
        fan, _, name = item.rpartition(":")
        return Axis(name, fan, contracted_with)

    return tuple(parse_axis(item) for item in text.split())


_NORM = {"scale": "out:embed", "bias": "out:embed", "weight": "in:embed"}  # it sums over weight·x
_LAST_NORM = {**_NORM, "scale": "out:embed>words", "bias": "out:embed>words"}  # before a tied decoder


def _dense(inputs: str, outputs: str) -> dict[str, str]:
    return {"kernel": f"{inputs} {outputs}", "bias": outputs}


_HEADS = _dense("in:embed", "out:head out:head_dim")
_QUERY = _dense("in:embed", "out:head out:head_dim>keys")

_TABLE: dict[str, Any] = {
    "embeddings": {
        "word": {"embedding": "vocab out:embed"},
        "position": {"embedding": "position out:embed"},
        "type": {"embedding": "type out:embed"},
        "norm": _NORM,
    },
    "layers": {
        "attention": {
            "query": _QUERY,
            "key": _HEADS,
            "value": _HEADS,
            "output": _dense("in:head in:head_dim", "out:embed"),
            "norm": _NORM,
        },
        "mlp": {
            "input": _dense("in:embed", "out:mlp"),
            "output": _dense("in:mlp", "out:embed"),
            "norm": _NORM,
        },
        "gate": "in:layer",  # the sum over copies of a layer is the layer
    },
    "mlm": {
        "transform": _dense("in:embed", "out:embed"),
        "norm": _LAST_NORM,
        "bias": "vocab",
        "decoder": {"embedding": "out:vocab in:embed"},  # where it is not the word table
    },
    "pooler": _dense("in:embed", "out:embed"),
    "next_sentence": _dense("in:embed", "out:label"),
    "classifier": _dense("in:embed", "out:label"),
}


def _flatten(tree: Any, path: str = "", prefix: str = "") -> dict[str, tuple[Axis, ...]]:
    if isinstance(tree, str):
        return {path: _parse_axes(tree if "layer" in tree else prefix + tree)}
    flat: dict[str, tuple[Axis, ...]] = {}
    for name, item in tree.items():
        layer = "layer " if path == "layers" else prefix
        flat |= _flatten(item, f"{path}/{name}" if path else name, layer)
    return flat


PARAM_AXES: dict[str, tuple[Axis, ...]] = _flatten(_TABLE)
"""{'layers/mlp/input/kernel': (Axis('layer', ''), Axis('embed', 'in'), Axis('mlp', 'out')), …}"""

TIED_TO = {"mlm/decoder/embedding": "embeddings/word/embedding"}
"""The leaf that does the work of another where that is absent."""

_INIT_TO_ONE = ("scale", "weight", "gate")


def init_value(path: str) -> float:
    """What a leaf that is no matrix starts at. An absent leaf counts as filled with it (0: a table
    that is not there adds nothing)."""
    return 1.0 if path.rpartition("/")[2] in _INIT_TO_ONE else 0.0


def is_gate(path: str) -> bool:
    """Whether the leaf is not trained but a function of the step that ends at 1 (annealing.py)."""
    return path.rpartition("/")[2] in ("weight", "gate")


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as 'layers/mlp/input/kernel'."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def map_with_axes(function: Callable[..., Any], params: Any, *rest: Any) -> Any:
    """tree.map with the axes of the leaf as the first argument.

    Raises KeyError naming a leaf that the table does not know.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *more: function(PARAM_AXES[path_name(path)], leaf, *more), params, *rest
    )


def is_matrix(axes: tuple[Axis, ...]) -> bool:
    """A leaf is a matrix when it has an `out` axis and an axis besides that and `layer`."""
    input_axes = [axis for axis in axes if axis.fan != "out" and axis.name != "layer"]
    return bool(input_axes) and any(axis.fan == "out" for axis in axes)


def decay_mask(params: Any) -> Any:
    """True for matrices and embedding tables, False for biases and norms."""
    return map_with_axes(lambda axes, _: is_matrix(axes), params)
