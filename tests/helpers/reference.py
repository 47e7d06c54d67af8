"""A BERT in NumPy, float64, written from the paper and not from dwt_jax/model: what remapped
parameters are measured with. With weighted norms and gated layers where the parameters have them."""

import jax
import numpy as np
from scipy.special import erf

from dwt_jax.models import bert


def parameters(model, seed=0, dtype=np.float64, heads=("mlm",)):
    """Host arrays with no zero bias and no norm of one, so that a leaf in the wrong place shows."""
    random = np.random.default_rng(seed)

    def leaf(path, like):
        x = random.normal(size=like.shape)
        scale = {"scale": 0.3, "bias": 0.3, "embedding": 0.5}.get(path[-1].key, like.shape[-1] ** -0.5)
        if path[-1].key in ("weight", "gate"):
            return random.uniform(0.4, 1.6, like.shape).astype(dtype)
        return ((path[-1].key == "scale") + scale * x).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, bert.abstract_params(model, heads, num_labels=3))


def batch(model, rows=3, length=9, seed=1, types=None):
    """(tokens, segments, types): full and shorter rows."""
    random = np.random.default_rng(seed)
    known = (model.type_vocab_size or 1) if types is None else types
    segments = (np.arange(length) < np.linspace(length, 3, rows).astype(int)[:, None]).astype(np.int32)
    tokens = random.integers(1, model.vocab_size, (rows, length)).astype(np.int32)
    types = random.integers(0, known, (rows, length))
    return tokens * segments, segments, types.astype(np.int32) * segments


def logits(params, model, tokens, segments, types):
    """float64 [B, L, vocab_size]; positions count from the start of a row."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table = p["embeddings"]
    first = model.position_offset
    x = table["word"]["embedding"][tokens] + table["position"]["embedding"][first : first + tokens.shape[1]]
    if "type" in table:
        x = x + table["type"]["embedding"][types]
    x = norm(x, table["norm"], model)
    for i in range(model.num_hidden_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        y = attention(x, layer["attention"], segments, model)
        inner = gelu(affine(y, layer["mlp"]["input"]))
        y = norm(y + affine(inner, layer["mlp"]["output"]), layer["mlp"]["norm"], model)
        gate = layer.get("gate", 1.0)
        x = gate * y + (1 - gate) * x
    head = p["mlm"]
    features = norm(gelu(affine(x, head["transform"])), head["norm"], model)
    decoder = head.get("decoder", table["word"])["embedding"]
    return (features @ decoder.T + head["bias"])[..., : model.vocab_size]


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def affine(x, module):
    return x @ module["kernel"] + module["bias"]


def norm(x, module, model):
    m = module.get("weight", np.ones(x.shape[-1]))
    centred = x - (m * x).sum(-1, keepdims=True) / m.sum()
    variance = (m * centred**2).sum(-1, keepdims=True) / m.sum()
    return centred / np.sqrt(variance + model.layer_norm_eps) * module["scale"] + module["bias"]


def attention(x, module, segments, model):
    q, k, v = (
        np.einsum("bld,dhk->bhlk", x, module[name]["kernel"]) + module[name]["bias"][None, :, None]
        for name in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(model.hidden_size // model.num_attention_heads)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    scores = np.where(same, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    output = np.einsum("bhlk,hkd->bld", mixed, module["output"]["kernel"]) + module["output"]["bias"]
    return norm(x + output, module["norm"], model)
