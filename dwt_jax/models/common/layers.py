"""The Flax NNX modules of a BERT encoder. Seen only through functional.py.

Letters of shapes: B rows, L tokens a row, Q of them that are
wanted, D hidden_size, H heads, K size of a head,
F intermediate_size, N layers, V vocabulary (padded). Kernels are [in, out].
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.config import Model
from dwt_jax.models.common.attention import dot_product_attention
from dwt_jax.models.common.matmul import Policy, at_least_fp32, linear

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

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        x = x.astype(at_least_fp32(x))
        centered = x - self.mean(x)
        variance = self.mean(jnp.square(centered))
        return (centered * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...] + self.bias[...]).astype(
            policy.activation_dtype
        )


class Dense(nnx.Module):
    """Kernel [*inputs, *outputs] and bias [*outputs]."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], config: Model, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal_init(rngs.params(), (*inputs, *outputs), config))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.num_input_axes = len(inputs)

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        return (linear(x, self.kernel[...], policy, self.num_input_axes) + self.bias[...]).astype(
            policy.activation_dtype
        )


class Embed(nnx.Module):
    """An embedding table [size, D]."""

    def __init__(self, size: int, config: Model, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal_init(rngs.params(), (size, config.hidden_size), config))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")


def normal_init(key: jax.Array, shape: tuple[int, ...], config: Model) -> jax.Array:
    """BERT's initialisation of every matrix."""
    return config.initializer_range * jax.random.normal(key, shape, jnp.float32)


class Embeddings(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.word = Embed(padded_vocab_size(config.vocab_size), config, rngs)
        self.position = Embed(config.max_position_embeddings, config, rngs)
        if config.type_vocab_size:
            self.type = Embed(config.type_vocab_size, config, rngs)
        self.norm = LayerNorm(config)
        self.dropout_rate = config.hidden_dropout_prob
        self.offset, self.has_token_types = config.position_offset, config.type_vocab_size > 0

    def __call__(self, tokens, positions, token_type_ids, key, policy: Policy) -> jax.Array:
        """Three times int [B, L] → [B, L, D]."""
        x = self.word(tokens) + self.position(positions + self.offset)
        if self.has_token_types:
            x = x + self.type(token_type_ids)
        return dropout(self.norm(x, policy), self.dropout_rate, key)


class Attention(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        width = (config.hidden_size,)
        self.query = Dense(width, heads, config, rngs)
        self.key = Dense(width, heads, config, rngs)
        self.value = Dense(width, heads, config, rngs)
        self.output = Dense(heads, width, config, rngs)
        self.norm = LayerNorm(config)
        self.dropout_rate = config.hidden_dropout_prob
        self.attention_dropout_rate = config.attention_probs_dropout_prob

    def __call__(self, x, segment_ids, dropout_keys, policy: Policy, positions=None) -> jax.Array:
        """[B, L, D] → [B, L, D], or [B, Q, D] at the positions `at` alone, int [B, Q]."""
        query_inputs, query_segment_ids = x, segment_ids
        groups: tuple[tuple[jax.Array, tuple[Dense, ...]], ...] = ((x, (self.query, self.key, self.value)),)
        if positions is not None:
            query_inputs, query_segment_ids = (
                gather_positions(x, positions),
                jnp.take_along_axis(segment_ids, positions, axis=1),
            )
            groups = (query_inputs, (self.query,)), (x, (self.key, self.value))
        projections = tuple(_fused_projection(inputs, layers, policy) for inputs, layers in groups)
        batch_size, length, heads = x.shape[0], x.shape[1], projections[0].shape[3]
        keep = dropout_mask(
            dropout_keys[0], self.attention_dropout_rate, (batch_size, heads, query_inputs.shape[1], length)
        )
        scale = 65536 / keep_threshold(self.attention_dropout_rate)
        context = dot_product_attention(projections, (query_segment_ids, segment_ids), policy, keep, scale)
        return self.norm(
            query_inputs + dropout(self.output(context, policy), self.dropout_rate, dropout_keys[1]),
            policy,
        )


def _fused_projection(x: jax.Array, layers: tuple[Dense, ...], policy: Policy) -> jax.Array:
    """What several Dense of one shape make of x, by one product: [B, L, D] → [B, L, N, H, K]."""
    kernel = jnp.stack([layer.kernel[...] for layer in layers], axis=1)
    return linear(x, kernel, policy) + jnp.stack([layer.bias[...] for layer in layers])


class Mlp(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.input = Dense((config.hidden_size,), (config.intermediate_size,), config, rngs)
        self.output = Dense((config.intermediate_size,), (config.hidden_size,), config, rngs)
        self.norm = LayerNorm(config)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, x, key, policy: Policy) -> jax.Array:
        inner = self.activation(self.input(x, policy))
        return self.norm(x + dropout(self.output(inner, policy), self.dropout_rate, key), policy)


class EncoderLayer(nnx.Module):
    """One post-LN encoder layer: [B, L, D] → [B, L, D], or [B, Q, D] at the positions `at` alone. With
    config.gated_layers a share of it only, which is not trained (annealing.py)."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)
        self.gated = config.gated_layers
        if self.gated:
            self.gate = nnx.Param(jnp.ones(()))

    def __call__(self, x, segment_ids, dropout_keys, policy: Policy, positions=None) -> jax.Array:
        y = self.mlp(
            self.attention(x, segment_ids, dropout_keys[:2], policy, positions), dropout_keys[2], policy
        )
        if not self.gated:
            return y
        gate = jax.lax.stop_gradient(self.gate[...])
        return (gate * y + (1 - gate) * (x if positions is None else gather_positions(x, positions))).astype(
            policy.activation_dtype
        )


class MlmHead(nnx.Module):
    """Transform, norm and the bias of the decoder; the decoder itself is the word table, or one
    of its own."""

    def __init__(self, config: Model, rngs: nnx.Rngs):
        width = (config.hidden_size,)
        self.transform = Dense(width, width, config, rngs)
        self.norm = LayerNorm(config)
        self.bias = nnx.Param(jnp.zeros((padded_vocab_size(config.vocab_size),)))
        if not config.tie_word_embeddings:
            self.decoder = Embed(padded_vocab_size(config.vocab_size), config, rngs)
        self.activation = ACTIVATIONS["gelu" if config.model_type == "roberta" else config.hidden_act]

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        """[..., D] → [..., D], ready for the product with the word table."""
        return self.norm(self.activation(self.transform(x, policy)), policy)
