"""Small models of any family with random parameters, and their logits."""

import functools

import jax
import numpy as np

from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.logical_axes import init_value, path_name
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig

ROWS, LENGTH, PREDICTIONS = 2, 12, 3
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}


def small(model_type: str, **sizes: object) -> ModelConfig:
    """A small config of the family; without dropout."""
    defaults = family(model_type).HF_NAMES[model_type].defaults
    config = family(model_type).Config(**{**defaults, "model_type": model_type, **SIZES, **sizes})
    return config.with_dropout(0.0)


def random_params(config: ModelConfig, heads=None, seed=0, labels=1):
    """Parameters with no zero bias and no scale of one, so that a leaf in the wrong place shows."""
    random = np.random.default_rng(seed)

    def leaf(path, like):
        x = 0.2 * random.normal(size=like.shape)
        return (1 + x if init_value(path_name(path)) else x).astype(np.float32)

    abstract = family(config).abstract_params(config, heads or family(config).LM_HEADS, labels)
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def batch(config: ModelConfig):
    """Tokens and segment ids [B, L], the second row with two documents and padding."""
    tokens = np.random.default_rng(1).integers(5, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 5:] = 2
    segments[1, 9:] = 0
    return tokens, segments


def logits(params, config, tokens, segments, dtype=np.float32):
    """[B, L, vocab_size], computed in `dtype`."""
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
        return np.asarray(_jit_logits(params, config, tokens, segments, np.dtype(dtype)))


@functools.partial(
    jax.jit, static_argnums=(1, 4)
)  # op by op there would be a hundred programs for each shape
def _jit_logits(params, config, tokens, segments, dtype):
    policy = Policy(dtype, dtype)
    hidden = family(config).encode(params, config, tokens, segments, policy=policy)
    return lm_head_logits(params, config, hidden, policy=policy)[..., : config.vocab_size]


def leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class Tensors(dict):
    """Arrays by name, as `from_hf_tensors` reads them from a file."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype
