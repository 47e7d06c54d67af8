"""Training and prediction of several seeds side by side: everything has a leading axis of seeds [S]."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Model, Optimizer
from dwt_jax.finetune.batches import Batch
from dwt_jax.model import functional
from dwt_jax.model.products import Numerics
from dwt_jax.train import optimizer as optimizers


@dataclass(frozen=True)
class Spec:
    """All that a compiled step depends on, but for the shape of its batch."""

    model: Model  # with the dropout of the recipe
    labels: int  # outputs; 1 with numbers
    regression: bool
    optimizer: Optimizer
    numerics: Numerics


def begin(spec: Spec, params: Any, seeds: jax.Array) -> dict[str, Any]:
    """The state of every seed: the encoder of `params` (and its pooler, if it has one), a new
    classifier. seeds: uint32 [S]."""

    def one(seed: jax.Array) -> dict[str, Any]:
        new = functional.init(spec.model, jax.random.key(seed), ("pooler", "classifier"), spec.labels)
        parts = {name: params.get(name, new[name]) for name in ("embeddings", "layers", "pooler")}
        mine = {**parts, "classifier": new["classifier"]}
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
    hidden = functional.encode(
        params, spec.model, batch.tokens, batch.segments, batch.types, key=encoder, numerics=spec.numerics
    )
    return functional.classify(params, spec.model, hidden, key=top, numerics=spec.numerics)


@functools.cache
def trainer(spec: Spec) -> Any:
    """jitted (state, batch [S, B, …], seeds uint32 [S], step, learning rate) → (state, losses [S])."""

    def one(state, batch: Batch, seed, step, learning_rate):
        key = jax.random.fold_in(jax.random.key(seed), step)
        value, gradient = jax.value_and_grad(
            lambda params: loss_of(spec, logits_of(spec, params, batch, key), batch)
        )(state["params"])
        update, opt_state = optimizers.make(spec.optimizer).update(
            gradient, state["opt_state"], state["params"]
        )
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state["params"], update)
        return {"params": params, "opt_state": opt_state}, value

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)), donate_argnums=0)


@functools.cache
def predictor(spec: Spec) -> Any:
    """jitted (params [S, …], batch [B, …]) → logits fp32 [S, B, labels]."""
    return jax.jit(jax.vmap(lambda params, batch: logits_of(spec, params, batch, None), in_axes=(0, None)))
