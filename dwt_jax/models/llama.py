"""Llama, Mistral, Qwen2, Qwen3 and EuroBERT: pre-norm, with RMSNorm, rotary positions and gated MLPs.

Touvron et al. 2023, arXiv 2302.13971; Jiang et al. 2023, arXiv 2310.06825; Yang et al. 2024, arXiv 2407.10671
and 2025, arXiv 2505.09388; Boizard et al. 2025, arXiv 2503.05500. They differ in biases (Qwen2 has them on
queries, keys and values), a norm of queries and keys (Qwen3), a window (Mistral), and in causality: EuroBERT
is an encoder, with another classifier. `params` is a nested dict of arrays. Those below `layers` carry a
leading layer axis and are run by a scan (unrolled on one CPU device).

Letters of shapes: B rows, L tokens a row, Q output positions, D hidden_size, H heads, R heads of keys and
values, K size of a head, F intermediate_size, N layers, V padded vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dwt_jax.models.common.attention_backends import AttentionMask
from dwt_jax.models.common.decoder import DecoderInputs, DecoderLayer, DenseClassifier, TokenTable
from dwt_jax.models.common.layers import (
    Dense,
    Embed,
    RmsNorm,
    gather_positions,
    mean_over_tokens,
    padded_vocab_size,
    positions_in_segments,
)
from dwt_jax.models.common.logical_axes import ParamAxes, dense_axes, flatten_axes
from dwt_jax.models.common.matmul import Policy, constrain_batch, replicate
from dwt_jax.models.common.modules import ModuleParts, scan_layers
from dwt_jax.models.common.rope import rope_frequencies, rope_rotation
from dwt_jax.models.llama_config import HF_NAMES as HF_NAMES
from dwt_jax.models.llama_config import Config as Config
from dwt_jax.models.protocol import Params

ENCODER_PARTS = ("embeddings", "layers", "final_norm")
HEADS = ("decoder", "classifier")
LM_HEADS = ("decoder",)
CLASSIFIER_HEADS = ("classifier",)

_NORM = {"scale": "out:embed>rms_norm"}
_HEAD_NORM = {"scale": "out:head_dim"}
_RESIDUAL = "out:embed>residual"
_KEY_VALUE = dense_axes("in:embed", "out:kv_head out:head_dim")

_AXIS_TEXTS: dict[str, Any] = {
    "embeddings": {"word": {"embedding": f"vocab {_RESIDUAL}"}},
    "layers": {
        "attention": {
            "norm": _NORM,
            "query": dense_axes("in:embed", "out:head out:head_dim"),
            "key": _KEY_VALUE,
            "value": _KEY_VALUE,
            "query_norm": _HEAD_NORM,
            "key_norm": _HEAD_NORM,
            "output": {"kernel": f"in:head in:head_dim {_RESIDUAL}"},
        },
        "mlp": {
            "norm": _NORM,
            "gate": {"kernel": "in:embed out:mlp"},
            "input": {"kernel": "in:embed out:mlp"},
            "output": {"kernel": f"in:mlp {_RESIDUAL}"},
        },
    },
    "final_norm": {"scale": "out:embed>rms_norm+output_embedding"},
    "decoder": {"embedding": "out:vocab in:embed"},
    "classifier": {**dense_axes("in:embed", "out:label"), "dense": dense_axes("in:embed", "out:embed")},
}
_OPTIONAL_PATHS = {  # how the paths of leaves begin that a model has if its config says so
    "has_qk_norm": ("layers/attention/query_norm/", "layers/attention/key_norm/"),
    "has_qkv_bias": tuple(f"layers/attention/{name}/bias" for name in ("query", "key", "value")),
    "has_dense_classifier": ("classifier/bias", "classifier/dense/"),
}

_PARAM_AXES = flatten_axes(_AXIS_TEXTS)
TIED_TO = {"decoder/embedding": "embeddings/word/embedding"}


def param_axes(config: Config) -> ParamAxes:
    """Return the logical axes of every leaf, by its path."""
    absent = [paths for key, paths in _OPTIONAL_PATHS.items() if not getattr(config, key)]
    return {path: axes for path, axes in _PARAM_AXES.items() if not any(map(path.startswith, absent))}


# Growth: what remapping has to know.

FUNCTION_FIELDS = (
    "is_causal",
    "has_qk_norm",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "rope_theta",
    "rope_type",
    "rope_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_length",
    "pooling",
)
SIZE_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "head": "num_attention_heads",
    "kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}


def axis_sizes(config: Config) -> dict[str, int]:
    """Return the size of the arrays along each logical axis."""
    return {
        "layer": config.num_hidden_layers,
        "embed": config.hidden_size,
        "head": config.num_attention_heads,
        "kv_head": config.num_kv_heads,
        "head_dim": config.head_size,
        "mlp": config.intermediate_size,
        "vocab": padded_vocab_size(config.vocab_size),
    }


def fixed_axes(config: Config) -> dict[str, str]:
    """Return the axes whose size cannot grow, each with the reason."""
    return {"head_dim": "rotary positions depend on it"}


def position_rows(config: Config) -> tuple[int, int]:
    """Return (rows before the first position, rows in all) of the position table: there is none."""
    return 0, 0


def layer_period(config: Config) -> int:
    """Return the period of the layer types, in layers: 1, all layers are alike."""
    return 1


# The model.


def _build_module(name: str, config: Config, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
    if name == "final_norm":
        return RmsNorm(config.hidden_size, config.rms_norm_eps)
    if name == "classifier" and config.has_dense_classifier:
        return DenseClassifier(num_labels, config, rngs)
    if name == "classifier":
        return Dense((config.hidden_size,), (num_labels,), config, rngs, use_bias=False)
    return {"embeddings": TokenTable, "layer": DecoderLayer, "decoder": OutputTable}[name](config, rngs)


class OutputTable(nnx.Module):
    """Output embedding, where it is not the word embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        if not config.tie_word_embeddings:
            table = Embed(padded_vocab_size(config.vocab_size), config, rngs)
            self.embedding = nnx.Param(table.embedding[...])


_MODULES = ModuleParts(_build_module, ENCODER_PARTS, HEADS, LM_HEADS)
init_params = _MODULES.init_params
abstract_params = _MODULES.abstract_params


def encode(
    params: Params,
    config: Config,
    tokens: jax.Array,
    segment_ids: jax.Array,
    token_type_ids: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
    policy: Policy = Policy(),
) -> jax.Array:
    """Encode packed rows. A token attends to its segment; in a decoder, to itself and earlier tokens of it.

    With `positions` the last layer computes keys and values of all tokens, and everything else at these
    positions alone.

    Args:
        params: parameters with the parts ENCODER_PARTS.
        config: sizes of the model.
        tokens: int [B, L].
        segment_ids: int [B, L]. 0 is padding. Positions restart in each segment.
        token_type_ids: ignored, there are no token types.
        positions: int [B, Q], the output positions; None: all.
        key: PRNG key of dropout; None: no dropout.
        policy: dtypes and layout.

    Returns:
        Last hidden states after the final norm: [B, L, D], or [B, Q, D] at `positions`.
    """
    segment_ids = segment_ids.astype(jnp.int32)
    # Replicate the table first: of sharded channels XLA would send the looked-up rows and their gradient.
    tables = jax.tree.map(lambda leaf: replicate(leaf, policy), params["embeddings"])
    x = _MODULES.merge("embeddings", config, tables)(tokens.astype(jnp.int32), policy)
    x = constrain_batch(x, policy)
    all_inputs = _decoder_inputs(config, segment_ids)
    layer_keys = None if key is None else jax.random.split(key, config.num_hidden_layers)

    def layer(x: jax.Array, inputs: Any, positions: jax.Array | None = None) -> tuple[jax.Array, None]:
        layer_params, layer_key = inputs
        module = _MODULES.merge("layer", config, layer_params)
        decoder_inputs = all_inputs if positions is None else _at_positions(all_inputs, positions)
        return constrain_batch(module(x, decoder_inputs, layer_key, policy, positions), policy), None

    inputs = params["layers"], layer_keys
    x = scan_layers(layer, x, inputs, config.num_hidden_layers, positions, policy)
    return _MODULES.merge("final_norm", config, params["final_norm"])(x, policy)


def _decoder_inputs(config: Config, segment_ids: jax.Array) -> DecoderInputs:
    """The attention inputs of every layer, for the queries of all positions."""
    length = segment_ids.shape[1]
    mask = AttentionMask(segment_ids, is_causal=config.is_causal, window=config.sliding_window)
    rotation = rope_rotation(positions_in_segments(segment_ids), length, rotary_frequencies(config))
    return DecoderInputs(mask, rotation, rotation)


def _at_positions(inputs: DecoderInputs, positions: jax.Array) -> DecoderInputs:
    """The same with the queries of the output positions alone."""
    return DecoderInputs(
        inputs.mask._replace(query_positions=positions),
        inputs.rotation,
        (gather_positions(inputs.rotation[0], positions), gather_positions(inputs.rotation[1], positions)),
    )


def rotary_frequencies(config: Config) -> np.ndarray:
    """Return the angle by which a position turns each pair of channels, float64 [K/2].

    With `rope_type` llama3, wavelengths above original length / low_freq_factor are longer by `rope_factor`,
    those below original length / high_freq_factor are kept, and between them the frequency is interpolated
    (Grattafiori et al. 2024, arXiv 2407.21783, as transformers has it).
    """
    frequencies = rope_frequencies(config.head_size, config.rope_theta)
    if config.rope_type == "default":
        return frequencies
    scaled = frequencies / config.rope_factor
    if config.rope_type == "linear":
        return scaled
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * frequencies / (2 * math.pi)  # over the original length
    share = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(share * frequencies + (1 - share) * scaled)


def lm_features(params: Params, config: Config, hidden: jax.Array, *, policy: Policy = Policy()) -> jax.Array:
    """Return what the LM head multiplies with the output embedding: the hidden states [..., D] themselves."""
    return hidden


def output_embedding(params: Params) -> tuple[jax.Array, None]:
    """Return the output embedding [V, D]. The LM head has no bias."""
    return params["decoder"].get("embedding", params["embeddings"]["word"]["embedding"]), None


def pools_first_token(config: Config) -> bool:
    """Return whether a classifier reads the first token only."""
    return config.pooling == "bos"


def classifier_logits(
    params: Params,
    config: Config,
    hidden: jax.Array,
    segment_ids: jax.Array,
    *,
    key: jax.Array | None = None,
    policy: Policy = Policy(),
) -> jax.Array:
    """Return fp32 logits [B, labels] of hidden states [B, L, D] and segment ids int [B, L].

    A decoder reads the last token with a nonzero segment id. An encoder reads the first token (`bos`),
    the mean of all (`mean`), or each, for the mean of their logits (`late`).
    """
    classifier = _MODULES.merge("classifier", config, params["classifier"])
    if config.pooling == "late":
        return mean_over_tokens(classifier(hidden, policy).astype(jnp.float32), segment_ids)
    if config.pooling == "mean":
        pooled = mean_over_tokens(hidden, segment_ids)
    elif config.pooling == "bos":
        pooled = hidden[:, 0]
    else:
        last = jnp.where(segment_ids > 0, jnp.arange(segment_ids.shape[1]), 0).max(-1)
        pooled = gather_positions(hidden, last[:, None])[:, 0]
    return classifier(pooled, policy).astype(jnp.float32)


def pretrained_classifier_parts(config: Config, parts: Sequence[str]) -> tuple[str, ...]:
    """Return which of a model's `parts` a new classifier keeps: all but the heads."""
    return ENCODER_PARTS


def forward_flops(config: Config, rows: int, length: int, predictions: int) -> float:
    """Return the FLOPs of a forward pass with the LM head at `predictions` positions a row.

    Per token and layer: queries and output 4DHK, keys and values 4DRK, gated MLP 6DF, scores and context
    4LHK (what causality masks is computed too). The last layer has keys and values alone per token, and the
    rest per prediction (see `encode`). Per prediction: output embedding 2DV.
    """
    per_prediction = 2 * config.hidden_size * padded_vocab_size(config.vocab_size)
    return encoder_flops(config, rows, length, predictions) + float(rows * predictions * per_prediction)


def encoder_flops(config: Config, rows: int, length: int, output_positions: int) -> float:
    """Return the FLOPs up to the last hidden states at `output_positions` a row."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_size
    key_value = 4 * width * config.num_kv_heads * config.head_size
    rest = 4 * width * heads + 6 * width * config.intermediate_size + 4 * length * heads
    per_token = (config.num_hidden_layers - 1) * (key_value + rest) + key_value
    return float(rows * (length * per_token + output_positions * rest))
