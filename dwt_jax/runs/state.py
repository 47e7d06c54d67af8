"""The training state: parameters, optimiser state, step."""

from typing import Any

import jax
import jax.numpy as jnp

from dwt_jax.config import Optimizer
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.runs import optimizer as optimizers


def init_train_state(params: Params, model: ModelConfig, optimizer: Optimizer) -> dict[str, Any]:
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "opt_state": optimizers.make_optimizer(optimizer, model).init(params),
        "step": zero,
        "skipped": {"total": zero, "in_row": zero, "longest": zero},
        "behind": {"gap": jnp.float32(0), "weight": jnp.float32(0), "beaten_at": jnp.full((), -1, jnp.int32)},
    }


def abstract_state(model: ModelConfig, optimizer: Optimizer) -> dict[str, Any]:
    """Shapes and types of the state, no memory."""
    return jax.eval_shape(
        lambda: init_train_state(family(model).init_params(model, jax.random.key(0)), model, optimizer)
    )
