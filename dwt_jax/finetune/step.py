"""Training step and prediction for several seeds in parallel; every array has a leading seed axis [S]."""

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
from dwt_jax.runs.optimizer import make_optimizer

FINETUNE_TRACE_COUNTS: collections.Counter[str] = collections.Counter()
"""Number of traces of the training and prediction steps: one per padded length, which a test checks."""


@dataclass(frozen=True)
class FinetuneStepConfig:
    """Everything that a compiled step depends on, except the shape of its batch."""

    model: ModelConfig  # with the recipe's dropout
    labels: int  # outputs; 1 for a regression
    regression: bool
    optimizer: Optimizer  # without the learning rate, which is an argument of the step
    policy: Policy


def finetune_step_config(
    model: ModelConfig, dropout: float, labels: int, regression: bool, optimizer: Optimizer, policy: Policy
) -> FinetuneStepConfig:
    """Build the static config of the step.

    The learning rate is left out: it is an argument of the step, so that tasks that differ only in it
    share a compilation.

    Args:
        model: config of the pretrained model.
        dropout: rate for hidden states, attention probabilities and the classifier's input.
        labels: number of outputs.
        regression: whether labels are numbers.
        optimizer: of the recipe.
        policy: dtypes.
    """
    return FinetuneStepConfig(
        model.with_dropout(dropout),
        labels,
        regression,
        dataclasses.replace(optimizer, learning_rate=Schedule()),
        policy,
    )


@functools.cache
def jit_init_finetune_state(step_config: FinetuneStepConfig) -> Any:
    """Return `init_finetune_state`, jitted, as a function of (params, seeds)."""
    return jax.jit(functools.partial(init_finetune_state, step_config))


def init_finetune_state(step_config: FinetuneStepConfig, params: Any, seeds: jax.Array) -> dict[str, Any]:
    """Initialize the training state of every seed.

    The encoder is pretrained and the classifier is new. The pooler is pretrained if the family's
    classifier uses the encoder's, see `Family.pretrained_classifier_parts`.

    Args:
        step_config: static config of the step.
        params: pretrained parameters, without a seed axis.
        seeds: uint32 [S], for the new parameters.

    Returns:
        {"params", "opt_state"}, leaves [S, …].
    """
    pretrained_keys = family(step_config.model).pretrained_classifier_parts(step_config.model, tuple(params))

    def init_seed(seed: jax.Array) -> dict[str, Any]:
        new_params = family(step_config.model).init_params(
            step_config.model,
            jax.random.key(seed),
            family(step_config.model).CLASSIFIER_HEADS,
            step_config.labels,
        )
        seed_params = {**new_params, **{name: params[name] for name in pretrained_keys}}
        return {
            "params": seed_params,
            "opt_state": make_optimizer(step_config.optimizer, step_config.model).init(seed_params),
        }

    return jax.vmap(init_seed)(seeds)


def finetune_loss(step_config: FinetuneStepConfig, logits: jax.Array, batch: ExampleBatch) -> jax.Array:
    """Compute the mean cross-entropy in nats, or the mean squared error of a regression.

    Args:
        step_config: static config of the step.
        logits: [B, labels].
        batch: rows with weight 0 do not count.

    Returns:
        Scalar.
    """
    if step_config.regression:
        losses = jnp.square(logits[:, 0] - batch.labels)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (losses * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1)


def finetune_logits(
    step_config: FinetuneStepConfig, params: Any, batch: ExampleBatch, key: jax.Array | None
) -> jax.Array:
    """Run the classifier.

    Args:
        step_config: static config of the step.
        params: of one seed.
        batch: arrays [B, …].
        key: for dropout; None for none.

    Returns:
        fp32 [B, labels].
    """
    encoder_key, classifier_key = (None, None) if key is None else jax.random.split(key)
    first_token = jnp.zeros((len(batch.tokens), 1), jnp.int32)
    hidden = family(step_config.model).encode(
        params,
        step_config.model,
        batch.tokens,
        batch.segment_ids,
        batch.token_type_ids,
        positions=first_token if family(step_config.model).pools_first_token(step_config.model) else None,
        key=encoder_key,
        policy=step_config.policy,
    )
    return family(step_config.model).classifier_logits(
        params, step_config.model, hidden, batch.segment_ids, key=classifier_key, policy=step_config.policy
    )


def _vmap_seeds(function: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """Apply vmap, except for a single seed.

    On CPU matrix products with an additional axis of size 1 are slower: a step by a quarter, its
    compilation by a factor of two (measured on 6 layers of hidden size 384).
    """

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
    """Return the jitted training step, which donates the state.

    It maps (state [S, …], batch [S, B, …], seeds uint32 [S], step, learning rate) to
    (state, losses [S]).
    """

    def train_step(
        state: dict[str, Any],
        batch: ExampleBatch,
        seed: jax.Array,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[dict[str, Any], jax.Array]:
        FINETUNE_TRACE_COUNTS["train"] += 1
        key = jax.random.fold_in(jax.random.key(seed), step)
        loss, grads = jax.value_and_grad(
            lambda params: finetune_loss(step_config, finetune_logits(step_config, params, batch, key), batch)
        )(state["params"])
        update, opt_state = make_optimizer(step_config.optimizer, step_config.model).update(
            grads, state["opt_state"], state["params"]
        )
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], update)
        return {"params": params, "opt_state": opt_state}, loss

    return jax.jit(_vmap_seeds(train_step, (0, 0, 0, None, None)), donate_argnums=0)


@functools.cache
def jit_predict(step_config: FinetuneStepConfig) -> Any:
    """Return the jitted prediction.

    It maps (params [S, …], batch [B, …]) to logits, fp32 [S, B, labels].
    """

    def predict_batch(params: Any, batch: ExampleBatch) -> jax.Array:
        FINETUNE_TRACE_COUNTS["predict"] += 1
        return finetune_logits(step_config, params, batch, None)

    return jax.jit(_vmap_seeds(predict_batch, (0, None)))
