"""Training and prediction of several seeds side by side: everything has a leading axis of seeds [S]."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Optimizer, Schedule
from dwt_jax.finetune.collate import ExampleBatch
from dwt_jax.models import family
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.runs import optimizer as optimizers

FINETUNE_TRACE_COUNTS: collections.Counter[str] = collections.Counter()
"""How often `train` and `predict` were traced: once a length of batches, which a test holds them to."""


@dataclass(frozen=True)
class FinetuneStepConfig:
    """All that a compiled step depends on, but for the shape of its batch."""

    model: ModelConfig  # with the dropout of the recipe
    labels: int  # outputs; 1 with numbers
    regression: bool
    optimizer: Optimizer  # but for its learning rate, see spec_of
    policy: Policy


def finetune_step_config(
    model: ModelConfig, dropout: float, labels: int, regression: bool, optimizer: Optimizer, policy: Policy
) -> FinetuneStepConfig:
    """The learning rate is an argument of the step: tasks that differ in it share a compilation."""
    return FinetuneStepConfig(
        model.with_dropout(dropout),
        labels,
        regression,
        dataclasses.replace(optimizer, learning_rate=Schedule()),
        policy,
    )


@functools.cache
def jit_init_finetune_state(step_config: FinetuneStepConfig) -> Any:
    """jitted (params, seeds uint32 [S]) → the state of every seed, see `init_finetune_state`."""
    return jax.jit(functools.partial(init_finetune_state, step_config))


def init_finetune_state(step_config: FinetuneStepConfig, params: Any, seeds: jax.Array) -> dict[str, Any]:
    """The state of every seed: the encoder of `params` and a new classifier, behind a pooler that is
    new where transformers would make a new one. seeds: uint32 [S].

    Which parts of `params` a classifier keeps is a fact of the family, see `Family`.
    """
    pretrained_keys = family(step_config.model).pretrained_classifier_parts(step_config.model, tuple(params))

    def init_seed(seed: jax.Array) -> dict[str, Any]:
        new = family(step_config.model).init_params(
            step_config.model, jax.random.key(seed), ("pooler", "classifier"), step_config.labels
        )
        seed_params = {**new, **{name: params[name] for name in pretrained_keys}}
        return {
            "params": seed_params,
            "opt_state": optimizers.make_optimizer(step_config.optimizer, step_config.model).init(
                seed_params
            ),
        }

    return jax.vmap(init_seed)(seeds)


def finetune_loss(step_config: FinetuneStepConfig, logits: jax.Array, batch: ExampleBatch) -> jax.Array:
    """Cross-entropy in nats, or the squared error, as a mean over the batch's real rows."""
    if step_config.regression:
        losses = jnp.square(logits[:, 0] - batch.labels)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (losses * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1)


def finetune_logits(
    step_config: FinetuneStepConfig, params: Any, batch: ExampleBatch, key: jax.Array | None
) -> jax.Array:
    """fp32 [B, labels]; dropout where there is a key."""
    encoder_key, classifier_key = (None, None) if key is None else jax.random.split(key)
    hidden = family(step_config.model).encode(
        params,
        step_config.model,
        batch.tokens,
        batch.segment_ids,
        batch.token_type_ids,
        positions=jnp.zeros((len(batch.tokens), 1), jnp.int32),  # the pooler's
        key=encoder_key,
        policy=step_config.policy,
    )
    return family(step_config.model).classifier_logits(
        params, step_config.model, hidden, key=classifier_key, policy=step_config.policy
    )


def _vmap_seeds(function: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """vmap; but a single seed without it, since on CPU products with a further axis of 1 are slower
    (a step by a quarter, its compilation by two, measured on 6 x 384)."""

    def call(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments[0])[0]) > 1:
            return jax.vmap(function, in_axes)(*arguments)
        unbatched = [
            jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], function(*unbatched))

    return call


@functools.cache
def jit_finetune_step(step_config: FinetuneStepConfig) -> Any:
    """jitted (state, batch [S, B, …], seeds uint32 [S], step, learning rate) → (state, losses [S])."""

    def train_step(state, batch: ExampleBatch, seed, step, learning_rate):
        FINETUNE_TRACE_COUNTS["train"] += 1
        key = jax.random.fold_in(jax.random.key(seed), step)
        loss, grads = jax.value_and_grad(
            lambda params: finetune_loss(step_config, finetune_logits(step_config, params, batch, key), batch)
        )(state["params"])
        update, opt_state = optimizers.make_optimizer(step_config.optimizer, step_config.model).update(
            grads, state["opt_state"], state["params"]
        )
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], update)
        return {"params": params, "opt_state": opt_state}, loss

    return jax.jit(_vmap_seeds(train_step, (0, 0, 0, None, None)), donate_argnums=0)


@functools.cache
def jit_predict(step_config: FinetuneStepConfig) -> Any:
    """jitted (params [S, …], batch [B, …]) → logits fp32 [S, B, labels]."""

    def predict_batch(params, batch: ExampleBatch):
        FINETUNE_TRACE_COUNTS["predict"] += 1
        return finetune_logits(step_config, params, batch, None)

    return jax.jit(_vmap_seeds(predict_batch, (0, None)))
