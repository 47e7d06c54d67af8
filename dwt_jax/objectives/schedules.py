"""Scheduled numbers: learning rate, α_h, α_s, temperature and masking rate as functions of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dwt_jax.config import Schedule


def build_schedule(schedule: Schedule, steps: int) -> optax.Schedule:
    """Build the optax schedule of a run.

    The schedule of `until_matched` is its upper bound; the factor that depends on the losses is applied
    in the training step (`alpha_soft_scale`).

    Args:
        schedule: the kind and its parameters, see `dwt_jax.config.Schedule`.
        steps: number of steps of the run.

    Returns:
        A function of the step, an int or an array of them.
    """
    value, end = schedule.value, schedule.end
    warmup_steps = round(schedule.warmup_fraction * steps)
    decay_start = max(round(schedule.decay_start * steps), warmup_steps)
    decay_steps = max(round(schedule.decay_end * steps) - decay_start, 1)
    shape = schedule.decay_type if schedule.kind == "warmup_stable_decay" else schedule.kind
    if shape in ("constant", "until_matched"):
        main_schedule = optax.constant_schedule(value)
    elif shape == "piecewise":
        boundaries = [max(round(share * steps), warmup_steps) for share in schedule.boundaries]
        values = (value, *schedule.boundary_values) if boundaries else (value, end)
        main_schedule = optax.join_schedules(
            [optax.constant_schedule(x) for x in values], boundaries or [decay_start]
        )
    else:
        make_decay = {"linear": _linear, "cosine": _cosine, "1-sqrt": _one_minus_sqrt}[shape]
        decay = make_decay(decay_steps)
        # The end is a stage of its own: XLA divides by multiplying with the reciprocal, so that the decay may
        # end at 1e-7 in place of 0, and a teacher with a weight of 1e-7 is not switched off.
        main_schedule = optax.join_schedules(
            [
                optax.constant_schedule(value),
                lambda n: end + (value - end) * decay(n),
                optax.constant_schedule(end),
            ],
            [decay_start, decay_start + decay_steps],
        )
    if not warmup_steps:
        return main_schedule
    warmup_schedule = optax.linear_schedule(0.0, value, warmup_steps)
    return lambda step: jnp.where(step < warmup_steps, warmup_schedule(step), main_schedule(step))


def _linear(decay_steps: int) -> optax.Schedule:
    return optax.linear_schedule(1.0, 0.0, decay_steps)


def _cosine(decay_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, decay_steps)


def _one_minus_sqrt(decay_steps: int) -> optax.Schedule:
    """Return 1 − √t, from 1 to 0, with t = step / decay_steps (Hägele et al. 2024, arXiv 2405.18392)."""
    return lambda step: 1 - jnp.sqrt(jnp.clip(step / decay_steps, 0, 1))


def schedule_values(
    schedule: Schedule, steps: int, dtype: type[np.float32 | np.float64] = np.float32
) -> np.ndarray:
    """Return the values of all steps of a run, [steps].

    A resumed run computes all of them too, so that the values are bitwise equal.

    Args:
        schedule: the kind and its parameters.
        steps: number of steps of the run.
        dtype: dtype of the computation. In float64 a constant, or a stage of `piecewise`, is exactly the
            number of the config.
    """
    with jax.enable_x64(dtype == np.float64):
        step = jnp.arange(steps)
        return np.asarray(jnp.broadcast_to(build_schedule(schedule, steps)(step), step.shape), dtype)


def zero_from(values: np.ndarray) -> int:
    """Return the first step from which on all values are 0, or their number if there is none."""
    nonzero = np.flatnonzero(values)
    return int(nonzero[-1]) + 1 if nonzero.size else 0


def alpha_soft_scale(gap: jnp.ndarray, margin: float) -> jnp.ndarray:
    """Return the factor of α_s under `until_matched`.

    Args:
        gap: the student's smoothed hard loss minus the teacher's, in nats.
        margin: smallest gap with factor 1. Below it the factor falls linearly to 0 at a gap of 0.
    """
    return jnp.clip(gap / margin, 0.0, 1.0)
