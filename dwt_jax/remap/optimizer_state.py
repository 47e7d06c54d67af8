"""The optimizer state of a remapped model.

The chain rule gives the moments of the target (see remap/apply.py): first moments are
scaled by 1/C and second moments by 1/C², where C is the number of copies of the output channel. It holds if
the method preserves the function, shares are even (or norms weighted by the same shares),
and for every entry that is not new. It is exact for means of gradients. A mean of squares over
batches in which the gradient varies is exact too, since the gradient of every batch is scaled alike.

Where copies have equal parameters and equal moments, AdamW and Muon without dropout keep them equal: their
gradients are equal too. An uneven split, noise, or `asymmetric` breaks the symmetry.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.models.common.logical_axes import Axes, ParamAxes, kernel_dims, map_with_axes, path_name
from dwt_jax.remap.apply import grow_params
from dwt_jax.remap.plan import Plan, axis_sizes
from dwt_jax.remap.width_maps import COPIED

GRADIENT_ORDER = {"mu": 1, "nu": 2, "trace": 1}
"""Fields of Optax states that mirror the parameters: 1 for means of gradients, 2 for means of squares."""


def grow_opt_state(
    plan: Plan, opt_state: Any, moments: Literal["reset", "carry", "asymmetric"] = "carry"
) -> Any:
    """Return the optimizer state of the target made from the source's.

    Args:
        plan: from `plan_growth`, the same as for the parameters.
        opt_state: an Optax state over the source's parameters.
        moments: 'reset': as before the first step. 'carry': by the chain rule; new entries start at 0.
            'asymmetric': as 'carry', but duplicated entries start at 0 too. The last two keep the step
            count, so that the bias correction does not compensate a start at 0: warm up new entries
            with `scale_new_updates`.
    """

    def grow_node(node: Any) -> Any:
        new = {
            field: _grow_moments(plan, getattr(node, field), GRADIENT_ORDER[field], moments == "asymmetric")
            for field in node._fields
            if field in GRADIENT_ORDER
        }
        if moments == "reset":
            new = jax.tree.map(lambda x: x * 0, new)
            if "count" in node._fields:
                new["count"] = node.count * 0
        return node._replace(**new)

    return replace_moment_states(opt_state, [grow_node(node) for node in moment_states(opt_state)])


def _grow_moments(plan: Plan, tree: Any, order: int, zero_duplicates: bool) -> Any:
    """The target's moments, without the leaves in other parts of an `optax.partition`.

    Such parts are kernels and everything else.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    parts = {kernel_dims(plan.param_axes[name]) is None for name in names}
    return map_with_axes(
        lambda axes, x: x if (kernel_dims(axes) is None) in parts else optax.MaskedNode(),
        plan.param_axes,
        grow_params(plan, tree, order, zero_duplicates),
    )


def _is_moment_state(node: Any) -> bool:
    return any(field in GRADIENT_ORDER for field in getattr(node, "_fields", ()))


def moment_states(opt_state: Any) -> list[Any]:
    """Return the Optax states that hold moments, e.g. one ScaleByAdamState, in the order of the tree."""
    return [*filter(_is_moment_state, jax.tree.leaves(opt_state, is_leaf=_is_moment_state))]


def replace_moment_states(opt_state: Any, new_states: list[Any]) -> Any:
    """Return `opt_state` with `new_states` in place of its `moment_states`."""
    remaining = iter(new_states)
    return jax.tree.map(
        lambda node: next(remaining) if _is_moment_state(node) else node,
        opt_state,
        is_leaf=_is_moment_state,
    )


def copied_entry_mask(plan: Plan) -> dict[str, np.ndarray]:
    """Return, for every axis that the plan changes, which entries are copies at their old index: bool [D]."""
    if plan.method.random_init:
        return {axis: np.zeros(size, bool) for axis, size in axis_sizes(plan.target).items()}
    return {axis: m.kind == COPIED for axis, m in plan.maps.items()}


def new_entry_mask(copied_masks: dict[str, Any], params: Any, param_axes: ParamAxes) -> Any:
    """Return which entries of the target's parameters are duplicated or new.

    Args:
        copied_masks: from `copied_entry_mask`.
        params: the target's parameters.
        param_axes: their logical axes.

    Returns:
        A tree like `params` of bool arrays that broadcast to its leaves.
    """

    def leaf(axes: Axes, x: Any) -> Any:
        mask: Any = np.zeros((1,) * len(axes), bool)
        for dim, axis in enumerate(axes):
            if axis.name in copied_masks:
                shape = [-1 if i == dim else 1 for i in range(len(axes))]
                mask = mask | ~copied_masks[axis.name].reshape(shape)
        return mask

    return map_with_axes(leaf, param_axes, params)


def scale_new_updates(updates: Any, new_mask: Any, share: Any) -> Any:
    """Return the optimizer's updates, those of new entries scaled: a second warm-up for them only.

    Args:
        updates: a tree like the parameters.
        new_mask: from `new_entry_mask`.
        share: scalar, e.g. min(1, steps since the growth / n).
    """
    return jax.tree.map(lambda u, mask: jnp.where(mask, u * share, u).astype(u.dtype), updates, new_mask)
