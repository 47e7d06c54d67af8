"""The training step on a small batch: its config, its inputs, several steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from dwt_jax.config import Config, Distill, Mlm, Optimizer, Schedule, Train
from dwt_jax.data.batch import Batch
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.objectives.mlm import MaskingVocab, MlmObjective
from dwt_jax.runs.state import init_train_state
from dwt_jax.runs.teacher import TeacherConfig
from dwt_jax.train import step as steps
from dwt_jax.train.step_schedules import StepSchedules

B, L = 8, 16
OBJECTIVE = MlmObjective(Mlm(probability=Schedule(value=0.3)), MaskingVocab(119, 4, (0, 1, 2, 3, 4)))
# eps is large: the gradient of a key's bias is zero but for rounding, and Adam would blow it up.
OPTIMIZER = Optimizer(eps=1e-3, weight_decay=0.1, clip_norm=1.0)
SEED = 17


@functools.cache
def one_device():
    """A mesh of one device, however many there are."""
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), types, devices=jax.devices()[:1])


def spec(
    model,
    teacher=None,
    distill=Distill(),
    gradient_accumulation_steps=1,
    soft=Schedule(),
    temperature=2.0,
    optimizer=OPTIMIZER,
):
    config = Config(
        model=model,
        mlm=OBJECTIVE.config,
        distill=dataclasses.replace(distill, alpha_soft=soft, temperature=Schedule(value=temperature)),
        train=Train(gradient_accumulation_steps=gradient_accumulation_steps),
        optimizer=optimizer,
    )
    teacher_config = TeacherConfig((teacher,)) if teacher else None
    return steps.make_step_config(config, teacher_config, OBJECTIVE, Policy())


def place(tree, mesh):
    """A copy on the mesh that may be donated."""
    layout = infer_shardings(tree, BertConfig(), mesh)
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=layout)(tree)


def start(params, mesh=None, optimizer=OPTIMIZER):
    return place(init_train_state(params, BertConfig(), optimizer), mesh or one_device())


def batch(step=0):
    """Rows of one or two documents, some of them short."""
    random = np.random.default_rng(step)
    lengths = np.array([16, 16, 16, 16, 12, 9, 5, 2])
    index = np.arange(L)
    segments = np.where(index < lengths[:, None], np.where(index < 6, 1, 2), 0).astype(np.int32)
    tokens = np.where(segments > 0, random.integers(5, 119, (B, L)), 0).astype(np.int32)
    tokens[:, 0] = 2
    return Batch(tokens, segments)


def schedules(hard=1.0, soft=1.0, temperature=2.0, rate=1e-2):
    return StepSchedules(*np.array([hard, soft, temperature, rate], np.float32))


def run(spec, params, teacher, count, values=schedules(), seed=SEED, mesh=None, state=None):
    """(last state, metrics of each step as floats)"""
    mesh = mesh or one_device()
    step = steps.jit_train_step(spec, mesh)
    teacher = None if teacher is None else (teacher,)
    state = start(params, mesh, spec.optimizer) if state is None else state
    every = []
    for i in range(count):
        state, metrics = step(state, teacher, batch(i), values, np.uint32(seed), None)
        every.append({name: value.item() for name, value in metrics.items()})
    return state, every
