"""What the compiled step says over eight simulated devices, at BERT's size: nothing is computed or stored."""

import json
import subprocess
import sys

import pytest

from helpers.paths import PYTHONPATH
from helpers.runs import environment

PROGRAM = r"""
import json, re, jax, numpy as np
from dwt_jax.runs.state import abstract_state
from dwt_jax.config import Mesh
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.config_loader import build_config
from dwt_jax.data.batch import Batch
from dwt_jax.objectives.mlm import abstract_objective
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Policy
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.runs.state import abstract_state
from dwt_jax.train import step as steps
from dwt_jax.train.step_schedules import abstract_schedules

model = {"vocab_size": 30522, "num_hidden_layers": 12}  # hidden size 768
config = build_config({"model": model, "train": {"steps": 4, "batch_size": 32}, "teacher": {"path": "x"}})
objective = abstract_objective(config, config.model.vocab_size)
spec = steps.make_step_config(config, config.model, objective, Policy())
state = abstract_state(config.model, config.optimizer)

def held(tree, mesh):
    "bytes of a tree on one device"
    shardings = jax.tree.leaves(infer_shardings(tree, config.model, mesh))
    pairs = zip(jax.tree.leaves(tree), shardings, strict=True)
    return sum(int(np.prod(where.shard_shape(x.shape))) * x.dtype.itemsize for x, where in pairs)

data, fsdp = (make_mesh(Mesh(*sizes), 32) for sizes in ((8, 1, 1), (1, 8, 1)))
batch = Batch(*[jax.ShapeDtypeStruct((32, 128), np.int32)] * 2)
schedules, seed = abstract_schedules(config), jax.ShapeDtypeStruct((), np.uint32)
inputs = state, bert.abstract_params(config.model), batch, schedules, seed, None
program = steps.jit_train_step(spec, data).lower(*inputs).compile()
kinds = "all-reduce all-gather reduce-scatter all-to-all collective-permute collective-broadcast".split()
text = program.as_text()
print("FOUND" + json.dumps({
    "collectives": {kind: len(re.findall(rf"= [^=]*\b{kind}(?:-start)?\(", text)) for kind in kinds},
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "data": held(state, data), "fsdp": held(state, fsdp),
    "planned": program.memory_analysis().argument_size_in_bytes,
}))
"""


SENT = r"""
import json, jax, numpy as np
from dwt_jax.config import Mesh
from dwt_jax.config_loader import build_config
from dwt_jax.data.batch import Batch
from dwt_jax.objectives.mlm import abstract_objective
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Policy
from dwt_jax.aot import hlo
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.train import step as steps
from dwt_jax.train.step_schedules import abstract_schedules

sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
found = {}
for mesh in ((8, 1, 1), (1, 8, 1), (2, 4, 1)):
    for rows in (16, 64):
        train = {"steps": 4, "batch_size": rows}
        config = {"model": {"vocab_size": 2000, **sizes}, "train": train, "teacher": {"path": "x"}}
        config = build_config(config)
        objective = abstract_objective(config, config.model.vocab_size)
        spec = steps.make_step_config(config, config.model, objective, Policy())
        state = abstract_state(config.model, config.optimizer)
        batch = Batch(*[jax.ShapeDtypeStruct((rows, 128), np.int32)] * 2)
        schedules, seed = abstract_schedules(config), jax.ShapeDtypeStruct((), np.uint32)
        inputs = state, bert.abstract_params(config.model), batch, schedules, seed, None
        step = steps.jit_train_step(spec, make_mesh(Mesh(*mesh), rows))
        sent = hlo.find_collectives(step.lower(*inputs).compile().as_text())
        assert all(each.known for each in sent)
        found[f"{mesh} {rows}"] = sum(each.sent(8) for each in sent)
found["parameters"] = 4 * sum(x.size for x in jax.tree.leaves(state.params))
print("FOUND" + json.dumps(found))
"""


def told(program):
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = environment(JAX_NUM_CPU_DEVICES="8", XLA_FLAGS=flags, PYTHONPATH=PYTHONPATH)
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[5:])


@pytest.fixture(scope="module")
def found():
    return told(PROGRAM)


@pytest.mark.slow
def test_weights_are_sent_and_activations_are_not():
    """Four times the rows, and not a byte more, with weights whole or spread. What fsdp adds to the
    gradient's all-reduce: the weights of student (twice) and teacher, gathered."""
    sent = told(SENT)
    size = sent.pop("parameters")
    for mesh, most in (((8, 1, 1), 2.5), ((1, 8, 1), 5), ((2, 4, 1), 5)):
        few, many = (sent[f"{mesh} {rows}"] for rows in (16, 64))
        assert few == many, mesh
        assert size < few < most * size, mesh


@pytest.mark.slow
def test_data_parallel_needs_all_reduces_only(found):
    assert found["parameters"] > 109e6
    assert found["collectives"].pop("all-reduce") > 0
    assert set(found["collectives"].values()) == {0}, found["collectives"]


@pytest.mark.slow
def test_fsdp_divides_the_state_by_the_number_of_devices(found):
    """Parameters and both moments, fp32; what is left whole is small."""
    assert found["data"] == pytest.approx(3 * 4 * found["parameters"], rel=1e-5)
    assert found["data"] / 8 <= found["fsdp"] < 1.01 * found["data"] / 8
    assert found["planned"] >= found["data"]  # XLA plans with the same: every device holds all of it
