"""The collectives and the memory of compiled programs on eight devices. Only small programs run."""

import contextlib
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dwt_jax.aot import hlo
from dwt_jax.config import Mesh
from dwt_jax.config_loader import build_config
from dwt_jax.data.batch import Batch
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.objectives.mlm import abstract_objective
from dwt_jax.runs.state import abstract_state
from dwt_jax.runs.teacher import TeacherConfig
from dwt_jax.train.step import jit_train_step, make_step_config
from dwt_jax.train.step_schedules import abstract_schedules

SMALL = {
    "vocab_size": 2000,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
BERT_BASE = {"vocab_size": 30522, "num_hidden_layers": 12, "hidden_size": 768}


@contextlib.contextmanager
def captured_stderr(lines):
    """Append what is written to stderr inside the block, by XLA too, to `lines`."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def compile_train_step(model, mesh_sizes, batch_size):
    """(compiled step with a teacher of the same size, abstract state, model config)"""
    config = build_config(
        {"model": model, "train": {"steps": 4, "batch_size": batch_size}, "teacher": {"path": "x"}}
    )
    objective = abstract_objective(config, model["vocab_size"])
    step_config = make_step_config(config, TeacherConfig((config.model,)), objective, Policy())
    state = abstract_state(config.model, config.optimizer)
    rows = jax.ShapeDtypeStruct((batch_size, 128), np.int32)
    batch, schedules = Batch(rows, rows), abstract_schedules(config)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    step = jit_train_step(step_config, make_mesh(Mesh(*mesh_sizes), batch_size))
    teacher = (bert.abstract_params(config.model),)
    lowered = step.lower(state, teacher, batch, schedules, seed, None)
    log = []
    with captured_stderr(log):
        compiled = lowered.compile()
    assert not any("Involuntary full rematerialization" in line for line in log)
    return compiled, state, config.model


def num_parameters(state):
    return sum(x.size for x in jax.tree.leaves(state.params))


@pytest.fixture(scope="module")
def bert_base():
    return compile_train_step(BERT_BASE, (8, 1, 1), 32)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh_sizes", "limit"), [((8, 1, 1), 2.5), ((1, 8, 1), 5), ((2, 4, 1), 5)])
def test_step_sends_weights_but_no_activations(mesh_sizes, limit):
    """Four times the rows send not a byte more, with weights replicated or sharded. fsdp adds to the
    gradient's all-reduce the all-gathers of the weights of student (twice) and teacher."""
    sent = {}
    for batch_size in (16, 64):
        compiled, state, _ = compile_train_step(SMALL, mesh_sizes, batch_size)
        collectives = hlo.find_collectives(compiled.as_text())
        assert all(collective.trip_counts_known for collective in collectives)
        sent[batch_size] = sum(collective.bytes_sent(8) for collective in collectives)
    size = 4 * num_parameters(state)
    assert sent[16] == sent[64]
    assert size < sent[16] < limit * size


@pytest.mark.slow
def test_data_parallel_step_has_only_all_reduces(bert_base):
    compiled, state, _ = bert_base
    text = compiled.as_text()
    kinds = (*hlo.COLLECTIVE_KINDS, "collective-broadcast")
    counts = {kind: len(re.findall(rf"= [^=]*\b{kind}(?:-start)?\(", text)) for kind in kinds}
    assert num_parameters(state) > 109e6
    assert counts.pop("all-reduce") > 0
    assert set(counts.values()) == {0}, counts


def bytes_per_device(tree, model, mesh):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(infer_shardings(tree, model, mesh)), strict=True)
    return sum(int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize for x, sharding in pairs)


@pytest.mark.slow
def test_fsdp_divides_the_state_by_the_number_of_devices(bert_base):
    """Parameters and both moments, fp32; what remains replicated is small."""
    compiled, state, model = bert_base
    data, fsdp = (
        bytes_per_device(state, model, make_mesh(Mesh(*sizes), 32)) for sizes in ((8, 1, 1), (1, 8, 1))
    )
    assert data == pytest.approx(3 * 4 * num_parameters(state), rel=1e-5)
    assert data / 8 <= fsdp < 1.01 * data / 8
    # XLA plans with the same: under data parallelism every device holds the entire state.
    assert compiled.memory_analysis().argument_size_in_bytes >= data


def test_find_collectives_counts_the_all_reduce_of_each_loop_iteration():
    """A loop of 5 iterations, the gradient of a [64, 32] product in each: the bytes of the formula."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(w, x):
        grad = jax.grad(lambda w, x: jnp.tanh(x @ w).sum())
        return jax.lax.scan(lambda w, x: (w - grad(w, x), None), w, x)[0]

    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))
    shapes = jax.ShapeDtypeStruct((64, 32), np.float32), jax.ShapeDtypeStruct((5, 16, 64), np.float32)
    jitted = jax.jit(step, in_shardings=(replicated, rows), out_shardings=replicated)
    (collective,) = hlo.find_collectives(jitted.lower(*shapes).compile().as_text())
    assert collective.group_size in (0, 8)
    assert collective._replace(group_size=8) == hlo.Collective("all-reduce", 64 * 32 * 4, 8, 5, True)
