"""One side of train_step.py: the DWT step of dwt_jax. Reads 'run N', answers seconds for N steps."""

import argparse
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--size", default="4x256")
parser.add_argument("--precision", default="float32")
options = parser.parse_args()
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers

from shapes import LENGTH, MASKED, SHAPES, Shape  # noqa: E402

from dwt_jax import runtime_env  # noqa: E402

runtime_env.set_xla_env()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from dwt_jax.config import Mesh  # noqa: E402
from dwt_jax.config_loader import build_config  # noqa: E402
from dwt_jax.data.batch import Batch  # noqa: E402
from dwt_jax.distributed.mesh import batch_sharding, make_mesh, replicated_sharding  # noqa: E402
from dwt_jax.models import family  # noqa: E402
from dwt_jax.models.common.sharding import infer_shardings  # noqa: E402
from dwt_jax.objectives import objective_module  # noqa: E402
from dwt_jax.runs.state import init_train_state  # noqa: E402
from dwt_jax.runs.teacher import TeacherConfig  # noqa: E402
from dwt_jax.train.setup import resolve_precision  # noqa: E402
from dwt_jax.train.step import jit_train_step, make_step_config  # noqa: E402
from dwt_jax.train.step_schedules import StepSchedules  # noqa: E402


def config(shape: Shape):
    masks = {} if shape.model_type == "llama" else {"mlm": {"probability": MASKED / LENGTH}}
    return build_config(
        {
            "model": {"model_type": shape.model_type, **shape.keys()},
            **masks,
            "data": {"sequence_length": LENGTH},
            "train": {"steps": 1000, "batch_size": shape.rows},
            "optimizer": {"clip_norm": 0.0},
            "precision": {"compute_dtype": options.precision},
        }
    )


shape = SHAPES[options.size]
student, teacher = config(shape), config(shape.of_teacher()).model
policy = resolve_precision(student)
mesh = make_mesh(Mesh(), shape.rows)
module = family(teacher)
objective = objective_module(teacher.objective).abstract_objective(student, shape.vocab_size)
spec = make_step_config(student, TeacherConfig((teacher,)), objective, policy)


def init_state():
    params = module.init_params(student.model, jax.random.key(0))
    return init_train_state(params, student.model, student.optimizer)


state = jax.jit(init_state, out_shardings=infer_shardings(jax.eval_shape(init_state), student.model, mesh))()
teacher_params = module.init_params(teacher, jax.random.key(1))
teacher_params = jax.tree.map(lambda x: x.astype(policy.compute_dtype), teacher_params)
teacher_params = jax.device_put(teacher_params, infer_shardings(teacher_params, teacher, mesh))
random = np.random.default_rng(0)
tokens = random.integers(1000, 30000, (shape.rows, LENGTH)).astype(np.uint16)
segments = (1 + (np.arange(LENGTH)[None] >= random.integers(40, 100, (shape.rows, 1)))).astype(np.uint8)
batch = jax.device_put(Batch(tokens, segments), batch_sharding(mesh))
schedules = StepSchedules(*np.array([1.0, 1.0, 1.0, 1e-4], np.float32))
schedules = jax.device_put(schedules, replicated_sharding(mesh))
seed = jax.device_put(np.uint32(0), replicated_sharding(mesh))
step = jit_train_step(spec, mesh)


def run(count: int) -> float:
    global state
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, (teacher_params,), batch, schedules, seed, None)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


run(5)  # until the heap has its size
answers.write(f"ready jax {jax.__version__}\n")
for line in sys.stdin:
    answers.write(f"{run(int(line.split()[1])):.6f}\n")
