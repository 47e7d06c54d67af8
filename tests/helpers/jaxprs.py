"""Looking into what jax traced. (jax.core.jaxprs_in_params is gone in jax 0.12.)"""

import math

import jax


def sub_jaxprs(equation):
    """The programs that an equation holds: bodies of scans, branches, what is differentiated."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]


def count_flops(jaxpr):
    """FLOPs of every dot_general of a program: bodies of scans as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(count_flops(sub) for sub in sub_jaxprs(eqn))
    return total
