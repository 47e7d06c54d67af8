"""What a run has used: teacher steps and FLOPs."""

import jax

from dwt_jax.train.run_context import RunContext


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
        "student_flops": source_flops[0] + (step - source_steps) * run.student_flops,
        "teacher_flops": source_flops[1] + max(0, teacher_steps - source_steps) * run.teacher_flops,
    }
