"""Scale factors of the entries of a leaf along an axis that grows."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dwt_jax.models.common.logical_axes import Axis
from dwt_jax.remap.plan import Plan
from dwt_jax.remap.width_maps import COPIED, NEW, AxisMap


def axis_scale(growth_plan: Plan, axis: Axis, m: AxisMap, order: int, zero_duplicates: bool) -> Any:
    """Return the factors of the entries along an axis: [D], [N, D], or None for no scaling.

    Args:
        growth_plan: from `plan_growth`.
        axis: the axis of the leaf.
        m: the map of the axis.
        order: 0 for parameters, 1 for gradients and first moments, 2 for second moments.
        zero_duplicates: in moments, set duplicated entries to 0, like new ones.
    """
    scale = copy_scale(growth_plan, axis, m)
    if order == 0:
        if splits_share(growth_plan, axis):
            return m.split * scale
        return None if isinstance(scale, float) else scale
    # Duplicated positions have the share 0: no gradient has reached them yet.
    share: Any = m.split
    if splits_share(growth_plan, axis) or (
        axis.name == "layer" and not (growth_plan.target.gated_layers or growth_plan.zero_new_layers)
    ):
        share = 1.0
    return (share / scale * (m.kind == COPIED if zero_duplicates else m.kind != NEW)) ** order


def splits_share(growth_plan: Plan, axis: Axis) -> bool:
    """Return whether copies along this axis are scaled by their share.

    They are scaled if a kernel contracts over the axis, or if the other operand of the next product is
    copied unscaled.
    """
    return (
        axis.fan == "in"
        or axis.contracted_with == "keys"
        or (axis.contracted_with.endswith("output_embedding") and growth_plan.tied)
    )


def copy_scale(growth_plan: Plan, axis: Axis, m: AxisMap) -> Any:
    """Return the factors of copies along an axis in addition to their shares: [D], or a number.

    Queries are scaled because attention scores are divided by √head size. In a model with RMSNorm, a copy j
    of a channel carries s_j = √(a_j·D/d) times the channel, where a_j is its share. So the mean square of the
    residual stream stays what it was, for any width D. The gains of the norms divide by s_j; that of the last
    norm does so again if the output embedding is tied, since that has the factor s_j too.
    """
    if axis.contracted_with == "keys":
        return growth_plan.query_scale
    if axis.name != "embed" or not growth_plan.scales_residual:
        return 1.0
    if axis.contracted_with == "residual":
        return residual_scale(m)
    if axis.contracted_with == "rms_norm":
        return 1 / residual_scale(m)
    if axis.contracted_with == "rms_norm+output_embedding":
        return residual_scale(m) ** (-2 if growth_plan.tied else -1)
    return 1.0


def residual_scale(m: AxisMap) -> Any:
    """Return the factor of each channel of the residual stream.

    For a map d → D it is s_j = √(a_j·D/d), or 1 if j is new or the target is smaller. With these scales
    the gradient splits among copies as the shares a_j do, through the norms too.
    """
    size = len(m.kind)
    if size <= m.old:
        return np.ones(size)
    xp = np if isinstance(m.split, np.ndarray) else jnp
    return xp.sqrt(xp.where(m.kind != NEW, m.split * size / m.old, 1.0))
