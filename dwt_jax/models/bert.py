"""BERT, RoBERTa, DistilBERT and RoFormer: post-norm encoders.

One architecture under four names (Devlin et al. 2019, Liu et al. 2019, Sanh et al. 2019, Su et al. 2021),
which differ in token types, positions (RoFormer's are rotary), the pooler and Hugging Face's names.
`params` is a nested dict of arrays. Those below `layers` carry a leading layer axis and are run by a scan
(unrolled on one CPU device), so that compile time is flat in depth and depth remapping is indexing.

Letters of shapes: B rows, L tokens a row, Q output positions, D hidden_size, H heads, K size of a head,
F intermediate_size, N layers, V padded vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.models.bert_config import HF_NAMES as HF_NAMES
from dwt_jax.models.bert_config import Config as Config
from dwt_jax.models.common.dropout import dropout
from dwt_jax.models.common.layers import ACTIVATIONS, Dense, padded_vocab_size, positions_in_segments
from dwt_jax.models.common.logical_axes import ParamAxes, dense_axes, flatten_axes
from dwt_jax.models.common.matmul import Policy, constrain_batch, replicate
from dwt_jax.models.common.modules import ModuleParts, scan_layers
from dwt_jax.models.common.post_norm import Embeddings, EncoderLayer, MlmHead
from dwt_jax.models.common.rope import rope_frequencies, rope_rotation
from dwt_jax.models.protocol import Params

ENCODER_PARTS = ("embeddings", "layers")
HEADS = ("mlm", "pooler", "next_sentence", "classifier")
LM_HEADS = ("mlm",)
CLASSIFIER_HEADS = ("pooler", "classifier")


_NORM = {"scale": "out:embed", "bias": "out:embed", "weight": "in:embed"}  # it sums over weight·x
# The norm before a decoder that may be tied to the input embedding.
_LAST_NORM = {**_NORM, **dict.fromkeys(("scale", "bias"), "out:embed>output_embedding")}


_PROJECTION = dense_axes("in:embed", "out:head out:head_dim")
_QUERY_PROJECTION = dense_axes("in:embed", "out:head out:head_dim>keys")

_AXIS_TEXTS: dict[str, Any] = {
    "embeddings": {
        "word": {"embedding": "vocab out:embed"},
        "position": {"embedding": "position out:embed"},
        "type": {"embedding": "type out:embed"},
        "norm": _NORM,
    },
    "layers": {
        "attention": {
            "query": _QUERY_PROJECTION,
            "key": _PROJECTION,
            "value": _PROJECTION,
            "output": dense_axes("in:head in:head_dim", "out:embed"),
            "norm": _NORM,
        },
        "mlp": {
            "input": dense_axes("in:embed", "out:mlp"),
            "output": dense_axes("in:mlp", "out:embed"),
            "norm": _NORM,
        },
        "gate": "in:layer",  # the sum over copies of a layer is the layer
    },
    "mlm": {
        "transform": dense_axes("in:embed", "out:embed"),
        "norm": _LAST_NORM,
        "bias": "vocab",
        "decoder": {"embedding": "out:vocab in:embed"},  # where it is not the word table
    },
    "pooler": dense_axes("in:embed", "out:embed"),
    "next_sentence": dense_axes("in:embed", "out:label"),
    "classifier": dense_axes("in:embed", "out:label"),
}

PARAM_AXES = flatten_axes(_AXIS_TEXTS)
TIED_TO = {"mlm/decoder/embedding": "embeddings/word/embedding"}
"""The leaf that is used where another is absent."""


def param_axes(config: Config) -> ParamAxes:
    """Return the logical axes of every leaf, by its path."""
    return PARAM_AXES


# Growth: what remapping has to know.

FUNCTION_FIELDS = ("hidden_act", "layer_norm_eps", "model_type")
SIZE_KEYS = {
    "layer": "num_hidden_layers",
    "embed": "hidden_size",
    "head": "num_attention_heads",
    "head_dim": "hidden_size / num_attention_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
    "position": "max_position_embeddings",
    "type": "type_vocab_size",
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
        "position": position_rows(config)[1],
        "type": config.type_vocab_size,
    }


def fixed_axes(config: Config) -> dict[str, str]:
    """Return the axes whose size cannot grow, each with the reason."""
    return {"head_dim": "rotary positions depend on it"} if config.is_rotary else {}


def position_rows(config: Config) -> tuple[int, int]:
    """Return (rows before the first position, rows in all) of the position table."""
    return (0, 0) if config.is_rotary else (config.position_offset, config.max_position_embeddings)


def layer_period(config: Config) -> int:
    """Return the period of the layer types, in layers: 1, all layers are alike."""
    return 1


# The model.


def _build_module(name: str, config: Config, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
    if name in ("embeddings", "layer", "mlm"):
        return {"embeddings": Embeddings, "layer": EncoderLayer, "mlm": MlmHead}[name](config, rngs)
    outputs = {"pooler": config.hidden_size, "next_sentence": 2, "classifier": num_labels}[name]
    return Dense((config.hidden_size,), (outputs,), config, rngs)


_MODULES = ModuleParts(_build_module, ENCODER_PARTS, HEADS, LM_HEADS, folds_head_keys=True)
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
    positions alone: the same numbers, for a third of that layer's FLOPs at 15 % of the tokens.

    Args:
        params: parameters with the parts `embeddings` and `layers`.
        config: sizes of the model.
        tokens: int [B, L].
        segment_ids: int [B, L]. 0 is padding. Tokens attend within their segment, and positions restart
            in each.
        token_type_ids: int [B, L]; zeros if None.
        positions: int [B, Q], the output positions; None: all.
        key: PRNG key of dropout; None: no dropout.
        policy: dtypes and layout.

    Returns:
        Last hidden states [B, L, D], or [B, Q, D] at `positions`.
    """
    segment_ids = segment_ids.astype(jnp.int32)
    token_type_ids = jnp.zeros_like(segment_ids) if token_type_ids is None else token_type_ids
    dropout_keys = (None, None) if key is None else tuple(jax.random.split(key))
    # Replicate the tables first: of sharded channels XLA would send the looked-up rows and their gradient.
    tables = jax.tree.map(lambda leaf: replicate(leaf, policy), params["embeddings"])
    embeddings = _MODULES.merge("embeddings", config, tables)
    x = embeddings(
        tokens.astype(jnp.int32),
        positions_in_segments(segment_ids),
        token_type_ids,
        dropout_keys[0],
        policy,
    )
    x = constrain_batch(x, policy)

    def layer(
        x: jax.Array, inputs: tuple[Params, Any], positions: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        layer_params, layer_key = inputs
        layer_keys = (None,) * 3 if key is None else tuple(jax.random.split(layer_key, 3))
        return constrain_batch(
            _MODULES.merge("layer", config, layer_params)(
                x, segment_ids, layer_keys, policy, positions, rotation
            ),
            policy,
        ), None

    rotation = None
    if config.is_rotary:
        head_dim = config.hidden_size // config.num_attention_heads
        rotation = rope_rotation(
            positions_in_segments(segment_ids), segment_ids.shape[1], rope_frequencies(head_dim, 10000.0)
        )
    layer_keys = None if key is None else jax.random.split(dropout_keys[1], config.num_hidden_layers)
    inputs = params["layers"], layer_keys
    return scan_layers(layer, x, inputs, config.num_hidden_layers, positions, policy)


def lm_features(params: Params, config: Config, hidden: jax.Array, *, policy: Policy = Policy()) -> jax.Array:
    """Return the features that the LM head multiplies with the output embedding, for states [..., D]."""
    return _MODULES.merge("mlm", config, params["mlm"])(hidden, policy)


def output_embedding(params: Params) -> tuple[jax.Array, jax.Array]:
    """Return the output embedding [V, D] and bias [V] of the LM head."""
    decoder = params["mlm"].get("decoder")
    embedding = (params["embeddings"]["word"] if decoder is None else decoder)["embedding"]
    return embedding, params["mlm"]["bias"]


def pooler_output(
    params: Params, config: Config, hidden: jax.Array, *, policy: Policy = Policy()
) -> jax.Array:
    """Pool the first token of [B, L, D] to [B, D].

    The activation is a ReLU in DistilBERT, that of the layers in RoFormer, else tanh.
    """
    features = _MODULES.merge("pooler", config, params["pooler"])(hidden[:, 0], policy)
    if config.is_rotary:
        return ACTIVATIONS[config.hidden_act](features)
    return jax.nn.relu(features) if config.model_type == "distilbert" else jnp.tanh(features)


def pools_first_token(config: Config) -> bool:
    """Return whether a classifier reads the first token only: it does."""
    return True


def classifier_logits(
    params: Params,
    config: Config,
    hidden: jax.Array,
    segment_ids: jax.Array,
    *,
    key: jax.Array | None = None,
    policy: Policy = Policy(),
) -> jax.Array:
    """Return fp32 logits [B, labels] of hidden states [B, L, D]; segment_ids are not read.

    With a `key`, dropout as in transformers: on the pooler's output, and in RoBERTa and RoFormer on its
    input too.
    """
    input_key, output_key = (None, None) if key is None else jax.random.split(key)
    rate = config.hidden_dropout_prob
    if config.model_type in ("roberta", "roformer"):
        hidden = dropout(hidden[:, :1], rate, input_key)
    features = dropout(pooler_output(params, config, hidden, policy=policy), rate, output_key)
    return _MODULES.merge("classifier", config, params["classifier"])(features, policy).astype(jnp.float32)


def pretrained_classifier_parts(config: Config, parts: Sequence[str]) -> tuple[str, ...]:
    """Return which of a model's `parts` a new classifier keeps, as transformers does.

    BERT's pooler and DistilBERT's pre_classifier are kept. RoBERTa's is kept only where it is a
    classifier's: the pooler of its encoder is not what a classifier has.
    """
    is_classifiers = config.model_type in ("roberta", "roformer")
    keeps_pooler = "pooler" in parts and (not is_classifiers or "classifier" in parts)
    return ("embeddings", "layers", "pooler") if keeps_pooler else ("embeddings", "layers")


def forward_flops(config: Config, rows: int, length: int, predictions: int) -> float:
    """Return the FLOPs of a forward pass with the LM head at `predictions` positions a row.

    Per token and layer: query, key, value and output 8D², MLP 4DF, scores and context 4LD. The last
    layer has key and value alone, 4D², per token, and the rest per prediction (see `encode`).
    Per prediction: transform 2D², output embedding 2DV.
    """
    per_prediction = 2 * config.hidden_size**2 + 2 * config.hidden_size * padded_vocab_size(config.vocab_size)
    return encoder_flops(config, rows, length, predictions) + float(rows * predictions * per_prediction)


def encoder_flops(config: Config, rows: int, length: int, output_positions: int) -> float:
    """Return the FLOPs up to the last hidden states at `output_positions` a row."""
    width, inner = config.hidden_size, config.intermediate_size
    key_value, rest = 4 * width**2, 4 * width**2 + 4 * width * inner + 4 * length * width
    per_token = (config.num_hidden_layers - 1) * (key_value + rest) + key_value
    return float(rows * (length * per_token + output_positions * rest))
