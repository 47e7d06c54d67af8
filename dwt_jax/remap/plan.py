"""From a method and two models to the maps of all axes: what is refused, what is promised."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from dwt_jax.config import Model
from dwt_jax.errors import UserError
from dwt_jax.models.common.layers import padded_vocabulary
from dwt_jax.models.common.logical_axes import Axis
from dwt_jax.remap import depth_maps, width_maps
from dwt_jax.remap.methods import Method, Options, find
from dwt_jax.remap.width_maps import COPIED, DERIVED, NEW, AxisMap

WIDTHS = ("embed", "head", "head_dim", "mlp")
BY_LAYER = ("head", "mlp")  # their maps are free in every layer, the residual stream has one

KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "head": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
    "position": "max_position_embeddings",
    "type": "type_vocab_size",
}
"""What the config calls the size of an axis."""

_SAME = ("hidden_act", "layer_norm_eps", "model_type")  # else it is another function


class Plan(NamedTuple):
    """All that the engine needs to know; the same for parameters and moments."""

    method: Method
    options: Options
    source: Model
    target: Model
    maps: dict[str, AxisMap]  # of the axes that change
    tied: bool  # the decoder is the word table
    scores: float  # by which the queries grow, because scores are divided by √head size
    key: jax.Array
    lost: tuple[str, ...]  # why the target does not compute what the source does; empty: it does


def plan(
    method: str | Method, source: Model, target: Model, key: jax.Array, options: Options = Options()
) -> Plan:
    """The maps of `method` (a name or a Method) from `source` to `target`.

    key: of whatever is drawn. Raises UserError for an unknown method and for a pair of models
    that the method cannot do, naming the size, what was found and what was expected.
    """
    method = find(method) if isinstance(method, str) else method
    for problem in _refusals(method, source, target):
        raise UserError(f"{method.name}: {problem}")
    lost = tuple(_losses(method, source, target, options))
    if lost and method.lossless:
        raise UserError(f"{method.name}: {lost[0]}")
    maps = {} if method.fresh else _maps(method, source, target, jax.random.fold_in(key, 0), options)
    old, new = sizes(source)["head_dim"], sizes(target)["head_dim"]
    return Plan(
        method=method,
        options=options,
        source=source,
        target=target,
        maps=maps,
        tied=target.tie_word_embeddings,
        scores=(new / old) ** 0.5,
        key=jax.random.fold_in(key, 1),
        lost=lost,
    )


def divides(todo: Plan, axis: Axis) -> bool:
    """Whether a copy along this axis gets its share: where a kernel contracts over it, and where
    the other party of the product that follows is only ever copied."""
    return axis.side == "in" or axis.meets == "keys" or (axis.meets == "words" and todo.tied)


def sizes(model: Model) -> dict[str, int]:
    """How many entries the arrays have along each axis of the role table."""
    return {
        "layer": model.num_hidden_layers,
        "embed": model.hidden_size,
        "head": model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "mlp": model.intermediate_size,
        "vocab": padded_vocabulary(model.vocab_size),
        "position": model.max_position_embeddings,
        "type": model.type_vocab_size,
    }


def _named_sizes(model: Model) -> dict[str, int]:
    return {**sizes(model), "vocab": model.vocab_size}


def _changes(source: Model, target: Model) -> Iterator[tuple[str, int, int]]:
    """(axis, old size, new size) of those that differ."""
    old, new = _named_sizes(source), _named_sizes(target)
    return ((axis, old[axis], new[axis]) for axis in KEYS if old[axis] != new[axis])


def _refusals(method: Method, source: Model, target: Model) -> Iterator[str]:
    """What this method cannot do at all."""
    for name, model in (("the source's ", source), ("", target)):
        if model.vocab_size < 1:
            yield f"{name}vocab_size is {model.vocab_size}, expected at least 1"
        if model.hidden_size % model.num_attention_heads:
            yield (
                f"{name}hidden_size is {model.hidden_size}, expected a multiple of num_attention_heads "
                f"({model.num_attention_heads})"
            )
    if method.fresh:
        return
    for flag in ("weighted_norm", "gated_layers"):
        if getattr(source, flag) and not getattr(target, flag):
            yield f"{flag} true → false, expected true until it is annealed away"
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        yield "tie_word_embeddings false → true, expected false: two tables do not fit into one"
    for axis, old, new in _changes(source, target):
        found = f"{KEYS[axis]} {old} → {new}"
        if axis == "layer" and method.depth == "same":
            yield f"{found}, expected {old} (or a depth map before it, as in stack+{method.name})"
        if axis in WIDTHS and method.width == "same":
            yield f"{found}, expected {old} (or a width map after it, as in {method.name}+net2net)"
        if axis in WIDTHS and method.multiples and new % old:
            yield f"{found}, expected a multiple of {old}"


def _losses(method: Method, source: Model, target: Model, options: Options) -> Iterator[str]:
    """Why the target's logits, over the positions, tokens and types that the source has, are not
    the source's."""
    if method.fresh:
        yield f"{method.name}: nothing is taken from the source"
        return
    for field in _SAME:
        old, new = getattr(source, field), getattr(target, field)
        if old != new:
            yield f"{field} {old} → {new}, expected {old}"
    if options.noise:
        yield f"noise {options.noise:g}, expected 0"
    grows = False
    for axis, old, new in _changes(source, target):
        found = f"{KEYS[axis]} {old} → {new}"
        if new < old:
            yield f"{found}, expected at least {old}"
            continue
        grows |= axis in WIDTHS
        if axis == "layer" and not target.gated_layers:
            yield f"{found}, expected model.gated_layers: an added post-LN layer is never the identity"
        if axis == "embed" and not target.weighted_norm:
            if method.width not in ("tiled", "drawn"):
                yield f"{found}, expected model.weighted_norm"
            elif new % old:
                yield f"{found}, expected a multiple of {old} or model.weighted_norm"
    if method.ahead and grows and source.num_hidden_layers > 1:
        yield f"{method.name}: new units come from the layer above"


def _maps(
    method: Method, source: Model, target: Model, key: jax.Array, options: Options
) -> dict[str, AxisMap]:
    maps = {}
    for i, (axis, old, new) in enumerate(_changes(source, target)):
        axis_key = jax.random.fold_in(key, i)
        if axis == "layer":
            maps[axis] = _layers(depth_maps.MAPS[method.depth](old, new), old)
        elif axis == "vocab":
            maps[axis] = _vocabulary(source, target, options.new_tokens)
        elif axis == "type":
            maps[axis] = width_maps.padded(old, new, "random") if new > old else width_maps.kept(old, new)
        elif axis in WIDTHS:
            layers = target.num_hidden_layers if axis in BY_LAYER else 0
            maps[axis] = _width(method, options.split or method.split, axis_key, old, new, layers)
    if _position_rows(source) != _position_rows(target):
        maps["position"] = _positions(source, target, options.new_positions)
    return maps


def _width(method: Method, split: str, key: jax.Array, old: int, new: int, layers: int) -> AxisMap:
    if new < old:
        return width_maps.kept(old, new)
    if method.width in ("zero", "unread"):
        return width_maps.padded(old, new, {"zero": "zero", "unread": "random"}[method.width])
    keys = jax.random.split(key)
    if method.width == "tiled":
        return width_maps.tiled(old, new, width_maps.uneven(keys[0], (new,)) if split == "uneven" else None)
    shape = (layers, new) if layers else (new,)
    weights = width_maps.uneven(keys[0], shape) if split == "uneven" else None
    return width_maps.drawn(keys[1], old, new, layers, weights)


def _layers(sources: list[int], old: int) -> AxisMap:
    """The first layer that comes from each one of the source is that layer; further ones are copies,
    whose gates are shut (their share of the layer's work is 0)."""
    index = np.array(sources)
    first = np.array([layer not in sources[:i] for i, layer in enumerate(sources)])
    kind = np.where(index == depth_maps.NEW, NEW, np.where(first, COPIED, DERIVED)).astype(np.int8)
    return AxisMap(old, np.maximum(index, 0), (kind == COPIED).astype(float), kind)


def _vocabulary(source: Model, target: Model, fill: str) -> AxisMap:
    entries = np.arange(padded_vocabulary(target.vocab_size))
    inside = entries < min(source.vocab_size, target.vocab_size)
    kind = np.where(inside, COPIED, NEW).astype(np.int8)
    old = padded_vocabulary(source.vocab_size)
    return AxisMap(old, np.where(inside, entries, 0), inside.astype(float), kind, fill, target.vocab_size)


def _position_rows(model: Model) -> tuple[int, int]:
    """(rows before the first position, rows in all)"""
    return model.position_offset, model.max_position_embeddings


def _positions(source: Model, target: Model, fill: str) -> AxisMap:
    """Position p of the target from position p of the source, and so on from its beginning where
    `fill` is tiled. Rows before the first position stay in place."""
    (before, rows), (target_before, target_rows) = _position_rows(source), _position_rows(target)
    entries = np.arange(target_rows)
    positions = entries - target_before
    inside = np.where(positions < 0, entries < before, positions < rows - before)
    further = (positions >= 0) & (fill == "tiled")
    index = np.where(positions < 0, entries, before + positions % (rows - before))
    kind = np.where(inside, COPIED, np.where(further, DERIVED, NEW)).astype(np.int8)
    return AxisMap(rows, np.where(kind == NEW, 0, index), (kind == COPIED).astype(float), kind, "random")
