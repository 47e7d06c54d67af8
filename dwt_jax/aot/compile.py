"""`dwt compile`: the real training step, compiled for chips that are not here. Compiled, not run.

XLA's compilers for TPU and GPU need no device, only a description of one. What they say of
memory is what they would plan there, and an overflow is theirs; the times are bounds from
peak numbers (chips.py), no measurements.
"""

import dataclasses
import importlib.util
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dwt_jax import config_loader
from dwt_jax.aot import hlo
from dwt_jax.aot.accelerators import TOPOLOGY_EXAMPLES, Chip, parse_topology
from dwt_jax.aot.gpu_targets import gpu_target_config
from dwt_jax.config import Config, Init
from dwt_jax.data.batch import Batch
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import mesh_shape
from dwt_jax.errors import UserError
from dwt_jax.files import read_json_object
from dwt_jax.hf.config import load_hf_config
from dwt_jax.models import family, flops
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import objective_module
from dwt_jax.runs.state import abstract_state
from dwt_jax.train.step import StepConfig, jit_train_step, make_step_config
from dwt_jax.train.step_schedules import abstract_schedules

WHEELS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
EXTRAS = {"tpu": "requirements-tpu-compile.txt", "cuda": "requirements-gpu-compile.txt"}


class CompiledStep(NamedTuple):
    """A step that was compiled, or did not fit. Bytes are one chip's."""

    topology: str
    chips: int
    mesh: dict[str, int]
    student: str
    teacher: str
    rows: int  # a step, over all chips
    length: int
    fits: bool
    memory: dict[str, float]  # as the compiler planned it; of what did not fit what it said
    collectives: list[dict[str, Any]]  # by kind
    loops_known: bool  # else some loop counts once
    flops: float  # of a step, by formula, over all chips
    seconds: dict[str, float]  # bounds: compute, memory, network
    compile_seconds: float
    said: str = ""  # by the compiler, where it did not fit


class CompileTarget(NamedTuple):
    """What to compile for."""

    topology: str
    chip: Chip
    mesh: Mesh
    config: Config  # resolved
    spec: StepConfig
    uint16_tokens: bool  # whether ids are stored in 16 bits


def make_compile_target(config: Config, topology: str) -> CompileTarget:
    """Raises UserError for an unknown topology, a mesh that does not fit it, compilers that are not
    installed, and a teacher whose sizes cannot be read."""
    chip, count = parse_topology(topology)
    shape = mesh_shape(
        config.mesh, count, config.train.batch_size // config.train.gradient_accumulation_steps
    )
    devices = np.asarray(_topology_devices(chip, topology, count, shape))
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    vocab_size = _vocabulary_size(config)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    config = dataclasses.replace(config, model=model, init=Init())
    teacher = _load_teacher_config(config.teacher.path, vocab_size) if config.teacher.path else None
    compute = config.precision.compute_dtype
    policy = jnp.dtype("bfloat16" if compute == "auto" else compute)
    objective = objective_module(family(model).OBJECTIVE).abstract_objective(config, vocab_size)
    spec = make_step_config(config, teacher, objective, Policy(policy, policy, False))
    return CompileTarget(topology, chip, mesh, config, spec, vocab_size <= 2**16)


def _topology_devices(chip: Chip, topology: str, count: int, shape: list[int]) -> Any:
    """The devices of a topology, laid out as the mesh."""
    if not any(importlib.util.find_spec(name) for name in WHEELS[chip.platform]):
        raise UserError(
            f"--topology: {topology} needs a compiler that is not installed, expected "
            f"pip install -r {EXTRAS[chip.platform]}"
        )
    try:
        if chip.platform == "tpu":
            topology_desc = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **dict(chip.options)
            )
        else:
            topology_desc = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=f"1x1x{count}",  # one partition, one host
                target_config=gpu_target_config(chip),
            )
        return topologies.make_mesh(topology_desc, shape, ("data", "fsdp", "tensor")).devices
    except Exception as error:  # many kinds
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--topology: {topology}: {message}; expected one like {TOPOLOGY_EXAMPLES}") from None


def _vocabulary_size(config: Config) -> int:
    """That the data will have, as far as it can be known without it."""
    tokenizer = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    return len(load_vocabulary(tokenizer.path).tokens) if tokenizer.path else tokenizer.vocab_size


def _load_teacher_config(path: str, vocab_size: int) -> ModelConfig:
    """Sizes of the teacher in `path`: a run, a model directory or, here alone, the config of a run."""
    file = Path(path).expanduser() / "config.json"
    if file.exists():
        saved_config = read_json_object(file, "the config of a run or of a model")
        is_run = isinstance(saved_config.get("model"), dict)
        model = (
            config_loader.build_config(saved_config).model if is_run else load_hf_config(file.parent).model
        )
    elif path.partition(":")[0].endswith(".py"):
        model = config_loader.load_model_config(path)
    else:
        raise UserError(
            f"teacher.path: no {file}, expected a run, a model directory or the config of one: x.py:teacher"
        )
    return dataclasses.replace(model, vocab_size=vocab_size)


def lower_step(target: CompileTarget, rows: int) -> Any:
    """The step of `rows` rows, traced and lowered for the target's platform."""
    spec, struct = target.spec, jax.ShapeDtypeStruct
    shape = rows, target.config.data.sequence_length
    tokens_dtype = jnp.uint16 if target.uint16_tokens else jnp.uint32
    batch = jax.eval_shape(lambda: Batch(jnp.zeros(shape, tokens_dtype), jnp.zeros(shape, jnp.uint8)))
    teacher = None
    if spec.teacher:
        dtype_name = target.config.teacher.dtype
        dtype = spec.policy.compute_dtype if dtype_name == "auto" else jnp.dtype(dtype_name)
        teacher = jax.tree.map(
            lambda x: struct(x.shape, dtype), family(spec.teacher).abstract_params(spec.teacher)
        )
    state = abstract_state(spec.model, spec.optimizer)
    schedules, seed = abstract_schedules(target.config), struct((), jnp.uint32)
    traced = jit_train_step(spec, target.mesh).trace(state, teacher, batch, schedules, seed, None)
    return traced.lower(lowering_platforms=(target.chip.platform,))


def compile_step(target: CompileTarget, rows: int) -> CompiledStep:
    """Compile the step of `rows` rows over all chips. What does not fit is an answer, not an error."""
    start_time, message, program, hlo_text = time.perf_counter(), "", None, ""
    try:
        program, hlo_text = compile_with_hlo_text(lower_step(target, rows))
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
    compile_seconds = time.perf_counter() - start_time
    memory = _memory_plan(program.memory_analysis()) if program else parse_oom_message(message)
    memory["available"] = target.chip.memory
    collectives = hlo.find_collectives(hlo_text) if program else []
    spec, length = target.spec, target.config.data.sequence_length
    shape = rows, length, objective_module(spec.objective).predictions_per_row(spec.objective, length)
    step_flops = flops.training_step_flops(spec.model, *shape)
    step_flops += flops.forward_flops(spec.teacher, *shape) if spec.teacher else 0.0
    chips = target.mesh.size
    bytes_sent = sum(each.bytes_sent(chips) for each in collectives)
    peak = target.chip.flops * (
        0.5 if spec.policy.compute_dtype == jnp.float32 else 1
    )  # as flops.peak_per_device
    bounds = {"compute": step_flops / chips / peak}
    if program:
        bounds["memory"] = _memory_traffic(program.memory_analysis()) / target.chip.bandwidth
        bounds["network"] = bytes_sent / target.chip.network
    return CompiledStep(
        topology=target.topology,
        chips=chips,
        mesh=dict(target.mesh.shape),
        student=_describe_model(spec.model),
        teacher=_describe_model(spec.teacher) if spec.teacher else "",
        rows=rows,
        length=length,
        fits=program is not None and memory["together"] <= target.chip.memory,
        memory=memory,
        collectives=_sum_by_kind(collectives, chips),
        loops_known=all(each.trip_counts_known for each in collectives),
        flops=step_flops,
        seconds=bounds,
        compile_seconds=compile_seconds,
        said=message[:500],
    )


def compile_with_hlo_text(step: Any) -> tuple[Any, str]:
    """The compiled program and its text, as the compiler itself writes it down: `as_text()` has jaxlib
    read the program back, which fails for what a newer libtpu made (a v5p's gathers on SparseCores)."""
    with tempfile.TemporaryDirectory() as folder:
        program = step.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (dump,) = Path(folder).glob("*after_optimizations.txt")
        return program, dump.read_text()


def _memory_plan(plan: Any) -> dict[str, float]:
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes - plan.alias_size_in_bytes,  # that take no argument's place
        "temporaries": plan.temp_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
    }
    return {**parts, "together": sum(parts.values())}


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_oom_message(message: str) -> dict[str, float]:
    """The sizes in a compiler's words on memory: `wanted`, and which of it (`what` is left in `said`)."""
    match = re.search(
        r"(?:required for [^()]*|Used |allocate )\(?(\d+(?:\.\d+)?)\s*([BKMGT]?)i?B?\)?", message
    )
    return {"wanted": float(match[1]) * _UNITS[match[2]]} if match else {}


def _memory_traffic(plan: Any) -> float:
    """Bytes through the memory of a chip at the least: arguments read, what takes their place (not the
    teacher's) and results written, temporaries written and read once."""
    return plan.argument_size_in_bytes + plan.output_size_in_bytes + 2 * plan.temp_size_in_bytes


def _sum_by_kind(collectives: list[hlo.Collective], chips: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "count": sum(each.executions for each in collectives if each.kind == kind),
            "bytes": sum(each.executions * each.bytes for each in collectives if each.kind == kind),
            "sent": sum(each.bytes_sent(chips) for each in collectives if each.kind == kind),
        }
        for kind in hlo.COLLECTIVE_KINDS
        if any(each.kind == kind for each in collectives)
    ]


def _describe_model(model: ModelConfig) -> str:
    return f"{model.num_hidden_layers} x {model.hidden_size}"


def find_largest_batch(
    target: CompileTarget, rows: int, log: Any
) -> tuple[CompiledStep | None, CompiledStep]:
    """(the step of the most rows that fits, the next one, which does not), from `rows` on: doubled or
    halved, then bisected to whole rows a chip. None if not even one row a chip fits."""
    unit = target.mesh.shape["data"] * target.mesh.shape["fsdp"] * target.spec.gradient_accumulation_steps
    largest_fit, smallest_overflow = None, None
    low, high, candidate = 0, 0, max(1, rows // unit)
    while not high or high - low > max(1, low // 16):
        step = compile_step(target, candidate * unit)
        log(f"{step.rows} rows: {'fits' if step.fits else 'does not fit'} ({step.compile_seconds:.0f} s)")
        if step.fits:
            largest_fit, low = step, candidate
        else:
            smallest_overflow, high = step, candidate
        candidate = (low + high) // 2 if low and high else (2 * low if low else high // 2)
        if not candidate:
            break
    assert smallest_overflow is not None
    return largest_fit, smallest_overflow
