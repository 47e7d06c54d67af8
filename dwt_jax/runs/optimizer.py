"""The Optax chain of pre-training and fine-tuning, without the learning rate: the step applies that."""

import functools

import optax

from dwt_jax.config import Optimizer
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import decay_mask
from dwt_jax.models.protocol import ModelConfig


def make_optimizer(optimizer: Optimizer, model: ModelConfig) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) with clipping by the global norm, but for the learning rate.

    Weight decay is decoupled, on matrices and embedding tables only. The updates still have to be
    multiplied by −learning rate.

    Args:
        optimizer: b1, b2, eps, weight_decay, clip_norm; its learning rate is not read.
        model: the config of the model, whose logical axes tell matrices from biases and norms.
    """
    chain = [
        optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps),
        optax.add_decayed_weights(
            optimizer.weight_decay, mask=functools.partial(decay_mask, family(model).param_axes(model))
        ),
    ]
    if optimizer.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    return optax.chain(*chain)
