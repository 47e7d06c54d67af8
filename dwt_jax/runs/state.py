"""The training state of a run, which a checkpoint holds."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from dwt_jax.config import Optimizer
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.runs.optimizer import make_optimizer

STATE_FORMAT = 2
"""Raise it when the tree of `TrainState` changes: runs of another format do not resume."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SkipCounts:
    """Numbers of updates skipped for a loss or gradient that is not finite, int32 scalars.

    Attributes:
        total: since the first step.
        consecutive: up to the last step.
        longest: the largest value of `consecutive` since the first step.
    """

    total: jax.Array
    consecutive: jax.Array
    longest: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherGap:
    """How far the student's hard loss is above the teacher's, for `until_matched`.

    Attributes:
        gap: fp32 scalar, running sum of (student − teacher) hard loss in nats, with decay.
        weight: fp32 scalar, running sum of the weights in it: gap / weight is the running mean.
        matched_step: int32 scalar, the step at which `gap` first was at most 0; −1: none yet.
    """

    gap: jax.Array
    weight: jax.Array
    matched_step: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. All other values are functions of (config, step).

    Attributes:
        params: parameters of the student, fp32.
        opt_state: of `make_optimizer`.
        step: int32 scalar, the number of completed steps.
        skipped: non-finite updates.
        teacher_gap: constant unless `distill.alpha_soft.kind` is until_matched.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    skipped: SkipCounts
    teacher_gap: TeacherGap


def init_train_state(params: Params, model: ModelConfig, optimizer: Optimizer) -> TrainState:
    """Return the state before the first step, with these parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=make_optimizer(optimizer, model).init(params),
        step=zero,
        skipped=SkipCounts(zero, zero, zero),
        teacher_gap=TeacherGap(jnp.float32(0), jnp.float32(0), jnp.full((), -1, jnp.int32)),
    )


def abstract_state(model: ModelConfig, optimizer: Optimizer) -> TrainState:
    """Return shapes and dtypes of the state, without memory."""
    return jax.eval_shape(
        lambda: init_train_state(family(model).init_params(model, jax.random.key(0)), model, optimizer)
    )
