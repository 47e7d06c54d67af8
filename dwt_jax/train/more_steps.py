"""Resume a run with a larger number of steps, if this does not change its completed steps."""

import dataclasses

import jax
import numpy as np

from dwt_jax.config_loader import build_config
from dwt_jax.data.batch_ramp import rows_per_step
from dwt_jax.files import read_intact_json
from dwt_jax.objectives.schedules import zero_from
from dwt_jax.runs.run_dir import checkpoint_dir
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.step_schedules import schedule_table

LENGTH_KEYS = ("train.steps", "train.epochs")
"""Keys of which the second sets the first."""


def describe_more_steps(run: RunContext) -> str:
    """Describe how the run in the directory continues with the config's larger number of steps.

    Schedules are functions of the elapsed share of the steps. So the learning rate and all other scheduled
    values must be equal at the newest checkpoint for both numbers of steps: each is constant or has not
    begun to decay.

    Returns:
        A line to print; '' if the number is not larger, or would change completed steps.
    """
    saved_config = read_intact_json(run.workdir / "config.json")
    steps = run.config.train.steps
    previous_steps = build_config(saved_config).train.steps if saved_config is not None else 0
    if not 0 < previous_steps < steps:
        return ""
    directory = checkpoint_dir(run.workdir, run.config)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    step = max((int(name) for name in names if name.isdigit()), default=0)
    if step and not _continues(run, previous_steps, step):
        return ""
    return (
        f"{run.workdir}: train.steps is {steps} now, it was {previous_steps}; the run continues from step "
        f"{step}, where the learning rate and all other schedules have the same values for both"
    )


def _continues(run: RunContext, previous_steps: int, step: int) -> bool:
    """Whether step `step` has the same values for both numbers of steps, and all before it the same rows.

    The steps with the teacher so far, which are counted by the schedule, must be as many too.
    """
    train = dataclasses.replace(run.config.train, steps=previous_steps)
    previous_schedules = schedule_table(dataclasses.replace(run.config, train=train))
    pairs = zip(jax.tree.leaves(previous_schedules), jax.tree.leaves(run.schedules), strict=True)
    same_values = all(np.array_equal(before[step - 1], now[step - 1]) for before, now in pairs)
    teacher_end = zero_from(np.asarray(previous_schedules.alpha_soft)) if run.teacher else 0
    same_teacher_steps = min(teacher_end, step) == min(run.teacher_end_step, step)
    same_rows = np.array_equal(rows_per_step(train)[:step], run.batch_sizes[:step])
    return same_values and same_rows and same_teacher_steps
