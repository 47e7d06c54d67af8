"""Blocks of a pre-norm model with RMSNorm and grouped-query attention as Flax NNX modules.

Touvron et al. 2023, arXiv 2302.13971; Ainslie et al. 2023, arXiv 2305.13245. Letters of shapes: see
models/llama.py; G query heads read one of R heads of keys and values. Kernels are [in, out].
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.common.attention_backends import AttentionMask, attend
from dwt_jax.models.common.layers import (
    ACTIVATIONS,
    Dense,
    Embed,
    RmsNorm,
    gather_positions,
    padded_vocab_size,
)
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.rope import Rotation, apply_rope

if TYPE_CHECKING:
    from dwt_jax.models.llama import Config


class DecoderInputs(NamedTuple):
    """What a layer's attention needs besides hidden states. Q = L without output positions."""

    mask: AttentionMask
    rotation: Rotation  # of the keys, fp32 [B, L, K/2]
    query_rotation: Rotation  # fp32 [B, Q, K/2]


class TokenTable(nnx.Module):
    """Token embeddings."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.word = Embed(padded_vocab_size(config.vocab_size), config, rngs)

    def __call__(self, tokens: jax.Array, policy: Policy) -> jax.Array:
        """Embed tokens int [B, L]. Returns [B, L, D]."""
        return self.word(tokens).astype(policy.activation_dtype)


class GroupedQueryAttention(nnx.Module):
    """Self-attention with rotary positions, in which G query heads share a head of keys and values."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        width, bias = (config.hidden_size,), config.has_qkv_bias
        heads = (config.num_attention_heads, config.head_size)
        kv_heads = (config.num_kv_heads, config.head_size)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.query = Dense(width, heads, config, rngs, use_bias=bias)
        self.key = Dense(width, kv_heads, config, rngs, use_bias=bias)
        self.value = Dense(width, kv_heads, config, rngs, use_bias=bias)
        self.output = Dense(heads, width, config, rngs, use_bias=False)
        if config.has_qk_norm:
            self.query_norm = RmsNorm(config.head_size, config.rms_norm_eps)
            self.key_norm = RmsNorm(config.head_size, config.rms_norm_eps)
        self.has_qk_norm = config.has_qk_norm
        self.dropout_rate = config.attention_dropout

    def __call__(
        self,
        x: jax.Array,
        inputs: DecoderInputs,
        key: jax.Array | None,
        policy: Policy,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, L, D] to the residual: [B, L, D], or [B, Q, D] at `positions` int [B, Q]."""
        x = self.norm(x, policy)
        query = self.query(x if positions is None else gather_positions(x, positions), policy)
        keys = self.key(x, policy)
        if self.has_qk_norm:
            query, keys = self.query_norm(query, policy), self.key_norm(keys, policy)
        query = apply_rope(query[:, :, None], inputs.query_rotation)
        keys = apply_rope(keys[:, :, None], inputs.rotation)
        key_value = jnp.concatenate([keys, self.value(x, policy)[:, :, None]], axis=2)
        context = attend((query, key_value), inputs.mask, policy, key, self.dropout_rate)
        return self.output(context, policy)


class SwiGlu(nnx.Module):
    """Gated MLP: W_o (act(W_g x) · W_i x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.gate = Dense(width, inner, config, rngs, use_bias=False)
        self.input = Dense(width, inner, config, rngs, use_bias=False)
        self.output = Dense(inner, width, config, rngs, use_bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        """Map [B, L, D] to the residual."""
        x = self.norm(x, policy)
        return self.output(self.activation(self.gate(x, policy)) * self.input(x, policy), policy)


class DecoderLayer(nnx.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: "Config", rngs: nnx.Rngs):
        self.attention = GroupedQueryAttention(config, rngs)
        self.mlp = SwiGlu(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        inputs: DecoderInputs,
        key: jax.Array | None,
        policy: Policy,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Map [B, L, D] to [B, L, D], or to [B, Q, D] at `positions` int [B, Q] alone."""
        added = self.attention(x, inputs, key, policy, positions)
        x = (x if positions is None else gather_positions(x, positions)) + added
        return x + self.mlp(x, policy)


class DenseClassifier(Dense):
    """Outputs of a classifier, with a dense layer and a GELU in front of them."""

    def __init__(self, num_labels: int, config: "Config", rngs: nnx.Rngs):
        width = (config.hidden_size,)
        super().__init__(width, (num_labels,), config, rngs)
        self.dense = Dense(width, width, config, rngs)

    def __call__(self, x: jax.Array, policy: Policy) -> jax.Array:
        """Map [..., D] to [..., labels]."""
        return super().__call__(ACTIVATIONS["gelu"](self.dense(x, policy)), policy)
