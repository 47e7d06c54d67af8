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

from dwt_jax.config import Model, Optimizer, Schedule
from dwt_jax.finetune.collate import Batch
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Numerics
from dwt_jax.runs import optimizer as optimizers

TRACES: collections.Counter[str] = collections.Counter()
"""How often `train` and `predict` were traced: once a length of batches, which a test holds them to."""


@dataclass(frozen=True)
class Spec:
    """All that a compiled step depends on, but for the shape of its batch."""

    model: Model  # with the dropout of the recipe
    labels: int  # outputs; 1 with numbers
    regression: bool
    optimizer: Optimizer  # but for its learning rate, see spec_of
    numerics: Numerics


def spec_of(
    model: Model, dropout: float, labels: int, regression: bool, optimizer: Optimizer, numerics: Numerics
) -> Spec:
    """The learning rate is an argument of the step: tasks that differ in it share a compilation."""
    model = dataclasses.replace(model, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return Spec(model, labels, regression, dataclasses.replace(optimizer, learning_rate=Schedule()), numerics)


@functools.cache
def beginner(spec: Spec) -> Any:
    """jitted (params, seeds uint32 [S]) → the state of every seed, see `begin`."""
    return jax.jit(functools.partial(begin, spec))


def begin(spec: Spec, params: Any, seeds: jax.Array) -> dict[str, Any]:
    """The state of every seed: the encoder of `params` and a new classifier, behind a pooler that is
    new where transformers would make a new one. seeds: uint32 [S].

    That is: a BERT's pooler and a DistilBERT's pre_classifier stay where `params` has them. A
    RoBERTa's stays only where it is a classifier's; its encoder's pooler is not what a classifier has.
    """
    kept = ["embeddings", "layers"]
    if "pooler" in params and (spec.model.model_type != "roberta" or "classifier" in params):
        kept.append("pooler")

    def one(seed: jax.Array) -> dict[str, Any]:
        new = bert.init(spec.model, jax.random.key(seed), ("pooler", "classifier"), spec.labels)
        mine = {**new, **{name: params[name] for name in kept}}
        return {"params": mine, "opt_state": optimizers.make(spec.optimizer).init(mine)}

    return jax.vmap(one)(seeds)


def loss_of(spec: Spec, logits: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy in nats, or the squared error, as a mean over the batch's real rows."""
    if spec.regression:
        each = jnp.square(logits[:, 0] - batch.labels)
    else:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (each * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1)


def logits_of(spec: Spec, params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    """fp32 [B, labels]; dropout where there is a key."""
    encoder, top = (None, None) if key is None else jax.random.split(key)
    hidden = bert.encode(
        params,
        spec.model,
        batch.tokens,
        batch.segments,
        batch.types,
        at=jnp.zeros((len(batch.tokens), 1), jnp.int32),  # the pooler's
        key=encoder,
        numerics=spec.numerics,
    )
    return bert.classify(params, spec.model, hidden, key=top, numerics=spec.numerics)


def _over_seeds(function: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """vmap; but a single seed without it, since on CPU products with a further axis of 1 are slower
    (a step by a quarter, its compilation by two, measured on 6 x 384)."""

    def call(*arguments: Any) -> Any:
        if len(jax.tree.leaves(arguments[0])[0]) > 1:
            return jax.vmap(function, in_axes)(*arguments)
        own = [
            jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], function(*own))

    return call


@functools.cache
def trainer(spec: Spec) -> Any:
    """jitted (state, batch [S, B, …], seeds uint32 [S], step, learning rate) → (state, losses [S])."""

    def one(state, batch: Batch, seed, step, learning_rate):
        TRACES["train"] += 1
        key = jax.random.fold_in(jax.random.key(seed), step)
        value, gradient = jax.value_and_grad(
            lambda params: loss_of(spec, logits_of(spec, params, batch, key), batch)
        )(state["params"])
        update, opt_state = optimizers.make(spec.optimizer).update(
            gradient, state["opt_state"], state["params"]
        )
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], update)
        return {"params": params, "opt_state": opt_state}, value

    return jax.jit(_over_seeds(one, (0, 0, 0, None, None)), donate_argnums=0)


@functools.cache
def predictor(spec: Spec) -> Any:
    """jitted (params [S, …], batch [B, …]) → logits fp32 [S, B, labels]."""

    def one(params, batch: Batch):
        TRACES["predict"] += 1
        return logits_of(spec, params, batch, None)

    return jax.jit(_over_seeds(one, (0, None)))
