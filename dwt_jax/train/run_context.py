"""The constants of a run, from its first step to its last."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dwt_jax.config import Config
from dwt_jax.data.dataset import PackedDataset
from dwt_jax.models.common.matmul import Policy
from dwt_jax.runs.teacher import LoadedTeacher
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.train.initialize import GrowthSource
from dwt_jax.train.step import StepConfig
from dwt_jax.train.step_schedules import StepSchedules


class ResolvedConfig(Config):
    """A config whose vocabulary size, padding id and number of steps are set (`setup.resolve_config`).

    `Config` is the config as the user wrote it.
    """


@dataclass(frozen=True)
class RunContext:
    """The constants of a run: the resolved config and the data and models that it names."""

    config: ResolvedConfig
    workdir: Path
    data: Path
    rows: PackedDataset
    mesh: jax.sharding.Mesh
    policy: Policy
    teacher: LoadedTeacher | CachedTeacher | None
    growth: GrowthSource | None  # what the student is grown from; None: random initialisation
    no_teacher_config: StepConfig  # of the step without the teacher
    step_config: StepConfig  # of the step with it, if there is one
    schedules: StepSchedules  # of all steps, float32 [steps]
    batch_sizes: np.ndarray  # rows of each step over all processes, int64 [steps]
    teacher_end_step: int  # the first step from which α_s is 0, according to the schedule
    student_flops: np.ndarray  # of each step, those of the optimizer included, float64 [steps]
    teacher_flops: np.ndarray  # of each step, if it uses the teacher, float64 [steps]
