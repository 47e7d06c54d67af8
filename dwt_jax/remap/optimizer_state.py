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

from dwt_jax.models.common.logical_axes import Axis, map_with_roles
from dwt_jax.remap.apply import apply
from dwt_jax.remap.plan import Plan, sizes
from dwt_jax.remap.width_maps import COPIED

ORDERS = {"mu": 1, "nu": 2, "trace": 1}
"""Fields of Optax states that mirror the parameters, and whether they hold means of gradients or
of their squares."""


def remap_state(
    todo: Plan, opt_state: Any, moments: Literal["reset", "carry", "asymmetric"] = "carry"
) -> Any:
    """The optimiser's state of the target from the source's (`todo`: as for the parameters).

    reset: as before the first step. carry: by the chain rule; what is new starts at 0.
    asymmetric: further copies start at 0 too, while the first has what the rule gives it. After the
    latter two the count of steps stays, so that nothing corrects for a start at 0: warm new
    entries up with `warmed`.
    """

    def state(found: Any) -> Any:
        fields = [field for field in getattr(found, "_fields", ()) if field in ORDERS]
        if not fields:
            return found
        new = {f: apply(todo, getattr(found, f), ORDERS[f], moments == "asymmetric") for f in fields}
        if moments == "reset":
            new = jax.tree.map(lambda x: x * 0, new)
            if hasattr(found, "count"):
                new["count"] = found.count * 0
        return found._replace(**new)

    def mirrors(found: Any) -> bool:
        return any(field in ORDERS for field in getattr(found, "_fields", ()))

    return jax.tree.map(state, opt_state, is_leaf=mirrors)


def known(todo: Plan) -> dict[str, np.ndarray]:
    """For `newcomers`: of every axis that the plan changes, bool [D], whether an entry stays what it was."""
    if todo.method.fresh:
        return {axis: np.zeros(size, bool) for axis, size in sizes(todo.target).items()}
    return {axis: m.kind == COPIED for axis, m in todo.maps.items()}


def newcomers(old: dict[str, Any], params: Any) -> Any:
    """A tree like the target's `params`: bool arrays that broadcast to its leaves, True where an entry
    is a further copy or new. old: from `known`."""

    def leaf(axes: tuple[Axis, ...], x: Any) -> Any:
        mask: Any = np.zeros((1,) * len(axes), bool)
        for dim, axis in enumerate(axes):
            if axis.name in old:
                shape = [-1 if i == dim else 1 for i in range(len(axes))]
                mask = mask | ~old[axis.name].reshape(shape)
        return mask

    return map_with_roles(leaf, params)


def warmed(updates: Any, new: Any, share: Any) -> Any:
    """The optimiser's updates with those of new entries times `share`: a second warm-up, for them
    alone. new: from `newcomers`. share: scalar, e.g. min(1, steps since the growth / n)."""
    return jax.tree.map(lambda u, mask: jnp.where(mask, u * share, u).astype(u.dtype), updates, new)
