"""Scheduled numbers: learning rate, α_h, α_s and temperature as functions of the step."""

import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.config import Schedule


def build(schedule: Schedule, steps: int) -> optax.Schedule:
    """The schedule of a run of `steps` as an Optax one: step (an int or an array) → value.

    Kinds: see `dwt_jax.config.Schedule`. `until_beaten` gives its upper bound; what is left
    of it depends on the losses and is decided in the step (`beaten_share`).
    """
    value, end = schedule.value, schedule.end
    warmup = round(schedule.warmup * steps)
    begin = max(round(schedule.begin * steps), warmup)
    fall = max(round(schedule.until * steps) - begin, 1)
    if schedule.kind in ("constant", "until_beaten"):
        after = optax.constant_schedule(value)
    elif schedule.kind == "steps":
        after = optax.join_schedules([optax.constant_schedule(value), optax.constant_schedule(end)], [begin])
    elif schedule.kind == "cosine":
        after = optax.join_schedules(
            [
                optax.constant_schedule(value),
                lambda n: end + (value - end) * optax.cosine_decay_schedule(1.0, fall)(n),
            ],
            [begin],
        )
    else:  # linear, warmup_stable_decay
        after = optax.linear_schedule(value, end, fall, begin)
    if not warmup:
        return after
    rise = optax.linear_schedule(0.0, value, warmup)
    return lambda step: jnp.where(step < warmup, rise(step), after(step))


def table(schedule: Schedule, steps: int) -> np.ndarray:
    """float32 [steps]: every value of the run. Always computed whole, so that a resumed run
    reads the same bits."""
    step = jnp.arange(steps)
    return np.asarray(jnp.broadcast_to(build(schedule, steps)(step), step.shape), np.float32)


def zero_from(values: np.ndarray) -> int:
    """The first step from which the values stay 0; their number if they never do."""
    nonzero = np.flatnonzero(values)
    return int(nonzero[-1]) + 1 if nonzero.size else 0


def beaten_share(gap: jnp.ndarray, margin: float) -> jnp.ndarray:
    """What `until_beaten` leaves of α_s: 1 while the student's smoothed hard loss lies at
    least `margin` nats above the teacher's, 0 once it has come down to it, linear between."""
    return jnp.clip(gap / margin, 0.0, 1.0)
