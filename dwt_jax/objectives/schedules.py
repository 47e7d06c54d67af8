"""Scheduled numbers: learning rate, α_h, α_s and temperature as functions of the step."""

import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.config import Schedule


def build_schedule(schedule: Schedule, steps: int) -> optax.Schedule:
    """The schedule of a run of `steps` as an Optax one: step (an int or an array) → value.

    Kinds: see `dwt_jax.config.Schedule`. `until_matched` gives its upper bound; what is left
    of it depends on the losses and is decided in the step (`alpha_soft_scale`).
    """
    value, end = schedule.value, schedule.end
    warmup_steps = round(schedule.warmup_fraction * steps)
    decay_start = max(round(schedule.decay_start * steps), warmup_steps)
    decay_steps = max(round(schedule.decay_end * steps) - decay_start, 1)
    if schedule.kind in ("constant", "until_matched"):
        main_schedule = optax.constant_schedule(value)
    elif schedule.kind == "piecewise":
        main_schedule = optax.join_schedules(
            [optax.constant_schedule(value), optax.constant_schedule(end)], [decay_start]
        )
    elif schedule.kind == "cosine":
        main_schedule = optax.join_schedules(
            [
                optax.constant_schedule(value),
                lambda n: end + (value - end) * optax.cosine_decay_schedule(1.0, decay_steps)(n),
            ],
            [decay_start],
        )
    else:  # linear, warmup_stable_decay
        main_schedule = optax.linear_schedule(value, end, decay_steps, decay_start)
    if not warmup_steps:
        return main_schedule
    warmup_schedule = optax.linear_schedule(0.0, value, warmup_steps)
    return lambda step: jnp.where(step < warmup_steps, warmup_schedule(step), main_schedule(step))


def schedule_values(schedule: Schedule, steps: int) -> np.ndarray:
    """float32 [steps]: every value of the run. Always computed whole, so that a resumed run
    reads the same bits."""
    step = jnp.arange(steps)
    return np.asarray(jnp.broadcast_to(build_schedule(schedule, steps)(step), step.shape), np.float32)


def first_all_zero(values: np.ndarray) -> int:
    """The first step from which the values stay 0; their number if they never do."""
    nonzero = np.flatnonzero(values)
    return int(nonzero[-1]) + 1 if nonzero.size else 0


def alpha_soft_scale(gap: jnp.ndarray, margin: float) -> jnp.ndarray:
    """What `until_matched` leaves of α_s: 1 while the student's smoothed hard loss lies at
    least `margin` nats above the teacher's, 0 once it has come down to it, linear between."""
    return jnp.clip(gap / margin, 0.0, 1.0)
