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

runtime_env.tune()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dwt_jax.config import Mesh  # noqa: E402
from dwt_jax.config_loader import build  # noqa: E402
from dwt_jax.distributed.mesh import make_mesh, replicated, rows_sharding, shardings  # noqa: E402
from dwt_jax.models import bert  # noqa: E402
from dwt_jax.objectives.masking import Tokens  # noqa: E402
from dwt_jax.train.setup import numerics_of  # noqa: E402
from dwt_jax.train.step import compiled, initial_state, spec_of  # noqa: E402


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
    return build(
        {
            "model": sizes(name),
            "mask": {"rate": 20 / 128},
            "train": {"steps": 1000, "batch_size": options.rows},
            "optimizer": {"clip_norm": 0.0},
            "precision": {"compute": options.precision},
        }
    )


student, teacher = config(options.student), config(options.teacher).model
numerics = numerics_of(student)
mesh = make_mesh(Mesh(), options.rows)
spec = spec_of(student, teacher, Tokens(30522, 103, (0, 100, 101, 102, 103)), numerics)
fresh = jax.eval_shape(lambda: initial_state(bert.init(student.model, jax.random.key(0)), student.optimizer))
state = jax.jit(
    lambda: initial_state(bert.init(student.model, jax.random.key(0)), student.optimizer),
    out_shardings=shardings(fresh, mesh),
)()
teacher_params = bert.init(teacher, jax.random.key(1))
teacher_params = jax.tree.map(lambda x: x.astype(numerics.compute), teacher_params)
teacher_params = jax.device_put(teacher_params, shardings(teacher_params, mesh))
random = np.random.default_rng(0)
tokens = random.integers(1000, 30000, (options.rows, 128)).astype(np.uint16)
segments = (1 + (np.arange(128)[None] >= random.integers(40, 100, (options.rows, 1)))).astype(np.uint8)
batch = jax.device_put({"tokens": tokens, "segments": segments}, rows_sharding(mesh))
knobs = jax.device_put(jnp.array([1.0, 1.0, 1.0, 1e-4], jnp.float32), replicated(mesh))
seed = jax.device_put(np.uint32(0), replicated(mesh))
step = compiled(spec, mesh)


def run(count: int) -> float:
    global state
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, teacher_params, batch, knobs, seed)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


run(5)  # until the heap has its size
answers.write(f"ready jax {jax.__version__}\n")
for line in sys.stdin:
    answers.write(f"{run(int(line.split()[1])):.6f}\n")
