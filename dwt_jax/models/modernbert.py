"""ModernBERT: pre-norm encoders with rotary positions, local attention and gated MLPs, without biases.

Warner et al. 2024, arXiv 2412.13663; also Ettin's encoders and mmBERT. `params` is a nested dict of
arrays. Those below `layers` carry a leading layer axis and are run by a scan (unrolled on one CPU device).
Layer i attends to the whole row if i is a multiple of `global_attn_every_n_layers`, else within a window.
The first layer has no norm in front of its attention, which follows the norm of the embeddings: its entry
in that leaf is 1 and not used.

Letters of shapes: B rows, L tokens a row, Q output positions, D hidden_size, H heads, K size of a head,
F intermediate_size, N layers, V padded vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.common.attention_backends import AttentionMask
from dwt_jax.models.common.dropout import dropout
from dwt_jax.models.common.layers import (
    Dense,
    Embed,
    LayerNorm,
    gather_positions,
    mean_over_tokens,
    padded_vocab_size,
    positions_in_segments,
)
from dwt_jax.models.common.logical_axes import ParamAxes, dense_axes, flatten_axes
from dwt_jax.models.common.matmul import Policy, constrain_batch, replicate
from dwt_jax.models.common.modules import ModuleParts, scan_layers
from dwt_jax.models.common.pre_norm import AttentionInputs, PredictionHead, PreNormLayer, TokenEmbedding
from dwt_jax.models.common.rope import Rotation, rope_frequencies, rope_rotation
from dwt_jax.models.modernbert_config import HF_NAMES as HF_NAMES
from dwt_jax.models.modernbert_config import Config as Config
from dwt_jax.models.protocol import Params

ENCODER_PARTS = ("embeddings", "layers", "final_norm")
HEADS = ("head", "decoder", "classifier")
LM_HEADS = ("head", "decoder")
CLASSIFIER_HEADS = ("head", "classifier")

_NORM = {"scale": "out:embed"}
_RESIDUAL = "out:embed>residual"

_AXIS_TEXTS: dict[str, Any] = {
    "embeddings": {"word": {"embedding": "vocab out:embed"}, "norm": _NORM},
    "layers": {
        "attention": {
            "norm": _NORM,
            "qkv": {"kernel": "in:embed qkv out:head out:head_dim"},
            "output": {"kernel": f"in:head in:head_dim {_RESIDUAL}"},
        },
        "mlp": {
            "norm": _NORM,
            "input": {"kernel": "in:embed glu out:mlp"},
            "output": {"kernel": f"in:mlp {_RESIDUAL}"},
        },
    },
    "final_norm": _NORM,
    "head": {
        "dense": {"kernel": "in:embed out:embed"},
        "norm": {"scale": "out:embed>output_embedding"},
    },
    "decoder": {"bias": "vocab", "embedding": "out:vocab in:embed"},
    "classifier": dense_axes("in:embed", "out:label"),
}

PARAM_AXES = flatten_axes(_AXIS_TEXTS)
TIED_TO = {"decoder/embedding": "embeddings/word/embedding"}


def param_axes(config: Config) -> ParamAxes:
    """Return the logical axes of every leaf, by its path."""
    return PARAM_AXES


# Growth: what remapping has to know.

FUNCTION_FIELDS = (
    "hidden_act",
    "classifier_activation",
    "norm_eps",
    "global_attn_every_n_layers",
    "local_attention",
    "global_rope_theta",
    "local_rope_theta",
    "classifier_pooling",
)
SIZE_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "head": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}


def axis_sizes(config: Config) -> dict[str, int]:
    """Return the size of the arrays along each logical axis."""
    return {
        "layer": config.num_hidden_layers,
        "embed": config.hidden_size,
        "head": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "mlp": config.intermediate_size,
        "vocab": padded_vocab_size(config.vocab_size),
        "qkv": 3,
        "glu": 2,
    }


def fixed_axes(config: Config) -> dict[str, str]:
    """Return the axes whose size cannot grow, each with the reason."""
    return {"head_dim": "rotary positions depend on it"}


def position_rows(config: Config) -> tuple[int, int]:
    """Return (rows before the first position, rows in all) of the position table: there is none."""
    return 0, 0


def layer_period(config: Config) -> int:
    """Return the period of the layer types, in layers."""
    return config.global_attn_every_n_layers


# The model.


def _build_module(name: str, config: Config, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
    if name == "final_norm":
        return LayerNorm(config.hidden_size, config.norm_eps, use_bias=False)
    if name == "classifier":
        return Dense((config.hidden_size,), (num_labels,), config, rngs)
    modules = {
        "embeddings": TokenEmbedding,
        "layer": PreNormLayer,
        "head": PredictionHead,
        "decoder": Decoder,
    }
    return modules[name](config, rngs)


class Decoder(nnx.Module):
    """Output bias, and an output embedding where it is not the word embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.bias = nnx.Param(jnp.zeros((padded_vocab_size(config.vocab_size),)))
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
    """Encode packed rows.

    With `positions` the last layer computes keys and values of all tokens, and everything else at these
    positions alone.

    Args:
        params: parameters with the parts ENCODER_PARTS.
        config: sizes of the model.
        tokens: int [B, L].
        segment_ids: int [B, L]. 0 is padding. Tokens attend within their segment, and positions restart
            in each.
        token_type_ids: ignored, a ModernBERT has no token types.
        positions: int [B, Q], the output positions; None: all.
        key: PRNG key of dropout; None: no dropout.
        policy: dtypes and layout.

    Returns:
        Last hidden states after the final norm: [B, L, D], or [B, Q, D] at `positions`.
    """
    segment_ids = segment_ids.astype(jnp.int32)
    dropout_keys = (None, None) if key is None else tuple(jax.random.split(key))
    # Replicate the table first: of sharded channels XLA would send the looked-up rows and their gradient.
    tables = jax.tree.map(lambda leaf: replicate(leaf, policy), params["embeddings"])
    x = _MODULES.merge("embeddings", config, tables)(tokens.astype(jnp.int32), dropout_keys[0], policy)
    x = constrain_batch(x, policy)
    attention_inputs = _attention_inputs(config, segment_ids)
    index = jnp.arange(config.num_hidden_layers)
    is_global = index % config.global_attn_every_n_layers == 0
    layer_keys = None if key is None else jax.random.split(dropout_keys[1], config.num_hidden_layers)

    def layer(x: jax.Array, inputs: Any, positions: jax.Array | None = None) -> tuple[jax.Array, None]:
        layer_params, layer_key, is_global, is_first = inputs
        keys = (None,) * 3 if key is None else tuple(jax.random.split(layer_key, 3))
        inputs = attention_inputs(is_global, ~is_first, positions)
        module = _MODULES.merge("layer", config, layer_params)
        return constrain_batch(module(x, inputs, keys, policy, positions), policy), None

    inputs = params["layers"], layer_keys, is_global, index == 0
    x = scan_layers(layer, x, inputs, config.num_hidden_layers, positions, policy)
    return _MODULES.merge("final_norm", config, params["final_norm"])(x, policy)


def _attention_inputs(
    config: Config, segment_ids: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array | None], AttentionInputs]:
    """The attention inputs of a layer, by its type and the output positions."""
    head_dim = config.hidden_size // config.num_attention_heads
    in_segment = positions_in_segments(segment_ids)
    rotations = [
        rope_rotation(in_segment, segment_ids.shape[1], rope_frequencies(head_dim, theta))
        for theta in (config.global_rope_theta, config.local_rope_theta)
    ]

    def attention_inputs(
        is_global: jax.Array, has_input_norm: jax.Array, positions: jax.Array | None
    ) -> AttentionInputs:
        rotation: Rotation = jax.tree.map(lambda a, b: jnp.where(is_global, a, b), *rotations)
        query_rotation = rotation
        if positions is not None:
            query_rotation = jax.tree.map(lambda x: gather_positions(x, positions), rotation)
        window = config.local_attention // 2 + 1  # on either side, the query included
        mask = AttentionMask(segment_ids, positions, window=window, has_window=~is_global)
        return AttentionInputs(mask, rotation, query_rotation, has_input_norm)

    return attention_inputs


def lm_features(params: Params, config: Config, hidden: jax.Array, *, policy: Policy = Policy()) -> jax.Array:
    """Return the features that the LM head multiplies with the output embedding, for states [..., D]."""
    return _MODULES.merge("head", config, params["head"])(hidden, policy)


def output_embedding(params: Params) -> tuple[jax.Array, jax.Array]:
    """Return the output embedding [V, D] and bias [V] of the LM head."""
    decoder = params["decoder"]
    return decoder.get("embedding", params["embeddings"]["word"]["embedding"]), decoder["bias"]


def pools_first_token(config: Config) -> bool:
    """Return whether a classifier reads the first token only, not the mean of all."""
    return config.classifier_pooling == "cls"


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

    With a `key`, dropout before the classifier.
    """
    pooled = hidden[:, 0] if pools_first_token(config) else mean_over_tokens(hidden, segment_ids)
    features = _MODULES.merge("head", config, params["head"])(pooled, policy)
    features = dropout(features, config.classifier_dropout, key)
    return _MODULES.merge("classifier", config, params["classifier"])(features, policy).astype(jnp.float32)


def pretrained_classifier_parts(config: Config, parts: Sequence[str]) -> tuple[str, ...]:
    """Return which of a model's `parts` a new classifier keeps: also the LM head's, like transformers."""
    return (*ENCODER_PARTS, *(["head"] if "head" in parts else []))


def forward_flops(config: Config, rows: int, length: int, predictions: int) -> float:
    """Return the FLOPs of a forward pass with the LM head at `predictions` positions a row.

    Per token and layer: query, key, value and output 8D², gated MLP 6DF, scores and context 4LD: local
    layers compute all scores and mask them. The last layer has key and value alone, 4D², per token, and
    the rest per prediction (see `encode`). Per prediction: dense 2D², output embedding 2DV.
    """
    per_prediction = 2 * config.hidden_size**2 + 2 * config.hidden_size * padded_vocab_size(config.vocab_size)
    return encoder_flops(config, rows, length, predictions) + float(rows * predictions * per_prediction)


def encoder_flops(config: Config, rows: int, length: int, output_positions: int) -> float:
    """Return the FLOPs up to the last hidden states at `output_positions` a row."""
    width, inner = config.hidden_size, config.intermediate_size
    key_value, rest = 4 * width**2, 4 * width**2 + 6 * width * inner + 4 * length * width
    per_token = (config.num_hidden_layers - 1) * (key_value + rest) + key_value
    return float(rows * (length * per_token + output_positions * rest))
