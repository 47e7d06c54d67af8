"""The Optax chain of pre-training and fine-tuning. The training step applies the learning rate."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Optimizer
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import Axes, ParamAxes, decay_mask, kernel_dims, map_with_axes
from dwt_jax.models.protocol import ModelConfig

MUON_UPDATE_RMS = 0.2
"""Root mean square of Muon's updates, that of AdamW's in practice: one learning rate serves both (Liu et
al. 2025, arXiv 2502.16982, section 2.2)."""


def make_optimizer(optimizer: Optimizer, model: ModelConfig) -> optax.GradientTransformation:
    """Return the optimizer with clipping by the global norm, without the learning rate.

    Weight decay is decoupled, on matrices and embedding tables only. The updates still have to be
    multiplied by −learning rate.

    Args:
        optimizer: its learning rate is not read.
        model: the config of the model; its logical axes distinguish kernels, tables, biases and norms.
    """
    param_axes = family(model).param_axes(model)
    adam = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
    decay = optax.add_decayed_weights(optimizer.weight_decay, mask=functools.partial(decay_mask, param_axes))
    if optimizer.kind == "adamw":
        chain = [adam, decay]
    elif optimizer.kind == "stable_adamw":
        chain = [_clip_adam_by_rms(adam, decay, optimizer, param_axes)]
    else:
        parts = {
            "muon": optax.chain(_scale_by_muon(optimizer, param_axes), decay),
            "adam": optax.chain(adam, decay, optax.scale(optimizer.adam_lr_ratio)),
        }
        part_of_leaf = functools.partial(
            map_with_axes, lambda axes, _: "adam" if kernel_dims(axes) is None else "muon", param_axes
        )
        chain = [optax.partition(parts, part_of_leaf)]
    if optimizer.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    return optax.chain(*chain)


def _scale_by_muon(optimizer: Optimizer, param_axes: ParamAxes) -> optax.GradientTransformation:
    """Muon for kernels, with updates of equal root mean square for all shapes."""

    def dimension_numbers(axes: Axes, _: Any) -> optax.contrib.MuonDimensionNumbers:
        dims = kernel_dims(axes)
        assert dims is not None
        return optax.contrib.MuonDimensionNumbers(*dims)

    def scale_to_rms(axes: Axes, update: jax.Array) -> jax.Array:
        sizes = _matrix_shape(axes, update)
        return update * (MUON_UPDATE_RMS * math.sqrt(max(sizes)))

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=optimizer.ns_steps,
            beta=optimizer.momentum,
            weight_dimension_numbers=functools.partial(map_with_axes, dimension_numbers, param_axes),
        ),
        optax.stateless(lambda updates, _: map_with_axes(scale_to_rms, param_axes, updates)),
    )


def _matrix_shape(axes: Axes, leaf: Any) -> tuple[int, int]:
    """(inputs, outputs) of the matrices in a leaf that is a kernel."""
    dims = kernel_dims(axes)
    assert dims is not None
    inputs, outputs = (math.prod(leaf.shape[dim] for dim in side) for side in dims)
    return inputs, outputs


def _clip_adam_by_rms(
    adam: optax.GradientTransformation,
    decay: optax.GradientTransformation,
    optimizer: Optimizer,
    param_axes: ParamAxes,
) -> optax.GradientTransformation:
    """StableAdamW: the step of each tensor is divided by max(1, RMS(g / max(√v, ε))).

    Tensors of several layers that are stacked in one leaf have one RMS each. Source: Wortsman et al. 2023,
    arXiv 2304.13013, algorithm 2.
    """
    chain = optax.chain(adam, decay)

    def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = chain.update(gradient, state, params)
        second_moment = optax.tree.bias_correction(state[0].nu, optimizer.b2, state[0].count)

        def clip(axes: Axes, update: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            dims = tuple(dim for dim, axis in enumerate(axes) if axis.name != "layer")
            # √ before max: ε² may be 0 in float32.
            squares = jnp.square(g / jnp.maximum(jnp.sqrt(v), optimizer.eps))
            return update / jnp.maximum(1, jnp.sqrt(squares.mean(dims, keepdims=True)))

        return map_with_axes(clip, param_axes, updates, gradient, second_moment), state

    return optax.GradientTransformation(chain.init, update)


def optimizer_flops(optimizer: Optimizer, model: ModelConfig) -> float:
    """Return the FLOPs of the Newton-Schulz iterations in one update.

    For X [m, n], m ≤ n, an iteration is A = X·Xᵀ, B = b·A + c·A·A and a·X + B·X: 4m²n + 2m³.
    """
    if optimizer.kind != "muon":
        return 0.0

    def leaf_flops(axes: Axes, leaf: Any) -> float:
        if kernel_dims(axes) is None:
            return 0.0
        m, n = sorted(_matrix_shape(axes, leaf))
        count = leaf.size // (m * n)
        return float(count * optimizer.ns_steps * (4 * m**2 * n + 2 * m**3))

    param_axes, params = family(model).param_axes(model), family(model).abstract_params(model)
    return sum(jax.tree.leaves(map_with_axes(leaf_flops, param_axes, params)))
