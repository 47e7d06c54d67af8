"""The Flax NNX modules of a BERT encoder. Seen only through functional.py.

Letters of shapes: B rows, L tokens a row, Q of them that are
wanted, D hidden_size, H heads, K size of a head,
F intermediate_size, N layers, V vocabulary (padded). Kernels are [in, out].
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.common.matmul import Policy, at_least_fp32, linear
from dwt_jax.models.protocol import ModelConfig

VOCAB_SIZE_MULTIPLE = 256  # of the padded vocabulary: divides over a mesh, fills the lanes of an MXU


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to the size that the arrays have."""
    return -(-vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE


def dropout_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Dropout's choice: False for a share `rate`; None without a key.

    A hash of each entry's place in the array, so that every device makes its own rows alone and any
    layout gives the same. jax.random.bits under rbg keys is not spread: compiled for 256 chips
    every chip drew the bits of all (4 GiB of temporaries); under threefry keys it is, and slower.
    """
    if key is None or rate == 0:
        return None
    key_data = jax.random.key_data(key).reshape(-1)
    row = jax.lax.iota(jnp.uint32, shape[0])
    offset = _lowbias32(_lowbias32(row + key_data[0]) ^ key_data[1])
    stride = _lowbias32(offset + jnp.uint32(0x9E3779B9)) | 1  # rows are not each other's copies, shifted
    index = jnp.zeros(shape[1:], jnp.uint32)
    for axis, size in enumerate(shape[1:]):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, shape[1:], axis)
    broadcast_shape = (-1, *(1,) * (len(shape) - 1))
    return _lowbias32(
        index * stride.reshape(broadcast_shape) + offset.reshape(broadcast_shape)
    ) >> 16 < keep_threshold(rate)


def _lowbias32(x: jax.Array) -> jax.Array:
    """uint32 → uint32, one to one: each bit of x changes each of the result with a chance of a half
    (lowbias32, C. Wellons' search for multiply-xorshift hashes, 2018; public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_threshold(rate: float) -> int:
    return round((1 - rate) * 65536)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` set to zero and the rest scaled up to keep the mean."""
    keep = dropout_mask(key, rate, x.shape)
    return x if keep is None else jnp.where(keep, x * (65536 / keep_threshold(rate)), 0).astype(x.dtype)


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, L, D] at int [B, Q] → [B, Q, D]."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in fp32. With config.weighted_norm every channel counts as
    often as its weight says, which is not trained (annealing.py)."""

    def __init__(self, size: int, epsilon: float, weighted: bool = False):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.epsilon = epsilon
        self.weighted = weighted
        if weighted:
            self.weight = nnx.Param(jnp.ones((size,)))

    def mean(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., 1]: Σ m·x / Σ m."""
        if not self.weighted:
            return x.mean(-1, keepdims=True)
        weight = jax.lax.stop_gradient(self.weight[...])
        return (x * weight).sum(-1, keepdims=True) / weight.sum()

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        x = x.astype(at_least_fp32(x))
        centered = x - self.mean(x)
        variance = self.mean(jnp.square(centered))
        return (centered * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]).astype(
            policy.activation_dtype
        )


class Dense(nnx.Module):
    """Kernel [*inputs, *outputs] and bias [*outputs]."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(normal_init(rngs.params(), (*inputs, *outputs), config))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.num_input_axes = len(inputs)

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        return (linear(x, self.kernel[...], policy, self.num_input_axes) + self.bias[...]).astype(
            policy.activation_dtype
        )


class Embed(nnx.Module):
    """An embedding table [size, D]."""

    def __init__(self, size: int, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal_init(rngs.params(), (size, config.hidden_size), config))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


def normal_init(key: jax.Array, shape: tuple[int, ...], config: ModelConfig) -> jax.Array:
    """Return N(0, initializer_range²), fp32."""
    return config.initializer_range * jax.random.normal(key, shape, jnp.float32)
