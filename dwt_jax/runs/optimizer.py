"""The Optax chain, but for the learning rate: that is a function of the step (see step.py)."""

import functools

import optax

from dwt_jax.config import Optimizer
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import decay_mask
from dwt_jax.models.protocol import ModelConfig


def make_optimizer(optimizer: Optimizer, model: ModelConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam's direction, decoupled decay on matrices (AdamW,
    Loshchilov & Hutter 2019). The update still has to be multiplied by −learning rate."""
    chain = [
        optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
        optax.add_decayed_weights(
            optimizer.weight_decay, mask=functools.partial(decay_mask, family(model).param_axes(model))
        ),
    ]
    if optimizer.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    return optax.chain(*chain)
