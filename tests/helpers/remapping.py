"""A model of 2 x 8 to remap, its logits in a given type, and training steps on one batch."""

import dataclasses
import functools

import jax
import numpy as np
import optax

from dwt_jax.config import Optimizer
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.matmul import Policy
from dwt_jax.runs import optimizer as optimizers
from helpers.reference import batch

KEY = jax.random.key(7, impl="rbg")  # compiles ten times faster than the default for every new shape
SMALL = BertConfig(
    vocab_size=60,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=12,
    type_vocab_size=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-6,
)


def small_with(**fields):
    """SMALL with other fields."""
    return dataclasses.replace(SMALL, **fields)


def model_logits(params, model, inputs, dtype):
    """Logits [B, L, V] of the model itself, computed in `dtype`."""
    policy = Policy(np.dtype(dtype), np.dtype(dtype))

    @jax.jit
    def run(params, inputs):
        return lm_head_logits(
            params, model, bert.encode(params, model, *inputs, policy=policy), policy=policy
        )

    with jax.enable_x64(True):
        found = np.asarray(run(params, inputs))
    assert found.dtype == dtype
    return found


def mlm_loss(params, model, inputs, labels, dtype):
    """Mean cross entropy over the tokens of SMALL, at every position."""
    policy = Policy(np.dtype(dtype), np.dtype(dtype))
    hidden = bert.encode(params, model, *inputs, policy=policy)
    logits = lm_head_logits(params, model, hidden, policy=policy)[..., : SMALL.vocab_size]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (losses * (inputs[1] > 0)).mean()


def random_labels(inputs):
    return np.random.default_rng(3).integers(0, SMALL.vocab_size, inputs[0].shape)


@functools.partial(jax.jit, static_argnums=2)
def adam_step(params, state, model):
    inputs = batch(SMALL)
    found = jax.grad(mlm_loss)(params, model, inputs, random_labels(inputs), np.float32)
    updates, state = optimizers.make_optimizer(Optimizer(), model).update(found, state, params)
    return jax.tree.map(lambda p, u: p - 0.01 * u, params, updates), state


def train_steps(params, state, model, steps):
    """Several steps on one batch: (params, optimizer state)."""
    for _ in range(steps):
        params, state = adam_step(params, state, model)
    return params, state
