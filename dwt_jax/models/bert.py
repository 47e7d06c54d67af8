"""The encoder as pure functions of (params, batch): the only way in for everybody else.

`params` is a nested dict of arrays. Those below `layers` carry a leading layer axis and are
run by a scan (unrolled on one CPU device), so that compile time is flat in depth and depth
remapping is indexing.
Letters of shapes: see layers.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dwt_jax.config import Model
from dwt_jax.models.common.layers import Dense, Embeddings, Layer, MlmHead, dropout
from dwt_jax.models.common.matmul import Numerics, by_rows, dot, whole

Params = dict[str, Any]

PADDING_LOGIT = -1e9  # of vocabulary columns that no token owns; finite: 0 · (−∞ − −∞) would be NaN

HEADS = ("mlm", "pooler", "next_sentence", "classifier")
"""What may stand beside `embeddings` and `layers` in the parameters; pre-training has `mlm` alone."""


def _part(name: str, config: Model, labels: int, rngs: nnx.Rngs) -> nnx.Module:
    if name in ("embeddings", "layer", "mlm"):
        return {"embeddings": Embeddings, "layer": Layer, "mlm": MlmHead}[name](config, rngs)
    outputs = {"pooler": config.hidden_size, "next_sentence": 2, "classifier": labels}[name]
    return Dense((config.hidden_size,), (outputs,), config, rngs)


@functools.cache
def _graph(part: str, config: Model) -> Any:
    """The structure of a module without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: _part(part, config, 1, nnx.Rngs(0))))


def _module(part: str, config: Model, params: Params) -> Any:
    return nnx.merge(_graph(part, config), params)


def init(config: Model, key: jax.Array, heads: Sequence[str] = ("mlm",), labels: int = 1) -> Params:
    """Fresh fp32 parameters: matrices N(0, initializer_range²), biases 0, norms 1.

    heads: which of HEADS; labels: outputs of the classifier.
    """
    if config.vocab_size < 1:
        raise ValueError("model.vocab_size is not resolved yet: it is the tokenizer's")

    def part(name: str, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(_part(name, config, labels, nnx.Rngs(params=key))))

    keys = jax.random.split(key, 3)
    seeds = {name: jax.random.fold_in(keys[2], i) if i else keys[2] for i, name in enumerate(HEADS)}
    return {
        "embeddings": part("embeddings", keys[0]),
        "layers": jax.vmap(functools.partial(part, "layer"))(
            jax.random.split(keys[1], config.num_hidden_layers)
        ),
        **{name: part(name, seeds[name]) for name in heads},
    }


def abstract(config: Model, heads: Sequence[str] = ("mlm",), labels: int = 1) -> Params:
    """Shapes and types of the parameters, no memory."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), heads, labels))


def positions_in_segments(segments: jax.Array) -> jax.Array:
    """int [B, L] → int [B, L]: how far each token is from the start of its segment."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segments != previous, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def encode(
    params: Params,
    config: Model,
    tokens: jax.Array,
    segments: jax.Array,
    types: jax.Array | None = None,
    *,
    at: jax.Array | None = None,
    key: jax.Array | None = None,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Last hidden states [B, L, D], or those at the positions `at`, int [B, Q] → [B, Q, D].

    tokens, segments, types: int [B, L]; segment 0 is padding, and no token sees another
    segment. Positions start anew in each. Dropout is on where a `key` is given.
    With `at` the last layer computes keys and values of all tokens, and nothing else but at those
    positions: the same numbers, for a third of that layer's FLOPs at 15 % of the tokens.
    """
    segments = segments.astype(jnp.int32)
    types = jnp.zeros_like(segments) if types is None else types
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    # Looked up in whole tables: in slices of channels XLA would send what was found, and its gradient.
    tables = jax.tree.map(lambda leaf: whole(leaf, numerics), params["embeddings"])
    embeddings = _module("embeddings", config, tables)
    x = embeddings(tokens.astype(jnp.int32), positions_in_segments(segments), types, keys[0], numerics)
    x = by_rows(x, numerics)

    def layer(x, inputs, at=None):
        layer_params, layer_key = inputs
        layer_keys = (None,) * 3 if key is None else tuple(jax.random.split(layer_key, 3))
        return by_rows(
            _module("layer", config, layer_params)(x, segments, layer_keys, numerics, at), numerics
        ), None

    layer_keys = None if key is None else jax.random.split(keys[1], config.num_hidden_layers)
    # XLA's loop on CPU copies what it keeps of every layer: unrolled it is a tenth faster.
    unroll = min(config.num_hidden_layers, 12) if numerics.one_cpu else 1
    inputs = params["layers"], layer_keys
    if at is None:
        return jax.lax.scan(layer, x, inputs, unroll=unroll)[0]
    x = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], inputs), unroll=unroll)[0]
    return layer(x, jax.tree.map(lambda leaf: leaf[-1], inputs), at)[0]


def mlm_features(
    params: Params, config: Model, hidden: jax.Array, *, numerics: Numerics = Numerics()
) -> jax.Array:
    """[..., D] → [..., D]: what the decoder of the MLM head multiplies with the word table."""
    return _module("mlm", config, params["mlm"])(hidden, numerics)


def decode(
    features: jax.Array, table: jax.Array, bias: jax.Array, vocab_size: int, numerics: Numerics
) -> jax.Array:
    """[N, D], the decoder's table [V, D] and bias [V] → fp32 logits [N, V], columns of the padded
    vocabulary at about PADDING_LOGIT."""
    bias = jnp.where(
        jnp.arange(bias.shape[0]) < vocab_size, bias, PADDING_LOGIT
    )  # not a pass over all logits
    return dot(features.astype(numerics.compute), table.astype(numerics.compute), (1, 1)) + bias


def decoder_table(params: Params) -> jax.Array:
    """[V, D]: what the features of the MLM head are multiplied with."""
    own = params["mlm"].get("decoder")
    return (params["embeddings"]["word"] if own is None else own)["embedding"]


def mlm_logits(
    params: Params, config: Model, hidden: jax.Array, *, numerics: Numerics = Numerics()
) -> jax.Array:
    """[..., D] → fp32 [..., V]."""
    features = mlm_features(params, config, hidden, numerics=numerics)
    flat = features.reshape(-1, features.shape[-1])
    logits = decode(flat, decoder_table(params), params["mlm"]["bias"], config.vocab_size, numerics)
    return logits.reshape(*hidden.shape[:-1], -1)


def pooled(params: Params, config: Model, hidden: jax.Array, *, numerics: Numerics = Numerics()) -> jax.Array:
    """[B, L, D] → [B, D]: the first token through the pooler. DistilBERT's has a ReLU, the others tanh."""
    first = _module("pooler", config, params["pooler"])(hidden[:, 0], numerics)
    return jax.nn.relu(first) if config.model_type == "distilbert" else jnp.tanh(first)


def classify(
    params: Params,
    config: Model,
    hidden: jax.Array,
    *,
    key: jax.Array | None = None,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """[B, L, D] → fp32 [B, labels]. With a `key`, dropout as transformers has it: of what the pooler
    gives, and in a RoBERTa of what it takes too."""
    before, behind = (None, None) if key is None else jax.random.split(key)
    rate = config.hidden_dropout_prob
    if config.model_type == "roberta":
        hidden = dropout(hidden[:, :1], rate, before)
    features = dropout(pooled(params, config, hidden, numerics=numerics), rate, behind)
    return _module("classifier", config, params["classifier"])(features, numerics).astype(jnp.float32)
