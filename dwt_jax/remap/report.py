"""The report of a growth: where entries come from, whether the function is preserved, and the cost."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.models import family, flops
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.logical_axes import Axis, path_name
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap.axis_scale import axis_scale, copy_scale, splits_share
from dwt_jax.remap.plan import Plan
from dwt_jax.remap.width_maps import COPIED, NEW, AxisMap
from dwt_jax.text_format import format_table


@dataclass(frozen=True)
class LeafReport:
    """One leaf of the target. The padding of the vocabulary is not counted."""

    path: str
    source: tuple[int, ...]  # shape; empty: the source does not have the leaf
    target: tuple[int, ...]  # shape
    copied: int  # entries that equal their entry of the source
    derived: int  # duplicated entries, and copies times a share
    new: int  # entries without a source
    origin: str  # where the entries come from, along each axis that changed


@dataclass(frozen=True)
class RemapReport:
    """The result of a growth method."""

    method: str
    function_preserving: bool  # the target computes the same function as the source
    reasons_not_preserving: tuple[str, ...]  # empty if function_preserving
    layers: tuple[int, ...]  # layer of the source for every layer of the target; -1: new
    leaves: tuple[LeafReport, ...]
    parameters: tuple[int, int]  # of the source and of the target
    flops: tuple[float, float]  # likewise; per token of a training step on rows of the source's max_length
    logit_drift: dict[str, float] | None = None  # on the probe, see `logit_drift`

    def with_logit_drift(self, drift: dict[str, float]) -> "RemapReport":
        """Return the report with the result of `logit_drift`."""
        return dataclasses.replace(self, logit_drift=drift)

    def shares(self) -> dict[str, float]:
        """Return the shares of the target's parameters that are copied, derived and new."""
        kinds = ("copied", "derived", "new")
        counts = {kind: sum(getattr(leaf, kind) for leaf in self.leaves) for kind in kinds}
        total = max(sum(counts.values()), 1)
        return {kind: count / total for kind, count in counts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `--json` prints it."""
        record = dataclasses.asdict(self)
        for key in ("parameters", "flops"):
            record[key] = dict(zip(("source", "target"), record[key], strict=True))
        record["leaves"] = [
            {**leaf, "source": list(leaf["source"]), "target": list(leaf["target"])}
            for leaf in record["leaves"]
        ]
        return {
            **record,
            "reasons_not_preserving": list(self.reasons_not_preserving),
            "layers": list(self.layers),
            "shares": self.shares(),
        }

    def table(self) -> str:
        """Return the report as text for a terminal."""
        rows: list[tuple[str, ...]] = [("leaf", "source", "target", "copied", "derived", "new", "from")]
        for leaf in self.leaves:
            total = max(leaf.copied + leaf.derived + leaf.new, 1)
            shares = (f"{getattr(leaf, kind) / total:.0%}" for kind in ("copied", "derived", "new"))
            rows.append(
                (leaf.path, _format_shape(leaf.source), _format_shape(leaf.target), *shares, leaf.origin)
            )
        return "\n".join([*format_table(rows), "", *self._summary()])

    def _summary(self) -> list[str]:
        source, target = self.parameters
        shares = ", ".join(f"{share:.1%} {kind}" for kind, share in self.shares().items())
        layers = " ".join("new" if layer < 0 else str(layer) for layer in self.layers)
        reasons = "; ".join(self.reasons_not_preserving)
        lines = [
            f"method      {self.method}; layers from {layers}",
            f"parameters  {source:,} → {target:,}: {shares}",
            f"FLOPs       {self.flops[0]:.3g} → {self.flops[1]:.3g} per token in training",
            f"function    {'preserved exactly' if self.function_preserving else f'not preserved: {reasons}'}",
        ]
        if self.logit_drift is not None:
            lines.append(
                "drift       logits differ by at most {max:.3g} (rms {rms:.3g}); their standard deviation is "
                "{spread:.3g}".format(**self.logit_drift)
            )
        return lines


def _format_shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "–"


def remap_report(plan: Plan, params: Any, target_params: Any) -> RemapReport:
    """Return the report without the drift of the logits. Only shapes are read, so jit can trace it.

    Args:
        plan: from `plan_growth`.
        params: parameters of the source, or their shapes.
        target_params: parameters of the target, or their shapes.
    """
    source_leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(target_params):
        name = path_name(path)
        shape = source_leaves[name].shape if name in source_leaves else ()
        leaves.append(_leaf_report(plan, name, shape, leaf.shape))
    layers = plan.maps.get("layer")
    if plan.method.random_init:
        origin = [-1] * plan.target.num_hidden_layers
    elif layers is None:
        origin = list(range(plan.target.num_hidden_layers))
    else:
        origin = [-1 if kind == NEW else int(i) for i, kind in zip(layers.index, layers.kind, strict=True)]
    length = plan.source.max_length
    predictions = max(1, round(0.15 * length))
    return RemapReport(
        method=plan.method.name,
        function_preserving=plan.function_preserving,
        reasons_not_preserving=plan.reasons_not_preserving,
        layers=tuple(origin),
        leaves=tuple(leaves),
        parameters=(
            _count_entries(source_leaves.items(), plan.source),
            sum(x.copied + x.derived + x.new for x in leaves),
        ),
        flops=(
            flops.training_step_flops(plan.source, 1, length, predictions) / length,
            flops.training_step_flops(plan.target, 1, length, predictions) / length,
        ),
    )


def _unpadded_size(axis: Axis, size: int, model: ModelConfig) -> int:
    """The number of entries along an axis without padding."""
    return model.vocab_size if axis.name == "vocab" else size


def _count_entries(leaves: Any, model: ModelConfig) -> int:
    param_axes = family(model).param_axes(model)
    return sum(
        math.prod(
            _unpadded_size(axis, size, model) for axis, size in zip(param_axes[name], leaf.shape, strict=True)
        )
        for name, leaf in leaves
    )


def _leaf_report(plan: Plan, name: str, source: tuple[int, ...], target: tuple[int, ...]) -> LeafReport:
    """Count the entries axis by axis, per layer where the layers have maps of their own."""
    axes = plan.param_axes[name]
    total = copied = from_source = np.ones(
        1, np.int64
    )  # [1], or [N] from the first axis with a map per layer on
    origins = []
    for axis, size in zip(axes, target, strict=True):
        unpadded_size = _unpadded_size(axis, size, plan.target)
        m = plan.maps.get(axis.name)
        copied_mask, has_source = np.ones((1, unpadded_size), bool), np.ones((1, unpadded_size), bool)
        if m is not None:
            scaled = _scaled_mask(plan, axis, m)
            copied_mask = (m.kind[:unpadded_size] == COPIED) & ~scaled[:, :unpadded_size]
            has_source = np.broadcast_to(m.kind[:unpadded_size] != NEW, copied_mask.shape)
            sizes = (plan.source.vocab_size, unpadded_size) if axis.name == "vocab" else (m.old, size)
            origins.append(_describe_axis(axis, m, *sizes, bool(scaled.any())))
        if axis.name == "layer":  # one count per layer: the maps of the axes after it may differ
            copied, from_source, total = (
                copied_mask[0].astype(np.int64),
                has_source[0].astype(np.int64),
                np.ones(unpadded_size, np.int64),
            )
            continue
        copied, from_source, total = (
            copied * copied_mask.sum(1),
            from_source * has_source.sum(1),
            total * unpadded_size,
        )
    if plan.method.random_init:
        return LeafReport(name, source, target, 0, 0, int(total.sum()), "new")
    num_copied, num_from_source = int(copied.sum()), int(from_source.sum())
    if not source:  # a copy of another leaf, or filled with the value its absence is equivalent to
        origins.insert(0, plan.tied_to.get(name, "not in the source"))
        num_copied, num_from_source = 0, num_from_source if name in plan.tied_to else 0
    return LeafReport(
        name,
        source,
        target,
        num_copied,
        num_from_source - num_copied,
        int(total.sum()) - num_from_source,
        ", ".join(origins) or "the source",
    )


def _scaled_mask(plan: Plan, axis: Axis, m: AxisMap) -> np.ndarray:
    """bool [1, D] or [N, D]: where a parameter is scaled by a factor other than 1."""
    if any(isinstance(part, jax.core.Tracer) for part in (m.index, m.split)):
        is_scaled = splits_share(plan, axis) or not isinstance(copy_scale(plan, axis, m), float)
        return np.full((1, len(m.kind)), is_scaled)
    scale = axis_scale(plan, axis, m, 0, False)
    if scale is None:
        return np.zeros((1, len(m.kind)), bool)
    return np.atleast_2d((scale != 1) & (m.kind != NEW))


def _describe_axis(axis: Axis, m: AxisMap, old: int, new: int, scaled: bool) -> str:
    prefix = f"{axis.fan}:" if axis.fan else ""
    if new < old:
        action = "selected" if axis.name == "layer" else "truncated"
    elif (m.kind == NEW).any():
        action = "new: zero" if axis.fan == "in" else f"new: {m.fill}"
    else:
        action = "copies"
    return f"{prefix}{axis.name} {old}→{new} {action}{' × share' if scaled else ''}"


def logit_drift(
    params: Any, source: ModelConfig, target_params: Any, target: ModelConfig, probe: dict[str, Any]
) -> dict[str, float]:
    """Return the difference of two models' LM logits on a probe, over the tokens of both vocabularies.

    Args:
        params: parameters of the source.
        source: config of the source.
        target_params: parameters of the target.
        target: config of the target.
        probe: {tokens, segments} int [B, L]. Padding (segment 0) is not compared.

    Returns:
        `max` and `rms` of the difference, and `spread`, the standard deviation of the source's logits.
    """
    size = min(source.vocab_size, target.vocab_size)
    is_token = np.asarray(probe["segments"]) > 0
    before = np.asarray(_lm_logits(params, source, probe))[is_token][:, :size]
    after = np.asarray(_lm_logits(target_params, target, probe))[is_token][:, :size]
    difference = np.abs(after - before)
    return {
        "max": float(difference.max()),
        "rms": float(np.sqrt(np.square(difference).mean())),
        "spread": float(before.std()),
    }


def _lm_logits(params: Any, model: ModelConfig, probe: dict[str, Any]) -> jax.Array:
    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return lm_head_logits(params, model, family(model).encode(params, model, tokens, segments))

    return jax.jit(run)(params, probe["tokens"], probe["segments"])


def probe_batch(model: ModelConfig, key: jax.Array, rows: int = 8, length: int = 64) -> dict[str, jax.Array]:
    """Return a batch of random tokens for `logit_drift`, where no text is available."""
    length = min(length, model.max_length)
    tokens = jax.random.randint(key, (rows, length), 0, model.vocab_size)
    return {"tokens": tokens, "segments": jnp.ones((rows, length), jnp.int32)}
