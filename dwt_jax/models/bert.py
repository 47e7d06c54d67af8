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
from dwt_jax.models.common.layers import Dense, Embeddings, EncoderLayer, MlmHead, dropout
from dwt_jax.models.common.matmul import Policy, batched_dot, constrain_batch, replicate

Params = dict[str, Any]

PADDING_LOGIT = -1e9  # of vocabulary columns that no token owns; finite: 0 · (−∞ − −∞) would be NaN

HEADS = ("mlm", "pooler", "next_sentence", "classifier")
"""What may stand beside `embeddings` and `layers` in the parameters; pre-training has `mlm` alone."""


def _build_module(name: str, config: Model, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
    if name in ("embeddings", "layer", "mlm"):
        return {"embeddings": Embeddings, "layer": EncoderLayer, "mlm": MlmHead}[name](config, rngs)
    outputs = {"pooler": config.hidden_size, "next_sentence": 2, "classifier": num_labels}[name]
    return Dense((config.hidden_size,), (outputs,), config, rngs)


@functools.cache
def _graphdef(name: str, config: Model) -> Any:
    """The structure of a module without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: _build_module(name, config, 1, nnx.Rngs(0))))


def _merge_module(name: str, config: Model, params: Params) -> Any:
    return nnx.merge(_graphdef(name, config), params)


def init_params(
    config: Model, key: jax.Array, heads: Sequence[str] = ("mlm",), num_labels: int = 1
) -> Params:
    """Fresh fp32 parameters: matrices N(0, initializer_range²), biases 0, norms 1.

    heads: which of HEADS; labels: outputs of the classifier.
    """
    if config.vocab_size < 1:
        raise ValueError("model.vocab_size is not resolved yet: it is the tokenizer's")

    def init_module(name: str, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(_build_module(name, config, num_labels, nnx.Rngs(params=key))))

    keys = jax.random.split(key, 3)
    head_keys = {name: jax.random.fold_in(keys[2], i) if i else keys[2] for i, name in enumerate(HEADS)}
    return {
        "embeddings": init_module("embeddings", keys[0]),
        "layers": jax.vmap(functools.partial(init_module, "layer"))(
            jax.random.split(keys[1], config.num_hidden_layers)
        ),
        **{name: init_module(name, head_keys[name]) for name in heads},
    }


def abstract_params(config: Model, heads: Sequence[str] = ("mlm",), num_labels: int = 1) -> Params:
    """Shapes and types of the parameters, no memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), heads, num_labels))


def positions_in_segments(segment_ids: jax.Array) -> jax.Array:
    """int [B, L] → int [B, L]: how far each token is from the start of its segment."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segment_ids != previous, index, 0)
    return index - jax.lax.cummax(start, axis=1)


def encode(
    params: Params,
    config: Model,
    tokens: jax.Array,
    segment_ids: jax.Array,
    token_type_ids: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    key: jax.Array | None = None,
    policy: Policy = Policy(),
) -> jax.Array:
    """Last hidden states [B, L, D], or those at the positions `at`, int [B, Q] → [B, Q, D].

    tokens, segments, types: int [B, L]; segment 0 is padding, and no token sees another
    segment. Positions start anew in each. Dropout is on where a `key` is given.
    With `at` the last layer computes keys and values of all tokens, and nothing else but at those
    positions: the same numbers, for a third of that layer's FLOPs at 15 % of the tokens.
    """
    segment_ids = segment_ids.astype(jnp.int32)
    token_type_ids = jnp.zeros_like(segment_ids) if token_type_ids is None else token_type_ids
    dropout_keys = (None, None) if key is None else tuple(jax.random.split(key))
    # Looked up in whole tables: in slices of channels XLA would send what was found, and its gradient.
    tables = jax.tree.map(lambda leaf: replicate(leaf, policy), params["embeddings"])
    embeddings = _merge_module("embeddings", config, tables)
    x = embeddings(
        tokens.astype(jnp.int32),
        positions_in_segments(segment_ids),
        token_type_ids,
        dropout_keys[0],
        policy,
    )
    x = constrain_batch(x, policy)

    def layer(x, inputs, positions=None):
        layer_params, layer_key = inputs
        layer_keys = (None,) * 3 if key is None else tuple(jax.random.split(layer_key, 3))
        return constrain_batch(
            _merge_module("layer", config, layer_params)(x, segment_ids, layer_keys, policy, positions),
            policy,
        ), None

    layer_keys = None if key is None else jax.random.split(dropout_keys[1], config.num_hidden_layers)
    # XLA's loop on CPU copies what it keeps of every layer: unrolled it is a tenth faster.
    unroll = min(config.num_hidden_layers, 12) if policy.single_cpu_layout else 1
    inputs = params["layers"], layer_keys
    if positions is None:
        return jax.lax.scan(layer, x, inputs, unroll=unroll)[0]
    x = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], inputs), unroll=unroll)[0]
    return layer(x, jax.tree.map(lambda leaf: leaf[-1], inputs), positions)[0]


def mlm_transform(
    params: Params, config: Model, hidden: jax.Array, *, policy: Policy = Policy()
) -> jax.Array:
    """[..., D] → [..., D]: what the decoder of the MLM head multiplies with the word table."""
    return _merge_module("mlm", config, params["mlm"])(hidden, policy)


def lm_logits(
    features: jax.Array, embedding: jax.Array, bias: jax.Array, vocab_size: int, policy: Policy
) -> jax.Array:
    """[N, D], the decoder's table [V, D] and bias [V] → fp32 logits [N, V], columns of the padded
    vocabulary at about PADDING_LOGIT."""
    bias = jnp.where(
        jnp.arange(bias.shape[0]) < vocab_size, bias, PADDING_LOGIT
    )  # not a pass over all logits
    return (
        batched_dot(features.astype(policy.compute_dtype), embedding.astype(policy.compute_dtype), (1, 1))
        + bias
    )


def output_embedding(params: Params) -> jax.Array:
    """[V, D]: what the features of the MLM head are multiplied with."""
    decoder = params["mlm"].get("decoder")
    return (params["embeddings"]["word"] if decoder is None else decoder)["embedding"]


def mlm_logits(params: Params, config: Model, hidden: jax.Array, *, policy: Policy = Policy()) -> jax.Array:
    """[..., D] → fp32 [..., V]."""
    features = mlm_transform(params, config, hidden, policy=policy)
    flat = features.reshape(-1, features.shape[-1])
    logits = lm_logits(flat, output_embedding(params), params["mlm"]["bias"], config.vocab_size, policy)
    return logits.reshape(*hidden.shape[:-1], -1)


def pooler_output(
    params: Params, config: Model, hidden: jax.Array, *, policy: Policy = Policy()
) -> jax.Array:
    """[B, L, D] → [B, D]: the first token through the pooler. DistilBERT's has a ReLU, the others tanh."""
    features = _merge_module("pooler", config, params["pooler"])(hidden[:, 0], policy)
    return jax.nn.relu(features) if config.model_type == "distilbert" else jnp.tanh(features)


def classifier_logits(
    params: Params,
    config: Model,
    hidden: jax.Array,
    *,
    key: jax.Array | None = None,
    policy: Policy = Policy(),
) -> jax.Array:
    """[B, L, D] → fp32 [B, labels]. With a `key`, dropout as transformers has it: of what the pooler
    gives, and in a RoBERTa of what it takes too."""
    input_key, output_key = (None, None) if key is None else jax.random.split(key)
    rate = config.hidden_dropout_prob
    if config.model_type == "roberta":
        hidden = dropout(hidden[:, :1], rate, input_key)
    features = dropout(pooler_output(params, config, hidden, policy=policy), rate, output_key)
    return _merge_module("classifier", config, params["classifier"])(features, policy).astype(jnp.float32)
