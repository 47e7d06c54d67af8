"""The scheduled values of one step, and of all steps of a run."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Config
from dwt_jax.objectives import objective_module
from dwt_jax.objectives.schedules import schedule_values
from dwt_jax.objectives.targets import PredictionCounts
from dwt_jax.remap.gates import gate_schedule, has_gates


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSchedules:
    """The scheduled values of a step, fp32 scalars (but for the last); or of all steps of a run, [steps].

    Attributes:
        alpha_hard: weight of the hard loss.
        alpha_soft: weight of the soft loss; its upper bound where it is until_matched.
        temperature: of the soft loss.
        learning_rate: factor of the updates.
        gate: how far the gates of a grown model are open, from 0 to 1, see `gates.open_gates`; None: the
            model has no gates.
        new_param_scale: factor of the updates of a grown model's new entries, from 0 to 1; None: they are
            not warmed up.
        num_predictions: number of predictions of a row by its number of tokens, int32 [L + 1]; of all steps:
            a `PredictionCounts`; None: the same at every step.
    """

    alpha_hard: np.ndarray | jax.Array
    alpha_soft: np.ndarray | jax.Array
    temperature: np.ndarray | jax.Array
    learning_rate: np.ndarray | jax.Array
    gate: np.ndarray | jax.Array | None = None
    new_param_scale: np.ndarray | jax.Array | None = None
    num_predictions: Any = None

    def __getitem__(self, steps: Any) -> "StepSchedules":
        """Return the values of some steps of a run; any index of NumPy."""
        return jax.tree.map(lambda values: values[steps], self)


def schedule_table(config: Config) -> StepSchedules:
    """Return the scheduled values of all steps of a resolved config, float32 [train.steps]."""
    steps, init, distill = config.train.steps, config.init, config.distill
    gate = new_param_scale = None
    if has_gates(config.model):
        gate = gate_schedule(np.arange(steps), steps, init.gate_warmup, init.step)
    if init.new_param_warmup > 0:
        new_param_scale = gate_schedule(np.arange(steps), steps, init.new_param_warmup, init.step)
    return StepSchedules(
        alpha_hard=schedule_values(distill.alpha_hard, steps),
        alpha_soft=schedule_values(distill.alpha_soft, steps),
        temperature=schedule_values(distill.temperature, steps),
        learning_rate=schedule_values(config.optimizer.learning_rate, steps),
        gate=gate,
        new_param_scale=new_param_scale,
        num_predictions=_scheduled_predictions(config),
    )


def _scheduled_predictions(config: Config) -> PredictionCounts | None:
    return objective_module(config.model.objective).scheduled_predictions(config)


def abstract_schedules(config: Config) -> StepSchedules:
    """Return shapes and dtypes of the scheduled values of one step."""
    by_step = _scheduled_predictions(config)

    def zeros() -> StepSchedules:
        zero = jnp.float32(0)
        gate = zero if has_gates(config.model) else None
        new_param_scale = zero if config.init.new_param_warmup > 0 else None
        num_predictions = None if by_step is None else jnp.asarray(by_step[0])
        return StepSchedules(zero, zero, zero, zero, gate, new_param_scale, num_predictions)

    return jax.eval_shape(zeros)
