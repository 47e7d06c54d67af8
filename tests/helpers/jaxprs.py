"""Looking into what jax traced. (jax.core.jaxprs_in_params is gone in jax 0.12.)"""

import jax


def sub_jaxprs(equation):
    """The programs that an equation holds: bodies of scans, branches, what is differentiated."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]
