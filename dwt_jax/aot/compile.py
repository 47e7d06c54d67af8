"""Ahead-of-time compilation of the training step for accelerators that need not be present.

XLA's compilers for TPU and GPU need only a description of the device. Memory use and out-of-memory
errors are the compiler's own; times are roofline bounds from peak rates (accelerators.py), not
measurements.
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
from dwt_jax.files import user_path
from dwt_jax.hf.config import load_hf_config
from dwt_jax.logs import logger
from dwt_jax.model_files import read_model_json
from dwt_jax.models import flops
from dwt_jax.models.common.attention_backends import choose_backend
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import objective_module
from dwt_jax.runs.optimizer import optimizer_flops
from dwt_jax.runs.state import abstract_state
from dwt_jax.runs.teacher import TeacherConfig, check_teacher_objective, make_teacher_config
from dwt_jax.train.step import StepConfig, jit_train_step, make_step_config
from dwt_jax.train.step_schedules import abstract_schedules

WHEELS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
EXTRAS = {"tpu": "requirements-tpu-compile.txt", "cuda": "requirements-gpu-compile.txt"}


class CompiledStep(NamedTuple):
    """The result of compiling a step: the object that `dwt compile --json` prints.

    Attributes:
        topology: as given in `--topology`.
        num_chips: chips of the topology; where a chip has several devices (tpu7x), devices.
        mesh: devices per mesh axis.
        student: layers x hidden size.
        teacher: layers x hidden size of each model; empty without a teacher.
        batch_size: rows of a step, over all chips.
        sequence_length: tokens of a row.
        attention: back end of attention.
        fits: whether the step fits into the memory of a chip.
        memory: bytes of one chip: `available`, and the compiler's plan: `arguments`, `outputs` (those that
            alias no argument), `temporaries`, `generated_code` and their `total`. If the compiler ran out
            of memory: `available`, and `required` if its message has it.
        collectives: for each kind `count`, `bytes` and `bytes_sent` (by a chip) of a step.
        trip_counts_known: False if a loop with collectives has an unknown trip count and is counted once.
        flops: FLOPs of a step by formula, over all chips.
        roofline_seconds: lower bounds on the time of a step at peak rates: `compute`, `memory`, `network`.
        compile_seconds: time that compiling took.
        compiler_message: the error message if the compiler ran out of memory.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    student: str
    teacher: str
    batch_size: int
    sequence_length: int
    attention: str
    fits: bool
    memory: dict[str, float]
    collectives: list[dict[str, Any]]
    trip_counts_known: bool
    flops: float
    roofline_seconds: dict[str, float]
    compile_seconds: float
    compiler_message: str = ""


class CompileTarget(NamedTuple):
    """What to compile, and for which devices.

    Attributes:
        topology: as given in `--topology`.
        chip: specifications of its chips.
        mesh: the mesh over them.
        config: the config of the run, with the vocabulary's size filled in.
        step_config: of the training step.
        uint16_tokens: whether token ids are stored in 16 bits.
    """

    topology: str
    chip: Chip
    mesh: Mesh
    config: Config
    step_config: StepConfig
    uint16_tokens: bool


def make_compile_target(config: Config, topology: str) -> CompileTarget:
    """Resolve a config and a topology into what to compile.

    For a batch ramp only the last stage, the full batch, is compiled: it needs the most memory.

    Raises:
        UserError: the topology is unknown, the mesh does not fit it, its compiler is not installed, or
            the teacher's config cannot be read.
    """
    chip, count = parse_topology(topology)
    shape = mesh_shape(
        config.mesh, count, config.train.batch_size // config.train.gradient_accumulation_steps
    )
    devices = np.asarray(_topology_devices(chip, topology, count, shape))
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    vocab_size = _vocabulary_size(config)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    config = dataclasses.replace(config, model=model, init=Init())
    if config.teacher.cache:
        raise UserError(
            "config: teacher.cache is set, expected it empty: dwt compile has the teacher in the step"
        )
    teachers = [_load_teacher_config(path, vocab_size) for path in config.teacher.model_paths]
    for path, one in zip(config.teacher.model_paths, teachers, strict=True):
        check_teacher_objective(config.teacher.path_key, path, one, model)
    teacher = make_teacher_config(teachers, config.teacher.weights) if teachers else None
    compute_dtype = config.precision.compute_dtype
    dtype = jnp.dtype("bfloat16" if compute_dtype == "auto" else compute_dtype)
    objective = objective_module(model.objective).abstract_objective(config, vocab_size)
    models = [model, *teachers]
    length = config.data.sequence_length
    backend = choose_backend(config.precision.attention, models, dtype, chip.platform, length)
    step_config = make_step_config(config, teacher, objective, Policy(dtype, dtype, attention=backend))
    return CompileTarget(topology, chip, mesh, config, step_config, vocab_size <= 2**16)


def _topology_devices(chip: Chip, topology: str, count: int, shape: list[int]) -> Any:
    """The devices of a topology, arranged as the mesh."""
    if not any(importlib.util.find_spec(name) for name in WHEELS[chip.platform]):
        raise UserError(
            f"--topology: {topology} needs a compiler that is not installed, expected "
            f"pip install -r {EXTRAS[chip.platform]}"
        )
    try:
        if chip.platform == "tpu":
            topology_desc = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **dict(chip.topology_options)
            )
        else:
            topology_desc = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=f"1x1x{count}",  # partitions x hosts x devices
                target_config=gpu_target_config(chip),
            )
        return topologies.make_mesh(topology_desc, shape, ("data", "fsdp", "tensor")).devices
    except Exception as error:  # of various types
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--topology: {topology}: {message}; expected one like {TOPOLOGY_EXAMPLES}") from None


def _vocabulary_size(config: Config) -> int:
    """The size of the vocabulary, as far as it is known without the data."""
    tokenizer = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    return len(load_vocabulary(tokenizer.path).tokens) if tokenizer.path else tokenizer.vocab_size


def _load_teacher_config(path: str, vocab_size: int) -> ModelConfig:
    """The teacher's model config from `path`: a run, a model directory, or the config file of a run."""
    file = user_path(path) / "config.json"
    if file.exists():
        saved_config = read_model_json(file, "the config of a run or of a model")
        is_run = isinstance(saved_config.get("model"), dict)
        model = (
            config_loader.build_config(saved_config).model if is_run else load_hf_config(file.parent).model
        )
    elif config_loader.split_spec(path)[0].endswith(".py"):
        model = config_loader.load_model_config(path)
    else:
        raise UserError(
            f"teacher.path: no {file}, expected a run, a model directory or a config file, e.g. x.py:teacher"
        )
    return dataclasses.replace(model, vocab_size=vocab_size)


def lower_step(target: CompileTarget, batch_size: int) -> Any:
    """Trace and lower the step of `batch_size` rows (over all chips) for the target's platform.

    Returns:
        A jax.stages.Lowered.
    """
    step_config, struct = target.step_config, jax.ShapeDtypeStruct
    shape = batch_size, target.config.data.sequence_length
    tokens_dtype = jnp.uint16 if target.uint16_tokens else jnp.uint32
    batch = jax.eval_shape(lambda: Batch(jnp.zeros(shape, tokens_dtype), jnp.zeros(shape, jnp.uint8)))
    teacher = None
    if isinstance(step_config.teacher, TeacherConfig):
        dtype_name = target.config.teacher.dtype
        dtype = step_config.policy.compute_dtype if dtype_name == "auto" else jnp.dtype(dtype_name)
        teacher = jax.tree.map(lambda x: struct(x.shape, dtype), step_config.teacher.abstract_params())
    state = abstract_state(step_config.model, step_config.optimizer)
    schedules, seed = abstract_schedules(target.config), struct((), jnp.uint32)
    step = jit_train_step(step_config, target.mesh)
    traced = step.trace(state, teacher, batch, schedules, seed, None)
    return traced.lower(lowering_platforms=(target.chip.platform,))


def compile_step(target: CompileTarget, batch_size: int) -> CompiledStep:
    """Compile the step of `batch_size` rows over all chips.

    A step that does not fit is a result, not an error: see `CompiledStep.fits`.
    """
    start_time, message, program, hlo_text = time.perf_counter(), "", None, ""
    try:
        program, hlo_text = compile_with_hlo_text(lower_step(target, batch_size))
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
    compile_seconds = time.perf_counter() - start_time
    memory = _memory_plan(program.memory_analysis()) if program else parse_oom_message(message)
    memory["available"] = target.chip.memory_bytes
    collectives = hlo.find_collectives(hlo_text) if program else []
    student, teacher = target.step_config.model, target.step_config.teacher
    objective, sequence_length = target.step_config.objective, target.config.data.sequence_length
    num_predictions = objective_module(objective).predictions_per_row(objective, sequence_length)
    num_chips, shape = target.mesh.size, (batch_size, sequence_length, num_predictions)
    step_flops = flops.training_step_flops(student, *shape)
    step_flops += optimizer_flops(target.step_config.optimizer, student)
    step_flops += teacher.forward_flops(*shape) if teacher else 0.0
    is_float32 = target.step_config.policy.compute_dtype == jnp.float32
    peak_flops = target.chip.peak_flops * (0.5 if is_float32 else 1)  # as in peak_flops_per_device
    bounds = {"compute": step_flops / num_chips / peak_flops}
    if program:
        bytes_sent = sum(collective.bytes_sent(num_chips) for collective in collectives)
        bounds["memory"] = _memory_traffic(program.memory_analysis()) / target.chip.memory_bandwidth
        bounds["network"] = bytes_sent / target.chip.network_bandwidth
    return CompiledStep(
        topology=target.topology,
        num_chips=num_chips,
        mesh=dict(target.mesh.shape),
        student=_describe_model(student),
        teacher=" + ".join(map(_describe_model, teacher.models)) if teacher else "",
        batch_size=batch_size,
        sequence_length=sequence_length,
        attention=target.step_config.policy.attention,
        fits=program is not None and memory["total"] <= target.chip.memory_bytes,
        memory=memory,
        collectives=_sum_by_kind(collectives, num_chips),
        trip_counts_known=all(collective.trip_counts_known for collective in collectives),
        flops=step_flops,
        roofline_seconds=bounds,
        compile_seconds=compile_seconds,
        compiler_message=message[:500],
    )


def compile_with_hlo_text(step: Any) -> tuple[Any, str]:
    """Compile a jax.stages.Lowered.

    The text is the compiler's own dump: for `as_text()` jaxlib deserialises the program, which fails for
    programs of a newer libtpu (gathers of a v5p on SparseCores).

    Returns:
        The compiled program and the text of its optimised HLO module.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = step.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (dump,) = Path(folder).glob("*after_optimizations.txt")
        return program, dump.read_text(encoding="utf-8")


def _memory_plan(analysis: Any) -> dict[str, float]:
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "generated_code": analysis.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_oom_message(message: str) -> dict[str, float]:
    """Parse the required bytes from the compiler's out-of-memory message.

    Returns:
        {"required": bytes}, or {} if the message has no size.
    """
    match = re.search(
        r"(?:required for [^()]*|Used |allocate )\(?(\d+(?:\.\d+)?)\s*([BKMGT]?)i?B?\)?", message
    )
    return {"required": float(match[1]) * _UNITS[match[2]]} if match else {}


def _memory_traffic(analysis: Any) -> float:
    """The least bytes that a step moves through the memory of a chip: arguments are read and outputs
    written once (the teacher is only an argument), temporaries are written and read once."""
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + 2 * analysis.temp_size_in_bytes


def _sum_by_kind(collectives: list[hlo.Collective], num_chips: int) -> list[dict[str, Any]]:
    by_kind = {
        kind: [collective for collective in collectives if collective.kind == kind]
        for kind in hlo.COLLECTIVE_KINDS
    }
    return [
        {
            "kind": kind,
            "count": sum(collective.executions for collective in group),
            "bytes": sum(collective.executions * collective.bytes for collective in group),
            "bytes_sent": sum(collective.bytes_sent(num_chips) for collective in group),
        }
        for kind, group in by_kind.items()
        if group
    ]


def _describe_model(model: ModelConfig) -> str:
    return f"{model.num_hidden_layers} x {model.hidden_size}"


def find_largest_batch(target: CompileTarget, batch_size: int) -> tuple[CompiledStep | None, CompiledStep]:
    """Find the largest batch that fits, to within 1/16, by doubling or halving and then bisection.

    Args:
        target: what to compile.
        batch_size: where to start, in rows over all chips.

    Returns:
        The largest step that fits, or None if not even one row per chip does; and the smallest tried
        step that does not fit.
    """
    data_parallelism = target.mesh.shape["data"] * target.mesh.shape["fsdp"]
    unit = data_parallelism * target.step_config.gradient_accumulation_steps
    largest_fit, smallest_overflow = None, None
    low, high, candidate = 0, 0, max(1, batch_size // unit)
    while not high or high - low > max(1, low // 16):
        step = compile_step(target, candidate * unit)
        verdict = "fits" if step.fits else "does not fit"
        logger.info(f"batch size {step.batch_size}: {verdict} ({step.compile_seconds:.0f} s)")
        if step.fits:
            largest_fit, low = step, candidate
        else:
            smallest_overflow, high = step, candidate
        candidate = (low + high) // 2 if low and high else (2 * low if low else high // 2)
        if not candidate:
            break
    assert smallest_overflow is not None
    return largest_fit, smallest_overflow
