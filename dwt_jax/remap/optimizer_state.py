"""The optimiser's state of a remapped model.

The chain rule says what the moments of the target would be (engine.py): first moments are
scaled by 1/C and second moments by 1/C², C the copies of the output channel. It holds where
the method preserves the function, splits are even (or norms weighted by the same shares),
and for everything that is not new. Exact for means of gradients; a mean of squares over
batches in which the gradient varies is exact too, since every batch's is scaled alike.

Where copies have equal parameters and equal moments, AdamW without dropout keeps them equal: their
gradients are equal too. An uneven split, noise, or `asymmetric` parts them.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.models.common.logical_axes import Axis, ParamAxes, map_with_axes
from dwt_jax.remap.apply import grow_params
from dwt_jax.remap.plan import Plan, axis_sizes
from dwt_jax.remap.width_maps import COPIED

GRADIENT_ORDER = {"mu": 1, "nu": 2, "trace": 1}
"""Fields of Optax states that mirror the parameters, and whether they hold means of gradients or
of their squares."""


def grow_opt_state(
    plan: Plan, opt_state: Any, moments: Literal["reset", "carry", "asymmetric"] = "carry"
) -> Any:
    """The optimiser's state of the target from the source's (`todo`: as for the parameters).

    reset: as before the first step. carry: by the chain rule; what is new starts at 0.
    asymmetric: further copies start at 0 too, while the first has what the rule gives it. After the
    latter two the count of steps stays, so that nothing corrects for a start at 0: warm new
    entries up with `scale_new_updates`.
    """

    def grow_node(node: Any) -> Any:
        fields = [field for field in getattr(node, "_fields", ()) if field in GRADIENT_ORDER]
        if not fields:
            return node
        new = {
            f: grow_params(plan, getattr(node, f), GRADIENT_ORDER[f], moments == "asymmetric") for f in fields
        }
        if moments == "reset":
            new = jax.tree.map(lambda x: x * 0, new)
            if hasattr(node, "count"):
                new["count"] = node.count * 0
        return node._replace(**new)

    def is_moment_state(node: Any) -> bool:
        return any(field in GRADIENT_ORDER for field in getattr(node, "_fields", ()))

    return jax.tree.map(grow_node, opt_state, is_leaf=is_moment_state)


def copied_entry_mask(plan: Plan) -> dict[str, np.ndarray]:
    """For `new_entry_mask`: of every axis that the plan changes, bool [D], whether an entry stays what it was."""
    if plan.method.random_init:
        return {axis: np.zeros(size, bool) for axis, size in axis_sizes(plan.target).items()}
    return {axis: m.kind == COPIED for axis, m in plan.maps.items()}


def new_entry_mask(copied_masks: dict[str, Any], params: Any, param_axes: ParamAxes) -> Any:
    """A tree like the target's `params`: bool arrays that broadcast to its leaves, True where an entry
    is a further copy or new. old: from `copied_entry_mask`."""

    def leaf(axes: tuple[Axis, ...], x: Any) -> Any:
        mask: Any = np.zeros((1,) * len(axes), bool)
        for dim, axis in enumerate(axes):
            if axis.name in copied_masks:
                shape = [-1 if i == dim else 1 for i in range(len(axes))]
                mask = mask | ~copied_masks[axis.name].reshape(shape)
        return mask

    return map_with_axes(leaf, param_axes, params)


def scale_new_updates(updates: Any, new_mask: Any, share: Any) -> Any:
    """The optimiser's updates with those of new entries times `share`: a second warm-up, for them
    alone. new: from `new_entry_mask`. share: scalar, e.g. min(1, steps since the growth / n)."""
    return jax.tree.map(lambda u, mask: jnp.where(mask, u * share, u).astype(u.dtype), updates, new_mask)
