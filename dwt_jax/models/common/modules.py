"""NNX modules as pure functions of a dict of arrays, and the scan over layers, for every family."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig, Params

BuildFn = Callable[[str, Any, int, nnx.Rngs], nnx.Module]
"""(name of the module, config, outputs of the classifier, rngs) → a module of a family."""


@functools.cache
def _graphdef(build: BuildFn, name: str, config: ModelConfig) -> Any:
    """The structure of a module without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(name, config, 1, nnx.Rngs(0))))


def merge_module(build: BuildFn, name: str, config: ModelConfig, params: Params) -> Any:
    """Return a module of a family with the arrays `params`."""
    return nnx.merge(_graphdef(build, name, config), params)


def init_module(build: BuildFn, name: str, config: ModelConfig, num_labels: int, key: jax.Array) -> Params:
    """Return fresh arrays of a module of a family."""
    return nnx.to_pure_dict(nnx.state(build(name, config, num_labels, nnx.Rngs(params=key))))


def scan_layers(
    layer: Callable[..., tuple[jax.Array, None]],
    x: jax.Array,
    inputs: Any,
    num_layers: int,
    positions: jax.Array | None,
    policy: Policy,
) -> jax.Array:
    """Run all layers, the last one at the output positions alone.

    Args:
        layer: (hidden states, inputs of one layer, output positions or None) → (hidden states, None).
        x: hidden states [B, L, D].
        inputs: a tree with a leading layer axis.
        num_layers: its size.
        positions: int [B, Q]; None: all.
        policy: on one CPU device the scan is unrolled.

    Returns:
        [B, L, D], or [B, Q, D] at `positions`.
    """
    # XLA's loop on CPU copies what it keeps of every layer: unrolled it is a tenth faster.
    unroll = min(num_layers, 12) if policy.single_cpu_layout else 1
    if positions is None:
        return jax.lax.scan(layer, x, inputs, unroll=unroll)[0]
    x = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], inputs), unroll=unroll)[0]
    return layer(x, jax.tree.map(lambda leaf: leaf[-1], inputs), positions)[0]
