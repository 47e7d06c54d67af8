"""Blocks of a pre-norm encoder without biases as Flax NNX modules (Warner et al. 2024, arXiv 2412.13663).

Letters of shapes: see models/modernbert.py. Kernels are [in, out].
"""

from typing import TYPE_CHECKING, NamedTuple

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
    from dwt_jax.models.modernbert import Config


class AttentionInputs(NamedTuple):
    """What a layer's attention needs besides hidden states. Q = L without output positions."""

    mask: AttentionMask
    rotation: Rotation  # of the keys, fp32 [B, L, K/2]
    query_rotation: Rotation  # fp32 [B, Q, K/2]
    has_input_norm: jax.Array  # bool scalar: False in the first layer, which follows a norm


class TokenEmbedding(nnx.Module):
    """Token embeddings with layer norm and dropout."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.word = Embed(padded_vocab_size(config.vocab_size), config, rngs)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, use_bias=False)
        self.dropout_rate = config.embedding_dropout

    def __call__(self, tokens: jax.Array, key: jax.Array | None, policy: Policy) -> jax.Array:
        """Embed tokens int [B, L]. Returns [B, L, D]."""
        return dropout(self.norm(self.word(tokens), policy), self.dropout_rate, key)


class RotaryAttention(nnx.Module):
    """Multi-head self-attention with rotary positions; queries, keys and values by one kernel."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        heads = (config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        width = (config.hidden_size,)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, use_bias=False)
        self.qkv = Dense(width, (3, *heads), config, rngs, use_bias=False)
        self.output = Dense(heads, width, config, rngs, use_bias=False)
        self.dropout_rate = config.attention_dropout

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        dropout_keys: tuple[jax.Array | None, ...],
        policy: Policy,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, L, D] to the residual: [B, L, D], or [B, Q, D] at `positions` int [B, Q]."""
        x = jnp.where(inputs.has_input_norm, self.norm(x, policy), x)
        projections: tuple[jax.Array, ...]
        if positions is None:
            projected = self._project(x, slice(0, 3), policy)
            projections = (apply_rope(projected[:, :, :2], inputs.rotation), projected[:, :, 2:])
        else:
            query = self._project(gather_positions(x, positions), slice(0, 1), policy)
            key_value = self._project(x, slice(1, 3), policy)
            projections = (
                apply_rope(query, inputs.query_rotation),
                apply_rope(key_value[:, :, :1], inputs.rotation),
                key_value[:, :, 1:],
            )
        context = attend(projections, inputs.mask, policy, dropout_keys[0], self.dropout_rate)
        return dropout(self.output(context, policy), self.dropout_rate, dropout_keys[1])

    def _project(self, x: jax.Array, parts: slice, policy: Policy) -> jax.Array:
        """Some of queries, keys and values: [B, L, D] → fp32 [B, L, N, H, K]."""
        return linear(x, self.qkv.kernel[...][:, parts], policy)


class GatedMlp(nnx.Module):
    """Gated MLP: W_o (act(W_a x) · W_g x). `input` holds both kernels (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, use_bias=False)
        self.input = Dense(width, (2, *inner), config, rngs, use_bias=False)
        self.output = Dense(inner, width, config, rngs, use_bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.mlp_dropout

    def __call__(self, x: jax.Array, key: jax.Array | None, policy: Policy) -> jax.Array:
        """Map [B, L, D] to the residual."""
        inner = self.input(self.norm(x, policy), policy)
        gated = self.activation(inner[..., 0, :]) * inner[..., 1, :]
        return self.output(dropout(gated, self.dropout_rate, key), policy)


class PreNormLayer(nnx.Module):
    """Pre-norm encoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.attention = RotaryAttention(config, rngs)
        self.mlp = GatedMlp(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        dropout_keys: tuple[jax.Array | None, ...],
        policy: Policy,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, L, D] to [B, L, D], or to [B, Q, D] at `positions` int [B, Q] alone."""
        added = self.attention(x, inputs, dropout_keys[:2], policy, positions)
        x = (x if positions is None else gather_positions(x, positions)) + added
        return x + self.mlp(x, dropout_keys[2], policy)


class PredictionHead(nnx.Module):
    """Dense layer, activation and norm, in front of a decoder or a classifier."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        width = (config.hidden_size,)
        self.dense = Dense(width, width, config, rngs, use_bias=False)
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, use_bias=False)
        self.activation = ACTIVATIONS[config.classifier_activation]

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        """Map [..., D] to [..., D]."""
        return self.norm(self.activation(self.dense(x, policy)), policy)
