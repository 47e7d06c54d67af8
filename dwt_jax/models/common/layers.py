"""The Flax NNX modules of a BERT encoder. Seen only through functional.py.

Letters of shapes: B rows, L tokens a row, Q of them that are
wanted, D hidden_size, H heads, K size of a head,
F intermediate_size, N layers, V vocabulary (padded). Kernels are [in, out].
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.config import Model
from dwt_jax.models.common.attention import attend
from dwt_jax.models.common.matmul import Numerics, at_least_fp32, project

VOCABULARY_MULTIPLE = 256  # of the padded vocabulary: divides over a mesh, fills the lanes of an MXU


def padded_vocabulary(vocab_size: int) -> int:
    """`vocab_size` rounded up to the size that the arrays have."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def keep_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Dropout's choice: False for a share `rate`; None without a key.

    A hash of each entry's place in the array, so that every device makes its own rows alone and any
    layout gives the same. jax.random.bits under rbg keys is not spread: compiled for 256 chips
    every chip drew the bits of all (4 GiB of temporaries); under threefry keys it is, and slower.
    """
    if key is None or rate == 0:
        return None
    words = jax.random.key_data(key).reshape(-1)
    row = jax.lax.iota(jnp.uint32, shape[0])
    begin = _mixed(_mixed(row + words[0]) ^ words[1])
    step = _mixed(begin + jnp.uint32(0x9E3779B9)) | 1  # rows are not each other's copies, shifted
    place = jnp.zeros(shape[1:], jnp.uint32)
    for axis, size in enumerate(shape[1:]):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, shape[1:], axis)
    ones = (-1, *(1,) * (len(shape) - 1))
    return _mixed(place * step.reshape(ones) + begin.reshape(ones)) >> 16 < kept_of_65536(rate)


def _mixed(x: jax.Array) -> jax.Array:
    """uint32 → uint32, one to one: each bit of x changes each of the result with a chance of a half
    (lowbias32, C. Wellons' search for multiply-xorshift hashes, 2018; public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def kept_of_65536(rate: float) -> int:
    return round((1 - rate) * 65536)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` set to zero and the rest scaled up to keep the mean."""
    keep = keep_mask(key, rate, x.shape)
    return x if keep is None else jnp.where(keep, x * (65536 / kept_of_65536(rate)), 0).astype(x.dtype)


def gather(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, L, D] at int [B, Q] → [B, Q, D]."""
    return jnp.take_along_axis(hidden, positions[:, :, None], axis=1)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Norm(nnx.Module):
    """LayerNorm over the last axis, in fp32. With config.weighted_norm every channel counts as
    often as its weight says, which is not trained (annealing.py)."""

    def __init__(self, config: Model):
        self.scale = nnx.Param(jnp.ones((config.hidden_size,)))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,)))
        self.epsilon = config.layer_norm_eps
        self.weighted = config.weighted_norm
        if self.weighted:
            self.weight = nnx.Param(jnp.ones((config.hidden_size,)))

    def mean(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., 1]: Σ m·x / Σ m."""
        if not self.weighted:
            return x.mean(-1, keepdims=True)
        weight = jax.lax.stop_gradient(self.weight[...])
        return (x * weight).sum(-1, keepdims=True) / weight.sum()

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        x = x.astype(at_least_fp32(x))
        centred = x - self.mean(x)
        variance = self.mean(jnp.square(centred))
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]).astype(
            numerics.stream
        )


class Dense(nnx.Module):
    """Kernel [*inputs, *outputs] and bias [*outputs]."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], config: Model, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs.params(), (*inputs, *outputs), config))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.contract = len(inputs)

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        return (project(x, self.kernel[...], numerics, self.contract) + self.bias[...]).astype(
            numerics.stream
        )


class Table(nnx.Module):
    """An embedding table [size, D]."""

    def __init__(self, size: int, config: Model, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs.params(), (size, config.hidden_size), config))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


def normal(key: jax.Array, shape: tuple[int, ...], config: Model) -> jax.Array:
    """BERT's initialisation of every matrix."""
    return config.initializer_range * jax.random.normal(key, shape, jnp.float32)


class Embeddings(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.word = Table(padded_vocabulary(config.vocab_size), config, rngs)
        self.position = Table(config.max_position_embeddings, config, rngs)
        if config.type_vocab_size:
            self.type = Table(config.type_vocab_size, config, rngs)
        self.norm = Norm(config)
        self.rate = config.hidden_dropout_prob
        self.offset, self.typed = config.position_offset, config.type_vocab_size > 0

    def __call__(self, tokens, positions, types, key, numerics: Numerics) -> jax.Array:
        """Three times int [B, L] → [B, L, D]."""
        x = self.word(tokens) + self.position(positions + self.offset)
        if self.typed:
            x = x + self.type(types)
        return dropout(self.norm(x, numerics), self.rate, key)


class Attention(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        width = (config.hidden_size,)
        self.query = Dense(width, heads, config, rngs)
        self.key = Dense(width, heads, config, rngs)
        self.value = Dense(width, heads, config, rngs)
        self.output = Dense(heads, width, config, rngs)
        self.norm = Norm(config)
        self.rate = config.hidden_dropout_prob
        self.rate_probs = config.attention_probs_dropout_prob

    def __call__(self, x, segments, keys, numerics: Numerics, at=None) -> jax.Array:
        """[B, L, D] → [B, L, D], or [B, Q, D] at the positions `at` alone, int [B, Q]."""
        own, own_segments = x, segments
        each: tuple[tuple[jax.Array, tuple[Dense, ...]], ...] = ((x, (self.query, self.key, self.value)),)
        if at is not None:
            own, own_segments = gather(x, at), jnp.take_along_axis(segments, at, axis=1)
            each = (own, (self.query,)), (x, (self.key, self.value))
        parts = tuple(_together(inputs, dense, numerics) for inputs, dense in each)
        rows, length, heads = x.shape[0], x.shape[1], parts[0].shape[3]
        keep = keep_mask(keys[0], self.rate_probs, (rows, heads, own.shape[1], length))
        scale = 65536 / kept_of_65536(self.rate_probs)
        mixed = attend(parts, (own_segments, segments), numerics, keep, scale)
        return self.norm(own + dropout(self.output(mixed, numerics), self.rate, keys[1]), numerics)


def _together(x: jax.Array, dense: tuple[Dense, ...], numerics: Numerics) -> jax.Array:
    """What several Dense of one shape make of x, by one product: [B, L, D] → [B, L, N, H, K]."""
    kernel = jnp.stack([each.kernel[...] for each in dense], axis=1)
    return project(x, kernel, numerics) + jnp.stack([each.bias[...] for each in dense])


class Mlp(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.input = Dense((config.hidden_size,), (config.intermediate_size,), config, rngs)
        self.output = Dense((config.intermediate_size,), (config.hidden_size,), config, rngs)
        self.norm = Norm(config)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.rate = config.hidden_dropout_prob

    def __call__(self, x, key, numerics: Numerics) -> jax.Array:
        inner = self.activation(self.input(x, numerics))
        return self.norm(x + dropout(self.output(inner, numerics), self.rate, key), numerics)


class Layer(nnx.Module):
    """One post-LN encoder layer: [B, L, D] → [B, L, D], or [B, Q, D] at the positions `at` alone. With
    config.gated_layers a share of it only, which is not trained (annealing.py)."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)
        self.gated = config.gated_layers
        if self.gated:
            self.gate = nnx.Param(jnp.ones(()))

    def __call__(self, x, segments, keys, numerics: Numerics, at=None) -> jax.Array:
        y = self.mlp(self.attention(x, segments, keys[:2], numerics, at), keys[2], numerics)
        if not self.gated:
            return y
        gate = jax.lax.stop_gradient(self.gate[...])
        return (gate * y + (1 - gate) * (x if at is None else gather(x, at))).astype(numerics.stream)


class MlmHead(nnx.Module):
    """Transform, norm and the bias of the decoder; the decoder itself is the word table, or one
    of its own."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        width = (config.hidden_size,)
        self.transform = Dense(width, width, config, rngs)
        self.norm = Norm(config)
        self.bias = nnx.Param(jnp.zeros((padded_vocabulary(config.vocab_size),)))
        if not config.tie_word_embeddings:
            self.decoder = Table(padded_vocabulary(config.vocab_size), config, rngs)
        self.activation = ACTIVATIONS["gelu" if config.model_type == "roberta" else config.hidden_act]

    def __call__(self, x: jax.Array, numerics: Numerics) -> jax.Array:
        """[..., D] → [..., D], ready for the product with the word table."""
        return self.norm(self.activation(self.transform(x, numerics)), numerics)
