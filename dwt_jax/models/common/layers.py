"""Flax NNX layers that families share: dense, embedding, layer norm. Kernels are [in, out].

They replace nnx.LinearGeneral, nnx.Embed and nnx.LayerNorm. Those draw a key for the bias too, fill
out-of-range rows with NaN, and multiply in another order, so that parameters and losses would not be
the same bits. Letters of shapes: see models/bert.py.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.common.matmul import Policy, at_least_fp32, linear
from dwt_jax.models.protocol import ModelConfig

VOCAB_SIZE_MULTIPLE = 256  # of the padded vocabulary: divides over a mesh, fills the lanes of an MXU


def padded_vocab_size(vocab_size: int) -> int:
    """Return `vocab_size` rounded up to the size of the arrays."""
    return -(-vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE


def positions_in_segments(segment_ids: jax.Array) -> jax.Array:
    """Return how far each token is from the start of its segment, for segment ids int [B, L]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """Gather hidden states [B, L, D] at positions int [B, Q]. Returns [B, Q, D]."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1)


def mean_over_tokens(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Return the mean of [B, L, D] over the tokens, [B, D]; segment ids, int [B, L], are 0 in padding."""
    x = x.astype(at_least_fp32(x))  # bf16 does not count beyond 256
    weights = (segment_ids > 0).astype(x.dtype)
    count = jnp.maximum(weights.sum(-1, keepdims=True), 1)  # rows that fill up a batch have no token
    return jnp.einsum("bld,bl->bd", x, weights) / count


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_fast(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def _laplace(x: jax.Array) -> jax.Array:
    """Φ((x − μ) / σ) with the constants of MEGA (https://arxiv.org/abs/2209.10655)."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by transformers' names, those of protocol.Activation."""


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in fp32.

    If weighted, each channel counts in mean and variance by its weight, which is not trained
    (remap/gates.py).
    """

    def __init__(self, size: int, epsilon: float, weighted: bool = False, use_bias: bool = True):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,))) if use_bias else None
        self.epsilon = epsilon
        self.weighted = weighted
        if weighted:
            self.weight = nnx.Param(jnp.ones((size,)))

    def mean(self, x: jax.Array) -> jax.Array:
        """Return Σ w·x / Σ w over the last axis: [..., D] → [..., 1]."""
        if not self.weighted:
            return x.mean(-1, keepdims=True)
        weight = jax.lax.stop_gradient(self.weight[...])
        return (x * weight).sum(-1, keepdims=True) / weight.sum()

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        x = x.astype(at_least_fp32(x))
        centered = x - self.mean(x)
        variance = self.mean(jnp.square(centered))
        y = centered * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(policy.activation_dtype)


class RmsNorm(nnx.Module):
    """Division by the root mean square over the last axis, in fp32, and a gain (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        x = x.astype(at_least_fp32(x))
        mean_square = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(
            policy.activation_dtype
        )


class Dense(nnx.Module):
    """Dense layer with kernel [*inputs, *outputs] and bias [*outputs]."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        config: ModelConfig,
        rngs: nnx.Rngs,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(normal_init(rngs.params(), (*inputs, *outputs), config))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.num_input_axes = len(inputs)

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        y = linear(x, self.kernel[...], policy, self.num_input_axes)
        return (y if self.bias is None else y + self.bias[...]).astype(policy.activation_dtype)


class Embed(nnx.Module):
    """Embedding table [size, D]."""

    def __init__(self, size: int, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal_init(rngs.params(), (size, config.hidden_size), config))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


def normal_init(key: jax.Array, shape: tuple[int, ...], config: ModelConfig) -> jax.Array:
    """Return N(0, initializer_range²), fp32. A range of 0 is that of the default: zeros would not train."""
    scale = config.initializer_range or ModelConfig.initializer_range
    return scale * jax.random.normal(key, shape, jnp.float32)
