"""Blocks of a post-norm encoder as Flax NNX modules (Vaswani et al. 2017, Devlin et al. 2019).

Letters of shapes: see models/bert.py. Kernels are [in, out].
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.common.attention_backends import AttentionMask, attend
from dwt_jax.models.common.dropout import dropout
from dwt_jax.models.common.layers import (
    ACTIVATIONS,
    Dense,
    Embed,
    LayerNorm,
    gather_positions,
    padded_vocab_size,
)
from dwt_jax.models.common.matmul import Policy, linear
from dwt_jax.models.common.rope import Rotation, apply_rope

if TYPE_CHECKING:
    from dwt_jax.models.bert import Config


class Embeddings(nnx.Module):
    """Sum of word, position and token type embeddings, with layer norm and dropout."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.word = Embed(padded_vocab_size(config.vocab_size), config, rngs)
        if not config.is_rotary:
            self.position = Embed(config.max_position_embeddings, config, rngs)
        if config.type_vocab_size:
            self.type = Embed(config.type_vocab_size, config, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, config.weighted_norm)
        self.dropout_rate = config.hidden_dropout_prob
        self.offset, self.has_token_types = config.position_offset, config.type_vocab_size > 0
        self.has_positions = not config.is_rotary

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        token_type_ids: jax.Array,
        key: jax.Array | None,
        policy: Policy,
    ) -> jax.Array:
        """Embed tokens at positions, all int [B, L]. Returns [B, L, D]."""
        x = self.word(tokens)
        if self.has_positions:
            x = x + self.position(positions + self.offset)
        if self.has_token_types:
            x = x + self.type(token_type_ids)
        return dropout(self.norm(x, policy), self.dropout_rate, key)


class Attention(nnx.Module):
    """Multi-head self-attention with residual connection and layer norm."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        width = (config.hidden_size,)
        self.query = Dense(width, heads, config, rngs)
        self.key = Dense(width, heads, config, rngs)
        self.value = Dense(width, heads, config, rngs)
        self.output = Dense(heads, width, config, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, config.weighted_norm)
        self.dropout_rate = config.hidden_dropout_prob
        self.attention_dropout_rate = config.attention_probs_dropout_prob

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        dropout_keys: tuple[jax.Array | None, ...],
        policy: Policy,
        positions: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Map [B, L, D] to [B, L, D], or to [B, Q, D] at `positions` int [B, Q] alone.

        With a `rotation`, queries and keys are turned by it, channels 2i and 2i + 1 together.
        """
        query_inputs = x
        groups: tuple[tuple[jax.Array, tuple[Dense, ...]], ...] = ((x, (self.query, self.key, self.value)),)
        if positions is not None:
            query_inputs = gather_positions(x, positions)
            groups = (query_inputs, (self.query,)), (x, (self.key, self.value))
        projections = tuple(_fused_projection(inputs, layers, policy) for inputs, layers in groups)
        if rotation is not None:
            projections = _rotate(projections, rotation, positions)
        mask = AttentionMask(segment_ids, positions)
        context = attend(projections, mask, policy, dropout_keys[0], self.attention_dropout_rate)
        return self.norm(
            query_inputs + dropout(self.output(context, policy), self.dropout_rate, dropout_keys[1]),
            policy,
        )


def _fused_projection(x: jax.Array, layers: tuple[Dense, ...], policy: Policy) -> jax.Array:
    """Apply several dense layers of one shape by one product: [B, L, D] → [B, L, N, H, K]."""
    kernel = jnp.stack([layer.kernel[...] for layer in layers], axis=1)
    return linear(x, kernel, policy) + jnp.stack(
        [layer.bias[...] for layer in layers if layer.bias is not None]
    )


def _rotate(
    projections: tuple[jax.Array, ...], rotation: Rotation, positions: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Turn the queries and keys among projections as `dot_product_attention` takes them."""
    if positions is None:
        (qkv,) = projections
        return apply_rope(qkv[:, :, :2], rotation, interleaved=True), qkv[:, :, 2:]
    query, key_value = projections
    cos, sin = (gather_positions(part, positions) for part in rotation)
    query = apply_rope(query, (cos, sin), interleaved=True)
    return query, apply_rope(key_value[:, :, :1], rotation, interleaved=True), key_value[:, :, 1:]


class Mlp(nnx.Module):
    """Two-layer MLP with residual connection and layer norm."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.input = Dense((config.hidden_size,), (config.intermediate_size,), config, rngs)
        self.output = Dense((config.intermediate_size,), (config.hidden_size,), config, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, config.weighted_norm)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, x: jax.Array, key: jax.Array | None, policy: Policy) -> jax.Array:
        inner = self.activation(self.input(x, policy))
        return self.norm(x + dropout(self.output(inner, policy), self.dropout_rate, key), policy)


class EncoderLayer(nnx.Module):
    """Post-norm encoder layer.

    With config.gated_layers it is g·layer(x) + (1−g)·x, where the gate g is not trained (remap/gates.py).
    """

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)
        self.gated = config.gated_layers
        if self.gated:
            self.gate = nnx.Param(jnp.ones(()))

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        dropout_keys: tuple[jax.Array | None, ...],
        policy: Policy,
        positions: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        y = self.attention(x, segment_ids, dropout_keys[:2], policy, positions, rotation)
        y = self.mlp(y, dropout_keys[2], policy)
        if not self.gated:
            return y
        gate = jax.lax.stop_gradient(self.gate[...])
        return (gate * y + (1 - gate) * (x if positions is None else gather_positions(x, positions))).astype(
            policy.activation_dtype
        )


class MlmHead(nnx.Module):
    """Masked-LM head: transform, norm and output bias.

    The output embedding is the word embedding, or one of its own.
    """

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        width = (config.hidden_size,)
        self.transform = Dense(width, width, config, rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, config.weighted_norm)
        self.bias = nnx.Param(jnp.zeros((padded_vocab_size(config.vocab_size),)))
        if not config.tie_word_embeddings:
            self.decoder = Embed(padded_vocab_size(config.vocab_size), config, rngs)
        self.activation = ACTIVATIONS[config.head_act]

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        """Return the features [..., D] that the output embedding multiplies."""
        return self.norm(self.activation(self.transform(x, policy)), policy)
