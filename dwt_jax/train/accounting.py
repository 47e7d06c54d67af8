"""The cost of a run: FLOPs, and the steps with the teacher."""

import jax
import numpy as np

from dwt_jax.models import flops
from dwt_jax.objectives import objective_module
from dwt_jax.runs.optimizer import optimizer_flops
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.step import StepConfig


def step_flops(config: StepConfig, length: int, rows: int) -> tuple[float, float]:
    """Return the FLOPs of one step: (the student's, its teacher's forward pass).

    The student's include those of the optimizer, which do not depend on the number of rows.

    Args:
        config: of the step with the teacher, if there is one.
        length: positions a row.
        rows: of the batch.
    """
    predictions = objective_module(config.objective).predictions_per_row(config.objective, length)
    shape = rows, length, predictions
    student_flops = flops.training_step_flops(config.model, *shape) + optimizer_flops(
        config.optimizer, config.model
    )
    return student_flops, config.teacher.forward_flops(*shape) if config.teacher else 0.0


def flops_by_step(config: StepConfig, length: int, batch_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `step_flops` of each step, two arrays float64 [steps].

    Args:
        config: of the step with the teacher, if there is one.
        length: positions a row.
        batch_sizes: rows of each step, int [steps].
    """
    sizes, stages = np.unique(batch_sizes, return_inverse=True)
    student_flops, teacher_flops = np.array([step_flops(config, length, int(size)) for size in sizes]).T
    return student_flops[stages], teacher_flops[stages]


def get_teacher_end_step(run: RunContext, teacher_matched_step: jax.Array, step: int) -> int:
    """Return the first step without the teacher, as known after `step` steps.

    `until_matched` takes effect only where metrics are logged, so that a resumed run switches at the
    same step as an uninterrupted one.

    Args:
        run: the run.
        teacher_matched_step: int scalar, the step at which the student matched the teacher; -1: not yet.
        step: number of completed steps.
    """
    if not run.teacher:
        return 0
    matched_step = int(jax.device_get(teacher_matched_step))
    if run.step_config.until_matched and matched_step >= 0:
        every = run.config.train.log_every
        switch_step = (matched_step // every + 1) * every
        return switch_step if switch_step <= step else run.teacher_end_step
    return run.teacher_end_step


def flops_so_far(run: RunContext, step: int, teacher_steps: int) -> dict[str, float]:
    """Return cumulative FLOPs after `step` steps, the first `teacher_steps` with the teacher.

    They include those inherited from a run that was grown into this one.
    """
    source_steps = run.growth.step if run.growth else 0
    source_flops = (run.growth.student_flops, run.growth.teacher_flops) if run.growth else (0.0, 0.0)
    return {
        "student_flops": source_flops[0] + float(run.student_flops[source_steps:step].sum()),
        "teacher_flops": source_flops[1] + float(run.teacher_flops[source_steps:teacher_steps].sum()),
    }


def computed_flops(run: RunContext, start: int, stop: int, teacher_end_step: int) -> float:
    """Return the FLOPs that steps from `start` to before `stop` compute.

    The teacher's are among them before `teacher_end_step`, unless its answers come from a cache: those are
    charged to the run by `flops_so_far`, but they were computed before.
    """
    teacher_stop = start if isinstance(run.teacher, CachedTeacher) else min(stop, teacher_end_step)
    return float(run.student_flops[start:stop].sum() + run.teacher_flops[start:teacher_stop].sum())
