"""A worker of time_to_loss.py: dwt_jax. Reads 'run N' and 'loss', answers seconds and nats."""

import json
import os
import sys
import time
from pathlib import Path

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers
variant, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())

from dwt_jax import runtime_env  # noqa: E402

runtime_env.set_xla_env()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from dwt_jax.config_loader import load_config  # noqa: E402
from dwt_jax.data.batch import Batch  # noqa: E402
from dwt_jax.data.dataset import batch_iterator, get_batch  # noqa: E402
from dwt_jax.distributed.mesh import local_row_indices, make_global_batch, replicated_sharding, to_global  # noqa: E402
from dwt_jax.eval import likelihood  # noqa: E402
from dwt_jax.models import family  # noqa: E402
from dwt_jax.models.common.lm_head import lm_head_logits  # noqa: E402
from dwt_jax.objectives.distillation import cross_entropy  # noqa: E402
from dwt_jax.runs.checkpoint import Checkpoints  # noqa: E402
from dwt_jax.runs.run_dir import checkpoint_dir  # noqa: E402
from dwt_jax.runs.teacher import shard_params  # noqa: E402
from dwt_jax.train.run_state import init_or_restore_state  # noqa: E402
from dwt_jax.train.setup import setup_run  # noqa: E402
from dwt_jax.train.step import jit_train_step  # noqa: E402
from dwt_jax.train.summary import export_and_summarize  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SPECS = {
    "bert": f"{CONFIGS}/small_bert.py:2x128",
    "recipe": f"{CONFIGS}/modernbert.py:{settings['student']}",
    "taught": f"{CONFIGS}/modernbert.py:{settings['student']}",
    "teacher": f"{CONFIGS}/modernbert.py:{settings['teacher']}",
}
workdir = Path(settings["workdir"]) / variant
layers, width = map(int, settings["student"].split("x"))
overrides = {
    **settings["overrides"],
    "seed": "0" if variant == "teacher" else str(settings["seed"]),
    "data.path": settings["data"],
    "data.sequence_length": str(settings["length"]),
    "data.row_mode": "wrapped",
    "train.steps": str(settings["steps"]),
    "train.batch_size": str(settings["batch_size"]),
    "precision.compute_dtype": settings["precision"],
}
if variant == "bert":
    overrides |= {
        "model.num_hidden_layers": str(layers),
        "model.hidden_size": str(width),
        "model.num_attention_heads": str(width // 32),
        "model.intermediate_size": str(4 * width),
        "model.max_position_embeddings": str(settings["length"]),
    }
if variant == "taught":
    overrides |= {
        "teacher.path": str(Path(settings["workdir"]) / "teacher"),
        "distill.preset": "early_decay",
    }
workdir.mkdir()
run = setup_run(load_config(SPECS[variant], overrides), workdir)
checkpoints = Checkpoints(checkpoint_dir(workdir, run.config), 1)
state, step = init_or_restore_state(run, checkpoints)
no_teacher_step = jit_train_step(run.no_teacher_config, run.mesh)
distill_step = jit_train_step(run.step_config, run.mesh)
teacher_params = shard_params(run.teacher, run.mesh) if run.teacher else None
replicated, batch_size = replicated_sharding(run.mesh), run.config.train.batch_size
seed, local_rows = to_global(np.uint32(0), replicated), local_row_indices(run.mesh, batch_size)
batches = batch_iterator(run.rows, 0, batch_size, 0, run.config.train.steps, slice(None), 2)
with np.load(settings["rows"]) as rows:
    held_out = {name: rows[name] for name in rows if name != "train"}
MODEL = run.config.model


def compile_both_steps() -> None:
    """Take each step on a copy of the state, so that none is compiled in the middle of the run."""
    batch = make_global_batch(get_batch(run.rows, 0, 0, batch_size), local_rows, run.mesh, batch_size)
    schedules = to_global(run.schedules[0], replicated)
    for train_step, params in ((distill_step, teacher_params), (no_teacher_step, None)):
        train_step(jax.tree.map(jnp.copy, state), params, batch, schedules, seed, None)


def train(count: int) -> float:
    """The loop of dwt_jax.train.loop, without its hooks."""
    global state, step
    start = time.perf_counter()
    if step == 0 and run.teacher is not None:
        compile_both_steps()
    for _ in range(count):
        batch = make_global_batch(next(batches), local_rows, run.mesh, batch_size)
        schedules = to_global(run.schedules[step], replicated)
        taught = run.teacher is not None and step < run.teacher_end_step
        train_step, params = (distill_step, teacher_params) if taught else (no_teacher_step, None)
        state, metrics = train_step(state, params, batch, schedules, seed, None)
        step += 1
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


@jax.jit
def loss_sum(params, batch: Batch, positions, labels, weights):
    hidden = family(MODEL).encode(params, MODEL, batch.tokens, batch.segment_ids, positions=positions)
    return (cross_entropy(lm_head_logits(params, MODEL, hidden), labels) * weights).sum()


def held_out_loss() -> float:
    total = 0.0
    for start in range(0, len(held_out["inputs"]), 64):
        part = {name: array[start : start + 64] for name, array in held_out.items()}
        batch = Batch(part["inputs"], part["held_out_segments"])
        total += float(loss_sum(state.params, batch, part["positions"], part["labels"], part["weights"]))
    return total / float(held_out["weights"].sum())


parameters = sum(x.size for x in jax.tree.leaves(state.params))
answers.write(json.dumps({"parameters": parameters, "version": f"jax {jax.__version__}"}) + "\n")
for line in sys.stdin:
    request, _, count = line.partition(" ")
    answers.write(f"{train(int(count)) if request == 'run' else held_out_loss():.6f}\n")
if variant == "teacher":  # for the student that reads it
    losses = likelihood.losses_per_document(state.params, MODEL, run.data, mesh=run.mesh)
    export_and_summarize(run, state, 0, likelihood.summarize_losses(losses), 0.0)
