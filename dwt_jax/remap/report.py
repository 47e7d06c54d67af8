"""What came from where, whether the function was kept, and what a step of the result costs."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.models import family, flops
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.logical_axes import Axis, path_name
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap.plan import Plan, splits_share
from dwt_jax.remap.width_maps import COPIED, NEW, AxisMap


@dataclass(frozen=True)
class LeafReport:
    """One leaf of the target. Padding of the vocabulary is not counted."""

    path: str
    source: tuple[int, ...]  # shape; empty: the source has none
    target: tuple[int, ...]
    copied: int  # entries that are an entry of the source, once
    derived: int  # further copies, and copies times a share
    new: int
    origin: str  # along each axis that changed


@dataclass(frozen=True)
class RemapReport:
    method: str
    exact: bool  # the target computes what the source does
    lost: tuple[str, ...]  # why not
    layers: tuple[int, ...]  # the source's layer for every layer of the target, -1: new
    leaves: tuple[LeafReport, ...]
    parameters: tuple[int, int]  # of the source and of the target
    flops: tuple[float, float]  # of a training step, a token, in rows of the longest length of the source
    drift: dict[str, float] | None = None  # of the logits on the probe, see `logit_drift`

    def with_drift(self, drift: dict[str, float]) -> "RemapReport":
        return dataclasses.replace(self, drift=drift)

    def shares(self) -> dict[str, float]:
        """Of the target's parameters: copied, derived, new."""
        counts = {
            kind: sum(getattr(leaf, kind) for leaf in self.leaves) for kind in ("copied", "derived", "new")
        }
        total = max(sum(counts.values()), 1)
        return {kind: count / total for kind, count in counts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `--json` prints."""
        record = dataclasses.asdict(self)
        for key in ("parameters", "flops"):
            record[key] = dict(zip(("source", "target"), record[key], strict=True))
        record["leaves"] = [
            {**leaf, "source": list(leaf["source"]), "target": list(leaf["target"])}
            for leaf in record["leaves"]
        ]
        return {**record, "lost": list(self.lost), "layers": list(self.layers), "shares": self.shares()}

    def table(self) -> str:
        """Text for a terminal."""
        rows: list[tuple[str, ...]] = [("leaf", "source", "target", "copied", "derived", "new", "from")]
        for leaf in self.leaves:
            total = max(leaf.copied + leaf.derived + leaf.new, 1)
            shares = (f"{getattr(leaf, kind) / total:.0%}" for kind in ("copied", "derived", "new"))
            rows.append(
                (leaf.path, _format_shape(leaf.source), _format_shape(leaf.target), *shares, leaf.origin)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        source, target = self.parameters
        shares = ", ".join(f"{share:.1%} {kind}" for kind, share in self.shares().items())
        layers = " ".join("new" if layer < 0 else str(layer) for layer in self.layers)
        lines = [
            f"method      {self.method}; layers from {layers}",
            f"parameters  {source:,} → {target:,}: {shares}",
            f"FLOPs       {self.flops[0]:.3g} → {self.flops[1]:.3g} a token in training",
            f"function    {'kept exactly' if self.exact else 'not kept: ' + '; '.join(self.lost)}",
        ]
        if self.drift is not None:
            lines.append(
                "drift       logits moved by {max:.3g} at most, {rms:.3g} on average (rms); they spread by "
                "{spread:.3g}".format(**self.drift)
            )
        return lines


def _format_shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "–"


def remap_report(plan: Plan, params: Any, target_params: Any) -> RemapReport:
    """All but the drift. Needs the shapes alone, so that it can be made inside jit."""
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
        exact=not plan.lost,
        lost=plan.lost,
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
    """How many of the entries are no padding."""
    return model.vocab_size if axis.name == "vocab" else size


def _count_entries(leaves: Any, model: ModelConfig) -> int:
    return sum(
        int(
            np.prod(
                [
                    _unpadded_size(axis, size, model)
                    for axis, size in zip(family(model).param_axes(model)[name], leaf.shape, strict=True)
                ]
            )
        )
        for name, leaf in leaves
    )


def _leaf_report(plan: Plan, name: str, source: tuple[int, ...], target: tuple[int, ...]) -> LeafReport:
    """Entries are counted an axis at a time, for every layer where its map is its own."""
    axes = plan.param_axes[name]
    total = copied = sourced = np.ones(1, np.int64)  # [1], or [N] from the first axis with a map a layer on
    origins = []
    for axis, size in zip(axes, target, strict=True):
        num_real = _unpadded_size(axis, size, plan.target)
        m = plan.maps.get(axis.name)
        copied_mask, sourced_mask = np.ones((1, num_real), bool), np.ones((1, num_real), bool)
        if m is not None:
            scaled = _scaled_mask(plan, axis, m)
            copied_mask = (m.kind[:num_real] == COPIED) & ~scaled[:, :num_real]
            sourced_mask = np.broadcast_to(m.kind[:num_real] != NEW, copied_mask.shape)
            sizes = (plan.source.vocab_size, num_real) if axis.name == "vocab" else (m.old, size)
            origins.append(_describe_axis(axis, m, *sizes, bool(scaled.any())))
        if axis.name == "layer":  # kept apart: the axes after it may differ from layer to layer
            copied, sourced, total = (
                copied_mask[0].astype(np.int64),
                sourced_mask[0].astype(np.int64),
                np.ones(num_real, np.int64),
            )
            continue
        copied, sourced, total = copied * copied_mask.sum(1), sourced * sourced_mask.sum(1), total * num_real
    if plan.method.random_init:
        return LeafReport(name, source, target, 0, 0, int(total.sum()), "new")
    num_copied, num_sourced = int(copied.sum()), int(sourced.sum())
    if not source:  # another leaf stands in for it, or it is as in a model that needs none
        origins.insert(0, plan.tied_to.get(name, "not in the source"))
        num_copied, num_sourced = 0, num_sourced if name in plan.tied_to else 0
    return LeafReport(
        name,
        source,
        target,
        num_copied,
        num_sourced - num_copied,
        int(total.sum()) - num_sourced,
        ", ".join(origins) or "the source",
    )


def _scaled_mask(plan: Plan, axis: Axis, m: AxisMap) -> np.ndarray:
    """bool [1, D] or [N, D]: where a parameter is multiplied with something else than 1."""
    if not splits_share(plan, axis):
        return np.zeros((1, len(m.kind)), bool)
    if isinstance(m.split, jax.core.Tracer):
        return np.ones((1, len(m.kind)), bool)
    scale = plan.query_scale if axis.contracted_with == "keys" else 1.0
    return np.atleast_2d((m.split * scale != 1) & (m.kind != NEW))


def _describe_axis(axis: Axis, m: AxisMap, old: int, new: int, scaled: bool) -> str:
    prefix = f"{axis.fan}:" if axis.fan else ""
    if new < old:
        action = "chosen" if axis.name == "layer" else "the first"
    elif (m.kind == NEW).any():
        action = "unread" if axis.fan == "in" else f"new ones {m.fill}"
    else:
        action = "copies"
    return f"{prefix}{axis.name} {old}→{new} {action}{' × share' if scaled else ''}"


def logit_drift(
    params: Any, source: ModelConfig, target_params: Any, target: ModelConfig, probe: dict[str, Any]
) -> dict[str, float]:
    """How far the MLM logits have moved on `probe` ({tokens, segments} int [B, L]), over the tokens
    that both know, where there is text: the largest and the root mean square difference, and
    the standard deviation of the source's logits to compare with."""
    size = min(source.vocab_size, target.vocab_size)
    real = np.asarray(probe["segments"]) > 0
    before = np.asarray(_mlm_logits(params, source, probe))[real][:, :size]
    after = np.asarray(_mlm_logits(target_params, target, probe))[real][:, :size]
    difference = np.abs(after - before)
    return {
        "max": float(difference.max()),
        "rms": float(np.sqrt(np.square(difference).mean())),
        "spread": float(before.std()),
    }


def _mlm_logits(params: Any, model: ModelConfig, probe: dict[str, Any]) -> jax.Array:
    def run(params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        return lm_head_logits(params, model, family(model).encode(params, model, tokens, segments))

    return jax.jit(run)(params, probe["tokens"], probe["segments"])


def probe_batch(model: ModelConfig, key: jax.Array, rows: int = 8, length: int = 64) -> dict[str, jax.Array]:
    """Random tokens, where no text is at hand: a batch for `logit_drift`."""
    length = min(length, model.max_length)
    tokens = jax.random.randint(key, (rows, length), 0, model.vocab_size)
    return {"tokens": tokens, "segments": jnp.ones((rows, length), jnp.int32)}
