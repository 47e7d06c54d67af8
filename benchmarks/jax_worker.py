"""One side of train_step.py: the DWT step of dwt_jax. Reads 'run N', answers seconds for N steps."""

import argparse
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--student", default="4x256")
parser.add_argument("--teacher", default="2x256")
parser.add_argument("--rows", type=int, default=32)
parser.add_argument("--precision", default="float32")
options = parser.parse_args()
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers

from dwt_jax import runtime_env  # noqa: E402

runtime_env.set_xla_env()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from dwt_jax.config import Mesh  # noqa: E402
from dwt_jax.config_loader import build_config  # noqa: E402
from dwt_jax.data.batch import Batch  # noqa: E402
from dwt_jax.distributed.mesh import batch_sharding, make_mesh, replicated_sharding  # noqa: E402
from dwt_jax.models import bert  # noqa: E402
from dwt_jax.models.common.sharding import infer_shardings  # noqa: E402
from dwt_jax.objectives.mlm import MaskingVocab, MlmObjective  # noqa: E402
from dwt_jax.runs.state import init_train_state  # noqa: E402
from dwt_jax.runs.teacher import TeacherConfig  # noqa: E402
from dwt_jax.train.setup import resolve_precision  # noqa: E402
from dwt_jax.train.step import jit_train_step, make_step_config  # noqa: E402
from dwt_jax.train.step_schedules import StepSchedules  # noqa: E402


def sizes(name: str) -> dict[str, object]:
    layers, hidden = map(int, name.split("x"))
    return {
        "vocab_size": 30522,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def config(name: str):
    return build_config(
        {
            "model": sizes(name),
            "mlm": {"probability": 20 / 128},
            "train": {"steps": 1000, "batch_size": options.rows},
            "optimizer": {"clip_norm": 0.0},
            "precision": {"compute_dtype": options.precision},
        }
    )


student, teacher = config(options.student), config(options.teacher).model
policy = resolve_precision(student)
mesh = make_mesh(Mesh(), options.rows)
objective = MlmObjective(student.mlm, MaskingVocab(30522, 103, (0, 100, 101, 102, 103)))
spec = make_step_config(student, TeacherConfig((teacher,)), objective, policy)
fresh = jax.eval_shape(
    lambda: init_train_state(
        bert.init_params(student.model, jax.random.key(0)), student.model, student.optimizer
    )
)
state = jax.jit(
    lambda: init_train_state(
        bert.init_params(student.model, jax.random.key(0)), student.model, student.optimizer
    ),
    out_shardings=infer_shardings(fresh, student.model, mesh),
)()
teacher_params = bert.init_params(teacher, jax.random.key(1))
teacher_params = jax.tree.map(lambda x: x.astype(policy.compute_dtype), teacher_params)
teacher_params = jax.device_put(teacher_params, infer_shardings(teacher_params, teacher, mesh))
random = np.random.default_rng(0)
tokens = random.integers(1000, 30000, (options.rows, 128)).astype(np.uint16)
segments = (1 + (np.arange(128)[None] >= random.integers(40, 100, (options.rows, 1)))).astype(np.uint8)
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
