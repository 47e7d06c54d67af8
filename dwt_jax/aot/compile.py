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
from dwt_jax.aot.accelerators import EXAMPLES, Chip, parse
from dwt_jax.aot.gpu_targets import description
from dwt_jax.config import Config, Init, Model
from dwt_jax.data.tokenizer import vocabulary
from dwt_jax.distributed.mesh import mesh_shape
from dwt_jax.errors import UserError
from dwt_jax.files import read_object
from dwt_jax.hf.config import load_config
from dwt_jax.models import bert, flops
from dwt_jax.models.common.matmul import Numerics
from dwt_jax.objectives.masking import Tokens, predictions_per_row
from dwt_jax.train.step import Spec, abstract_state, compiled, spec_of

WHEELS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
EXTRAS = {"tpu": "requirements-tpu-compile.txt", "cuda": "requirements-gpu-compile.txt"}


class Ahead(NamedTuple):
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


class Target(NamedTuple):
    """What to compile for."""

    topology: str
    chip: Chip
    mesh: Mesh
    config: Config  # resolved
    spec: Spec
    small_tokens: bool  # whether ids are stored in 16 bits


def target(config: Config, topology: str) -> Target:
    """Raises UserError for an unknown topology, a mesh that does not fit it, compilers that are not
    installed, and a teacher whose sizes cannot be read."""
    chip, count = parse(topology)
    shape = mesh_shape(config.mesh, count, config.train.batch_size // config.train.accumulate)
    devices = np.asarray(_devices(chip, topology, count, shape))
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    tokens = _vocabulary_size(config)
    model = dataclasses.replace(config.model, vocab_size=tokens)
    config = dataclasses.replace(config, model=model, init=Init())
    teacher = _teacher(config.teacher.path, tokens) if config.teacher.path else None
    bits = bytes(-(-tokens // 8)) if config.mask.whole_word else b""
    compute = config.precision.compute
    numerics = jnp.dtype("bfloat16" if compute == "auto" else compute)
    words = Tokens(tokens, 4, tuple(range(5)), bits)  # which ids are special changes constants alone
    spec = spec_of(config, teacher, words, Numerics(numerics, numerics, False))
    return Target(topology, chip, mesh, config, spec, tokens <= 2**16)


def _devices(chip: Chip, topology: str, count: int, shape: list[int]) -> Any:
    """The devices of a topology, laid out as the mesh."""
    if not any(importlib.util.find_spec(name) for name in WHEELS[chip.platform]):
        raise UserError(
            f"--topology: {topology} needs a compiler that is not installed, expected "
            f"pip install -r {EXTRAS[chip.platform]}"
        )
    try:
        if chip.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **dict(chip.options))
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=f"1x1x{count}",  # one partition, one host
                target_config=description(chip),
            )
        return topologies.make_mesh(found, shape, ("data", "fsdp", "tensor")).devices
    except Exception as error:  # many kinds
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--topology: {topology}: {said}; expected one like {EXAMPLES}") from None


def _vocabulary_size(config: Config) -> int:
    """That the data will have, as far as it can be known without it."""
    tokenizer = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    return len(vocabulary(tokenizer.path).tokens) if tokenizer.path else tokenizer.vocab_size


def _teacher(path: str, tokens: int) -> Model:
    """Sizes of the teacher in `path`: a run, a model directory or, here alone, the config of a run."""
    file = Path(path).expanduser() / "config.json"
    if file.exists():
        found = read_object(file, "the config of a run or of a model")
        run = isinstance(found.get("model"), dict)
        model = config_loader.build(found).model if run else load_config(file.parent).model
    elif path.partition(":")[0].endswith(".py"):
        model = config_loader.load_model(path)
    else:
        raise UserError(
            f"teacher.path: no {file}, expected a run, a model directory or the config of one: x.py:teacher"
        )
    return dataclasses.replace(model, vocab_size=tokens)


def lowered(target: Target, rows: int) -> Any:
    """The step of `rows` rows, traced and lowered for the target's platform."""
    spec, shape = target.spec, jax.ShapeDtypeStruct
    batch = {
        "tokens": shape(
            (rows, target.config.data.sequence_length), jnp.uint16 if target.small_tokens else jnp.uint32
        ),
        "segments": shape((rows, target.config.data.sequence_length), jnp.uint8),
    }
    teacher = None
    if spec.teacher:
        stored = target.config.teacher.dtype
        dtype = spec.numerics.compute if stored == "auto" else jnp.dtype(stored)
        teacher = jax.tree.map(lambda x: shape(x.shape, dtype), bert.abstract(spec.teacher))
    state = abstract_state(spec.model, spec.optimizer)
    knobs, seed = shape((len(spec.columns),), jnp.float32), shape((), jnp.uint32)
    traced = compiled(spec, target.mesh).trace(state, teacher, batch, knobs, seed)
    return traced.lower(lowering_platforms=(target.chip.platform,))


def ahead(target: Target, rows: int) -> Ahead:
    """Compile the step of `rows` rows over all chips. What does not fit is an answer, not an error."""
    began, said, program, text = time.perf_counter(), "", None, ""
    try:
        program, text = with_text(lowered(target, rows))
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in said:
            raise
    seconds = time.perf_counter() - began
    memory = _planned(program.memory_analysis()) if program else overflow(said)
    memory["available"] = target.chip.memory
    found = hlo.collectives(text) if program else []
    spec, length = target.spec, target.config.data.sequence_length
    shape = rows, length, predictions_per_row(spec.mask, length)
    work = flops.training_step(spec.model, *shape)
    work += flops.forward(spec.teacher, *shape) if spec.teacher else 0.0
    chips = target.mesh.size
    sent = sum(each.sent(chips) for each in found)
    peak = target.chip.flops * (
        0.5 if spec.numerics.compute == jnp.float32 else 1
    )  # as flops.peak_per_device
    bounds = {"compute": work / chips / peak}
    if program:
        bounds["memory"] = _traffic(program.memory_analysis()) / target.chip.bandwidth
        bounds["network"] = sent / target.chip.network
    return Ahead(
        topology=target.topology,
        chips=chips,
        mesh=dict(target.mesh.shape),
        student=_sizes(spec.model),
        teacher=_sizes(spec.teacher) if spec.teacher else "",
        rows=rows,
        length=length,
        fits=program is not None and memory["together"] <= target.chip.memory,
        memory=memory,
        collectives=_by_kind(found, chips),
        loops_known=all(each.known for each in found),
        flops=work,
        seconds=bounds,
        compile_seconds=seconds,
        said=said[:500],
    )


def with_text(step: Any) -> tuple[Any, str]:
    """The compiled program and its text, as the compiler itself writes it down: `as_text()` has jaxlib
    read the program back, which fails for what a newer libtpu made (a v5p's gathers on SparseCores)."""
    with tempfile.TemporaryDirectory() as folder:
        program = step.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (dump,) = Path(folder).glob("*after_optimizations.txt")
        return program, dump.read_text()


def _planned(plan: Any) -> dict[str, float]:
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes - plan.alias_size_in_bytes,  # that take no argument's place
        "temporaries": plan.temp_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
    }
    return {**parts, "together": sum(parts.values())}


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def overflow(said: str) -> dict[str, float]:
    """The sizes in a compiler's words on memory: `wanted`, and which of it (`what` is left in `said`)."""
    match = re.search(r"(?:required for [^()]*|Used |allocate )\(?(\d+(?:\.\d+)?)\s*([BKMGT]?)i?B?\)?", said)
    return {"wanted": float(match[1]) * _UNITS[match[2]]} if match else {}


def _traffic(plan: Any) -> float:
    """Bytes through the memory of a chip at the least: arguments read, what takes their place (not the
    teacher's) and results written, temporaries written and read once."""
    return plan.argument_size_in_bytes + plan.output_size_in_bytes + 2 * plan.temp_size_in_bytes


def _by_kind(found: list[hlo.Collective], chips: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "count": sum(each.times for each in found if each.kind == kind),
            "bytes": sum(each.times * each.bytes for each in found if each.kind == kind),
            "sent": sum(each.sent(chips) for each in found if each.kind == kind),
        }
        for kind in hlo.KINDS
        if any(each.kind == kind for each in found)
    ]


def _sizes(model: Model) -> str:
    return f"{model.num_hidden_layers} x {model.hidden_size}"


def largest(target: Target, rows: int, say: Any) -> tuple[Ahead | None, Ahead]:
    """(the step of the most rows that fits, the next one, which does not), from `rows` on: doubled or
    halved, then bisected to whole rows a chip. None if not even one row a chip fits."""
    unit = target.mesh.shape["data"] * target.mesh.shape["fsdp"] * target.spec.accumulate
    below, above = None, None
    low, high, now = 0, 0, max(1, rows // unit)
    while not high or high - low > max(1, low // 16):
        found = ahead(target, now * unit)
        say(f"{found.rows} rows: {'fits' if found.fits else 'does not fit'} ({found.compile_seconds:.0f} s)")
        if found.fits:
            below, low = found, now
        else:
            above, high = found, now
        now = (low + high) // 2 if low and high else (2 * low if low else high // 2)
        if not now:
            break
    assert above is not None
    return below, above
