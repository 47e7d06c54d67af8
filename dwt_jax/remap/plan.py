"""Plan a growth: check that the method supports two models, and make the map of every axis."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.models import FAMILIES, family
from dwt_jax.models.common.layers import padded_vocab_size
from dwt_jax.models.common.logical_axes import ParamAxes, has_norm_weights, has_rms_norms
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap import depth_maps, width_maps
from dwt_jax.remap.methods import GrowthOptions, Method, get_method
from dwt_jax.remap.width_maps import COPIED, DUPLICATE, NEW, AxisMap

WIDTH_AXES = ("embed", "head", "kv_head", "head_dim", "mlp")
PER_LAYER_AXES = ("head", "kv_head", "mlp")  # may have a map per layer; the residual stream has one map


class Plan(NamedTuple):
    """The input of `apply.grow_params`, the same for parameters and moments."""

    method: Method
    options: GrowthOptions
    source: ModelConfig
    target: ModelConfig
    maps: dict[str, AxisMap]  # by axis, for the axes that change
    tied: bool  # the output embedding is the input embedding
    query_scale: float  # factor of the queries, because attention scores are divided by √head size
    scales_residual: bool  # the copies of a channel of the residual stream are scaled (axis_scale.py)
    zero_new_layers: bool  # the residual branches of added layers add 0
    key: jax.Array
    reasons_not_preserving: tuple[str, ...]  # why the function changes; empty: it is preserved

    @property
    def function_preserving(self) -> bool:
        """Whether the target computes the same function as the source."""
        return not self.reasons_not_preserving

    @property
    def param_axes(self) -> ParamAxes:
        """Logical axes of every leaf of the target."""
        return family(self.target).param_axes(self.target)

    @property
    def tied_to(self) -> Mapping[str, str]:
        """The leaf that is used where another leaf is absent, by the path of the absent one."""
        return family(self.target).TIED_TO


def plan_growth(
    method: str | Method,
    source: ModelConfig,
    target: ModelConfig,
    key: jax.Array,
    options: GrowthOptions = GrowthOptions(),
) -> Plan:
    """Return the plan to grow one model into another.

    Args:
        method: a name as in `methods.get_method`, or a Method.
        source: config of the model to grow.
        target: config of the model to return, smaller or larger.
        key: random key.
        options: options of the method.

    Raises:
        UserError: an unknown method, or a pair of models that the method does not support; the message
            names the size, its value and the expected one.
    """
    method = get_method(method) if isinstance(method, str) else method
    for problem in _unsupported(method, source, target, options):
        raise UserError(f"{method.name}: {problem}")
    reasons = tuple(_reasons_not_preserving(method, source, target, options))
    if reasons and method.function_preserving:
        raise UserError(f"{method.name}: {reasons[0]}")
    maps = (
        {} if method.random_init else _axis_maps(method, source, target, jax.random.fold_in(key, 0), options)
    )
    old, new = axis_sizes(source)["head_dim"], axis_sizes(target)["head_dim"]
    return Plan(
        method=method,
        options=options,
        source=source,
        target=target,
        maps=maps,
        tied=target.tie_word_embeddings,
        query_scale=(new / old) ** 0.5,
        scales_residual=_scales_residual(method, target),
        zero_new_layers=_zeroes_new_layers(method, target, options),
        key=jax.random.fold_in(key, 1),
        reasons_not_preserving=reasons,
    )


def axis_sizes(model: ModelConfig) -> dict[str, int]:
    """Return the size of the arrays along each logical axis."""
    return family(model).axis_sizes(model)


def _config_sizes(model: ModelConfig) -> dict[str, int]:
    return {**axis_sizes(model), "vocab": model.vocab_size}


def _changed_axes(source: ModelConfig, target: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(axis, old size, new size) of the axes that differ."""
    old, new = _config_sizes(source), _config_sizes(target)
    return ((axis, old[axis], new[axis]) for axis in family(source).SIZE_KEYS if old[axis] != new[axis])


def _has_residual_branches(model: ModelConfig) -> bool:
    """Whether a layer adds to its input without a norm after the sum, so that it can be the identity."""
    axes = family(model).param_axes(model).values()
    return any(axis.contracted_with == "residual" for leaf in axes for axis in leaf)


def _scales_residual(method: Method, target: ModelConfig) -> bool:
    """Whether the residual stream keeps its mean square. LiGO's maps are learned from plain copies."""
    has_plain_copies = method.random_init or method.name == "ligo" or method.width == "undivided_tile"
    return has_rms_norms(family(target).param_axes(target)) and not has_plain_copies


def _zeroes_new_layers(method: Method, target: ModelConfig, options: GrowthOptions) -> bool:
    return (options.new_layers or method.new_layers) == "zero" and _has_residual_branches(target)


def _source_layers(method: Method, source: ModelConfig, target: ModelConfig) -> list[int]:
    old, new = source.num_hidden_layers, target.num_hidden_layers
    return depth_maps.source_layers(method.depth, old, new, family(target).layer_period(target))


def _unsupported(
    method: Method, source: ModelConfig, target: ModelConfig, options: GrowthOptions
) -> Iterator[str]:
    """Yield why the method does not support the pair of models."""
    for name, model in (("the source's ", source), ("", target)):
        if model.vocab_size < 1:
            yield f"{name}vocab_size is {model.vocab_size}, expected at least 1"
        yield from (f"{name}{problem}" for problem in model.head_problems())
    if family(source) is not family(target):
        alike = [kind for kind in FAMILIES if family(kind) is family(source)]
        change = f"model_type {source.model_type} → {target.model_type}"
        yield f"{change}, expected {' or '.join(alike)}: others have other layers"
        return
    if method.random_init:
        return
    for flag in ("weighted_norm", "gated_layers"):
        if getattr(source, flag) and not getattr(target, flag):
            yield f"{flag} true → false, expected true until its gates are open (1)"
    if options.new_layers == "zero" and not _has_residual_branches(target):
        yield "new_layers is 'zero', expected 'copy': no layer of a post-norm model is the identity"
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        yield "tie_word_embeddings false → true, expected false: two tables do not fit into one"
    for axis, old, new in _changed_axes(source, target):
        change = f"{family(source).SIZE_KEYS[axis]} {old} → {new}"
        if axis in (fixed := family(source).fixed_axes(source)):
            yield f"{change}, expected {old}: {fixed[axis]}"
        if axis == "layer" and method.depth == "same":
            yield f"{change}, expected {old} (or a depth map before it, as in stack+{method.name})"
        if axis in WIDTH_AXES and method.width == "same":
            yield f"{change}, expected {old} (or a width map after it, as in {method.name}+net2net)"
        if axis in WIDTH_AXES and method.integer_factor_only and new % old:
            yield f"{change}, expected a multiple of {old}"


def _reasons_not_preserving(
    method: Method, source: ModelConfig, target: ModelConfig, options: GrowthOptions
) -> Iterator[str]:
    """Yield why the target's logits differ from the source's, over the source's positions, tokens and
    types."""
    if method.random_init:
        yield f"{method.name}: nothing is copied from the source"
        return
    for field in family(source).FUNCTION_FIELDS:
        old, new = getattr(source, field), getattr(target, field)
        if old != new:
            yield f"{field} {old} → {new}, expected {old}"
    if missing := sorted(family(source).param_axes(source).keys() - family(target).param_axes(target).keys()):
        yield f"{missing[0]}: a {target.model_type} has no such parameter, expected a model_type with it"
    if options.noise:
        yield f"noise {options.noise:g}, expected 0"
    grows = False
    for axis, old, new in _changed_axes(source, target):
        change = f"{family(source).SIZE_KEYS[axis]} {old} → {new}"
        if new == 0:
            key = family(source).SIZE_KEYS[axis]
            yield f"{key} {old}: a {target.model_type} has no such table, expected a model_type with it"
            continue
        if new < old:
            yield f"{change}, expected at least {old}"
            continue
        grows |= axis in WIDTH_AXES
        # Heads of keys and values that grow alone are repeated for the query heads that they had.
        if axis in WIDTH_AXES and axis != "kv_head" and method.width == "undivided_tile":
            yield f"{change}, expected a method that divides copies by their number"
        if axis == "layer" and not target.gated_layers:
            yield from _layer_reasons(method, source, target, options, change)
        if axis == "embed" and _scales_residual(method, target):
            if method.width == "zero_fan_in":
                yield f"{change}, expected a method that copies channels: new ones are not 0"
        elif axis == "embed" and not target.weighted_norm:
            is_copied = method.width in ("tile", "random_copies")
            if not is_copied or new % old:
                expected = [f"a multiple of {old}"] if is_copied else []
                expected += (
                    ["model.weighted_norm"] if has_norm_weights(family(target).param_axes(target)) else []
                )
                yield f"{change}, expected {' or '.join(expected) or 'a method that copies channels'}"
    if "kv_head" in axis_sizes(source):
        old_group, new_group = (
            sizes["head"] // sizes["kv_head"] for sizes in map(axis_sizes, (source, target))
        )
        if new_group < old_group and old_group % new_group:
            yield (
                f"query heads for each head of keys and values {old_group} → {new_group}, expected a divisor "
                f"or more of {old_group}"
            )
    if method.from_next_layer and grows and source.num_hidden_layers > 1:
        yield f"{method.name}: new units come from the layer above"


def _layer_reasons(
    method: Method, source: ModelConfig, target: ModelConfig, options: GrowthOptions, change: str
) -> Iterator[str]:
    """Yield why added layers change the function."""
    if not _has_residual_branches(target):
        yield f"{change}, expected model.gated_layers: an added post-LN layer is never the identity"
    elif not _zeroes_new_layers(method, target, options):
        yield f"{change}, expected new_layers 'zero': the added layers are copies"
    else:
        layers = _layer_map(_source_layers(method, source, target), source.num_hidden_layers)
        if list(layers.index[layers.kind == COPIED]) != list(range(source.num_hidden_layers)):
            period = family(target).layer_period(target)
            yield f"{change}, expected multiples of {period}: periods of layers of several kinds are copied"


def _axis_maps(
    method: Method, source: ModelConfig, target: ModelConfig, key: jax.Array, options: GrowthOptions
) -> dict[str, AxisMap]:
    maps = {}
    for i, (axis, old, new) in enumerate(_changed_axes(source, target)):
        axis_key = jax.random.fold_in(key, i)
        if axis == "layer":
            maps[axis] = _layer_map(_source_layers(method, source, target), old)
        elif axis == "vocab":
            maps[axis] = _vocab_map(source, target, options.new_tokens)
        elif axis == "type":
            maps[axis] = width_maps.pad(old, new, "random") if new > old else width_maps.truncate(old, new)
        elif axis in WIDTH_AXES and not (axis in ("head", "kv_head") and "kv_head" in axis_sizes(target)):
            layers = target.num_hidden_layers if axis in PER_LAYER_AXES else 0
            maps[axis] = _width_map(method, options.split or method.split, axis_key, old, new, layers)
    if "kv_head" in axis_sizes(target):
        maps |= _grouped_head_maps(method, source, target, jax.random.fold_in(key, len(maps)), options)
    if family(source).position_rows(source) != family(target).position_rows(target):
        maps["position"] = _position_map(source, target, options.new_positions)
    return maps


def _width_map(method: Method, split: str, key: jax.Array, old: int, new: int, layers: int) -> AxisMap:
    if new < old:
        return width_maps.truncate(old, new)
    if method.width == "undivided_tile":
        return width_maps.undivided_tile(old, new)
    if method.width in ("zero", "zero_fan_in"):
        return width_maps.pad(old, new, "zero" if method.width == "zero" else "random")
    keys = jax.random.split(key)
    if method.width == "tile":
        return width_maps.tile(
            old, new, width_maps.uneven_weights(keys[0], (new,)) if split == "uneven" else None
        )
    shape = (layers, new) if layers else (new,)
    weights = width_maps.uneven_weights(keys[0], shape) if split == "uneven" else None
    return width_maps.random_copies(keys[1], old, new, layers, weights)


def _grouped_head_maps(
    method: Method, source: ModelConfig, target: ModelConfig, key: jax.Array, options: GrowthOptions
) -> dict[str, AxisMap]:
    """Maps of the query heads and of the heads of keys and values, G query heads of which share one.

    Query head h reads head h // G. So a copy of a head of keys and values brings copies of its query heads,
    and a group that grows does so by copies of its own. A group that shrinks by a whole factor is split: its
    keys and values are repeated, and the query heads stay.
    """
    old, new = axis_sizes(source), axis_sizes(target)
    if (old["head"], old["kv_head"]) == (new["head"], new["kv_head"]):
        return {}
    old_group, new_group = (sizes["head"] // sizes["kv_head"] for sizes in (old, new))
    parts = old_group // new_group if old_group % new_group == 0 else 1  # of a group that is split
    old_group //= parts
    layers, split = target.num_hidden_layers, options.split or method.split
    keys = jax.random.split(key)
    groups, kv_heads = new["kv_head"], old["kv_head"] * parts

    def grow(key: jax.Array, old: int, new: int) -> AxisMap:
        return (
            _width_map(method, split, key, old, new, layers) if old != new else width_maps.truncate(old, new)
        )

    kv_map = grow(keys[0], kv_heads, groups)
    heads = width_maps.product(kv_map, grow(keys[1], old_group, new_group))
    is_repeated = (kv_map.kind == COPIED) & (np.arange(groups) % parts > 0)
    kv_map = AxisMap(
        old["kv_head"],
        kv_map.index // parts,
        kv_map.split / parts,
        np.where(is_repeated, DUPLICATE, kv_map.kind),
        kv_map.fill,
    )
    return {"head": heads, "kv_head": kv_map}


def _layer_map(sources: list[int], old: int) -> AxisMap:
    """The first copy of a source layer is COPIED; others are DUPLICATE, with a closed gate (share 0)."""
    index = np.array(sources)
    is_first = np.array([layer not in sources[:i] for i, layer in enumerate(sources)])
    kind = np.where(index == depth_maps.NEW, NEW, np.where(is_first, COPIED, DUPLICATE)).astype(np.int8)
    return AxisMap(old, np.maximum(index, 0), (kind == COPIED).astype(float), kind)


def _vocab_map(source: ModelConfig, target: ModelConfig, fill: str) -> AxisMap:
    entries = np.arange(padded_vocab_size(target.vocab_size))
    inside = entries < min(source.vocab_size, target.vocab_size)
    kind = np.where(inside, COPIED, NEW).astype(np.int8)
    old = padded_vocab_size(source.vocab_size)
    return AxisMap(old, np.where(inside, entries, 0), inside.astype(float), kind, fill, target.vocab_size)


def _position_map(source: ModelConfig, target: ModelConfig, fill: str) -> AxisMap:
    """Position p of the target from position p of the source, repeated from the first one if `fill` is
    'tiled'. Rows before the first position keep their index."""
    (offset, rows), (target_offset, target_rows) = (
        family(source).position_rows(source),
        family(target).position_rows(target),
    )
    entries = np.arange(target_rows)
    positions = entries - target_offset
    inside = np.where(positions < 0, entries < offset, positions < rows - offset)
    is_duplicate = (positions >= 0) & (fill == "tiled") & (rows > offset)
    index = np.where(positions < 0, entries, offset + positions % max(rows - offset, 1))
    kind = np.where(inside, COPIED, np.where(is_duplicate, DUPLICATE, NEW)).astype(np.int8)
    return AxisMap(rows, np.where(kind == NEW, 0, index), (kind == COPIED).astype(float), kind, "random")
