"""Compiling for chips that are not here: what is read off programs, what is refused, what does not fit."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax import runtime_env
from dwt_jax.aot import accelerators, hlo, report
from dwt_jax.aot import compile as aheads
from dwt_jax.aot.gpu_targets import gpu_target_config
from dwt_jax.cli import main
from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.models import flops
from dwt_jax.runs import peak_flops
from helpers.paths import ROOT
from helpers.runs import dwt, environment, make_project

OVERFLOW = (  # of libtpu 0.0.52 for v5e:2x2, as it came
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (252.78G) exceeds available HBM (15.75G). HLO module: jit__step."
)

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %one = f32[4,8]{1,0:T(8,128)} all-reduce(%x), replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, to_apply=%add
  %both = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), replica_groups={{0,1},{2,3}}, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%both)
}
%condition (carry: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%open (carry: (s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%inner (carry: (s32[])) -> (s32[]) {
  %p = s32[5]{0} collective-permute(%q), source_target_pairs={{0,1}}
}
%fused (p: f32[3]) -> f32[3] {
  %r = f32[3]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %loop = (s32[], f32[4,8]) while(%start), condition=%condition, body=%body
  %told = (s32[]) while(%s), condition=%open, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[3]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %all = (f32[2,2]{1,0}, f32[]) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""


def test_what_a_program_sends_by_hand():
    found = hlo.find_collectives(PROGRAM)
    assert found == [
        hlo.Collective("all-reduce", 128, 4, 6, True),
        hlo.Collective("all-gather", 256, 2, 6, True),
        hlo.Collective("collective-permute", 20, 0, 3, True),
        hlo.Collective("reduce-scatter", 48, 4, 1, True),
        hlo.Collective("all-reduce", 20, 0, 1, True),
    ]
    assert [each.bytes_sent(8) for each in found] == [6 * 128 * 1.5, 6 * 256 / 2, 60, 36, 20 * 1.75]
    unknown = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert [each.trip_counts_known for each in hlo.find_collectives(unknown)] == [
        True,
        True,
        False,
        True,
        True,
    ]


TPU = """
%all-reduce-scatter.2 (input: f32[16,8]) -> f32[2,8] {
  %whole = f32[16,8]{1,0:T(8,128)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%whole, %place, %zero), dynamic_slice_sizes={2,8}
}
%begin (p: bf16[4,32]) -> (bf16[4,32], bf16[4,256]) {
  %g1 = bf16[4,256]{1,0} all-gather(%p), channel_id=32, replica_groups={{0,1,2,3}}, BESIDE
  ROOT %c1 = (bf16[4,32], bf16[4,256]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}
%beside (p: bf16[4,32]) -> bf16[4,256] {
  %g2 = bf16[4,256]{1,0} all-gather(%p), channel_id=32, replica_groups={{0,1,2,3}}, BESIDE
}
%other (p: bf16[4,32]) -> bf16[4,256] {
  %g3 = bf16[4,256]{1,0} all-gather(%p), channel_id=33, replica_groups={{0,1,2,3}}, BESIDE
}
ENTRY %main (x: f32[16,8]) -> f32[2,8] {
  %f0 = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %f1 = (bf16[4,32], bf16[4,256]) fusion(%x), kind=kLoop, calls=%begin
  %f2 = bf16[4,256]{1,0} fusion(%f1), kind=kOutput, calls=%beside
  %f3 = bf16[4,256]{1,0} fusion(%f2), kind=kLoop, calls=%other
  ROOT %done = bf16[4,256]{1,0} fusion(%f2), kind=kLoop, calls=%beside
}
""".replace("BESIDE", 'backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}')


def test_what_tpus_write_otherwise():
    """A reduce-scatter is a fusion named so; a gather beside other work is written in each of its fusions."""
    assert hlo.find_collectives(TPU) == [
        hlo.Collective("reduce-scatter", 512, 4, 1, True),
        hlo.Collective("all-gather", 2048, 4, 1, True),
        hlo.Collective("all-gather", 2048, 4, 1, True),
    ]
    assert [each.bytes_sent(4) for each in hlo.find_collectives(TPU)] == [384, 1536, 1536]


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("((bf16[2,8]{1,0}, f32[4]{0}), (bf16[8,8]{1,0}, f32[16]{0})) all-gather-start(%a, %b)", 0, 192),
        ("((f32[16]{0:T(128)}), f32[4]{0}, u32[]) reduce-scatter-start(%a)", 1, 64),
        ("(f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a)", 2, 64),
        ("(f32[16]{0}, bf16[16]{0}) all-reduce-start(%a, %b)", 3, 96),
    ],
)
def test_what_was_started_with_several_arrays(line, kind, size):
    names = ("all-gather", "reduce-scatter", "collective-permute", "all-reduce")
    program = f"ENTRY %main (x: f32[]) -> f32[] {{\n  %s = {line}, replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert hlo.find_collectives(program) == [hlo.Collective(names[kind], size, 4, 1, True)]


def test_an_asynchronous_call_is_counted_where_it_starts():
    program = """
%sent (p: f32[16]) -> f32[4] {
  %r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
ENTRY %main (x: f32[16]) -> f32[4] {
  %s = ((f32[16]), f32[4], s32[]) async-start(%x), calls=%sent
  %u = ((f32[16]), f32[4], s32[]) async-update(%s), calls=%sent
  ROOT %d = f32[4]{0} async-done(%u), calls=%sent
}
"""
    assert hlo.find_collectives(program) == [hlo.Collective("reduce-scatter", 64, 4, 1, True)]


def test_what_a_program_sends_on_eight_devices():
    """A loop of 5, the gradient of a [64, 32] product in each: the bytes that its formula says."""
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dwt_jax.aot import hlo
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
def step(w, x):
    grad = jax.grad(lambda w, x: jnp.tanh(x @ w).sum())
    return jax.lax.scan(lambda w, x: (w - grad(w, x), None), w, x)[0]
same, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
S = jax.ShapeDtypeStruct
program = jax.jit(step, in_shardings=(same, rows), out_shardings=same).lower(
    S((64, 32), np.float32), S((5, 16, 64), np.float32)).compile()
print([tuple(each) for each in hlo.find_collectives(program.as_text())])
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(JAX_NUM_CPU_DEVICES="8"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() in (f"[('all-reduce', {64 * 32 * 4}, {n}, 5, True)]" for n in (0, 8))


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v4:2x2x1", "v4", 4),
        ("v6e:16x16", "v6e", 256),
        ("h100:8", "h100", 8),
        ("v5p:24x16x16", "v5p", 6144),
    ],
)
def test_topologies(topology, name, count):
    chip, found = accelerators.parse_topology(topology)
    assert (chip.name, found) == (name, count)


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("h10:8", "no chip 'h10'; did you mean 'h100'"),
        ("v5e", "expected a shape after the colon"),
        ("v5e:0x4", "expected a shape after the colon"),
        ("h100:2x4", "expected a shape after the colon"),
        ("v5e:4x4x4", "expected a shape after the colon"),  # libtpu would abort the process
        ("v5p:4x4", "expected a shape after the colon"),
        ("v6e:32x32", "expected no more than v6e:16x16"),
        ("v5e:8x32", "expected no more than v5e:16x16"),
        ("h100:16", "expected no more than h100:8"),  # NVLink ends with the node
        ("", "no chip ''"),
    ],
)
def test_topologies_that_are_none(topology, says):
    with pytest.raises(UserError, match=says):
        accelerators.parse_topology(topology)


def test_peaks_are_those_that_runs_are_measured_by():
    """One number a chip, though a device calls itself otherwise there."""
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}
    kinds |= {"h100": "NVIDIA H100", "h200": "NVIDIA H200"}
    assert {name: chip.flops for name, chip in accelerators.CHIPS.items()} == {
        name: peak_flops.PEAK_FLOPS[kind] for name, kind in kinds.items()
    }


def test_a_gpu_has_the_memory_that_the_launch_scripts_let_jax_take():
    """More would be called fitting and then fail. XLA refuses nothing when it compiles for a GPU."""
    text = (ROOT / "launch" / "env.sh").read_text()
    share = float(re.search(r"MEM_FRACTION:-([.\d]+)", text)[1])
    for name, there in (("h100", 79.1), ("h200", 139.8)):
        assert accelerators.CHIPS[name].memory == pytest.approx(share * there * 2**30)


def test_the_sizes_of_an_overflow():
    assert aheads.parse_oom_message(OVERFLOW) == {"wanted": 252.78 * 2**30}
    assert aheads.parse_oom_message("RESOURCE_EXHAUSTED: no more") == {}


@pytest.fixture
def config(tmp_path):
    return str(make_project(tmp_path))


@pytest.fixture
def here(monkeypatch):
    """The devices of this process in place of those of a topology."""

    def devices(chip, topology, count, shape):
        return np.asarray(jax.devices()[:1]).reshape(1, 1, 1)

    monkeypatch.setattr(aheads, "_topology_devices", devices)
    monkeypatch.setitem(
        accelerators.CHIPS, "one", accelerators.Chip("one", "cpu", 1e11, 2**30, 1e10, 1e9, (1,))
    )


TEACHER = {"distill.preset": "paper_normal", "train.batch_size": "8"}


@pytest.mark.slow
def test_the_real_step_is_compiled_and_its_arguments_are_known(config, here):
    """Parameters and two moments in fp32, the teacher in bf16, ids in 16 bits, segments in 8."""
    goal = aheads.make_compile_target(load_config(config, {**TEACHER, "teacher.path": config}), "one:1")
    found = aheads.compile_step(goal, 8)
    params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: _params(goal))))
    small = 4 * 7 + 4 * 4 + 4  # counters and running means, schedules, seed
    expected = 12 * params + 2 * params + 8 * 32 * 3 + small
    assert found.memory["arguments"] == pytest.approx(expected, abs=64)
    assert found.fits
    assert found.collectives == []
    assert found.flops == flops.training_step_flops(goal.spec.model, 8, 32, 5) + flops.forward_flops(
        goal.spec.teacher, 8, 32, 5
    )
    assert found.seconds["compute"] == found.flops / 1e11
    written = 12 * params + 2 * found.memory["temporaries"]  # the teacher is only read
    assert found.seconds["memory"] * 1e10 == pytest.approx(expected + written, abs=2**10)
    text = report.format_compile_report(found)
    assert "compiled, not run" in text
    assert "teacher 2 x 32" in text
    json.dumps(found._asdict())
    tight = goal._replace(chip=goal.chip._replace(memory=found.memory["together"] - 1))
    assert not aheads.compile_step(tight, 8).fits


@pytest.mark.slow
def test_the_peak_is_that_of_the_type_that_is_computed_in(config, here):
    goal = aheads.make_compile_target(load_config(config, {"precision.compute_dtype": "float32"}), "one:1")
    found = aheads.compile_step(goal, 8)
    assert found.seconds["compute"] == found.flops / 0.5e11


def test_what_is_compiled_for_elsewhere_is_not_kept(monkeypatch):
    """A second `dwt compile` would try to load it, which no compiler without its device can."""
    monkeypatch.setattr(os, "environ", {"JAX_ENABLE_COMPILATION_CACHE": "true"})
    runtime_env.use_cpu_only()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def _params(goal):
    from dwt_jax.models import bert

    return bert.init_params(goal.spec.model, jax.random.key(0))


def test_what_does_not_fit_is_an_answer(config, here, monkeypatch, capsys):
    class Full:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(OVERFLOW)

    monkeypatch.setattr(aheads, "lower_step", lambda target, rows: Full())
    assert report.compile_command(load_config(config), "one:1", as_json=False, max_batch=False) == 3
    said = capsys.readouterr().out
    assert "does not fit, 252.78 GiB wanted, 1.00 GiB there" in said
    assert report.compile_command(load_config(config), "one:1", as_json=True, max_batch=True) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 1
    assert not found["fits"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 512))
def test_the_largest_batch_is_found_within_a_sixteenth(limit, begin):
    class Goal:
        mesh = type("mesh", (), {"shape": {"data": 4, "fsdp": 2}})
        spec = type("spec", (), {"gradient_accumulation_steps": 1})

    class Found:
        compile_seconds = 0.0

        def __init__(self, rows):
            self.rows, self.fits = rows, rows <= 8 * limit

    tried = []
    original, aheads.compile_step = aheads.compile_step, lambda goal, rows: tried.append(rows) or Found(rows)
    try:
        below, above = aheads.find_largest_batch(Goal, 8 * begin, lambda text: None)
    finally:
        aheads.compile_step = original
    assert below.rows <= 8 * limit < above.rows
    assert above.rows - below.rows <= max(8, below.rows // 16)
    assert len(tried) < 30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--topology=h10:8"], "--topology: no chip 'h10'; did you mean 'h100'"),
        (
            ["--topology=v5e:2x2", "--config.mesh.data=3", "--config.train.batch_size=9"],
            "expected a product that fits the 4 devices",
        ),
        (["--topology=v5e:2x2", "--config.train.batch_size=6"], "expected a multiple of the mesh's"),
        (["--topology=v5e:2x2"], "needs a compiler that is not installed, expected pip install -r"),
    ],
)
def test_mistakes(config, words, says, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("dwt_jax.runtime_env.use_cpu_only", lambda: None)
    assert main(["compile", f"--config={config}", *words]) == 2
    found = capsys.readouterr().err
    assert says in found
    assert found.count("\n") == 1


def test_where_a_teacher_has_its_sizes_from(config, tmp_path):
    assert aheads._load_teacher_config(config, 300).num_hidden_layers == 2
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": {"num_hidden_layers": 3}, "train": {"steps": 1}}))
    assert aheads._load_teacher_config(str(run), 300).num_hidden_layers == 3
    sizes = {"model_type": "bert", "num_hidden_layers": 5, "vocab_size": 99}
    (run / "config.json").write_text(json.dumps(sizes))
    assert aheads._load_teacher_config(str(run), 300).num_hidden_layers == 5
    assert aheads._load_teacher_config(str(run), 300).vocab_size == 300
    with pytest.raises(UserError, match="expected a run, a model directory or the config of one"):
        aheads._load_teacher_config(str(tmp_path / "nothing"), 300)


def test_a_gpu_is_described_by_its_own_numbers():
    text = gpu_target_config(accelerators.CHIPS["h200"])
    assert "memory_bandwidth: 4800000000000" in text
    assert text.count("{") == text.count("}")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the compiler for TPUs is not installed")
def test_a_tiny_step_for_a_real_topology(config):
    small = ["--config.train.batch_size=8", f"--config.teacher.path={config}"]
    small += ["--config.distill.preset=paper_normal"]
    found = dwt("compile", f"--config={config}", "--topology=v5e:2x2", "--json", *small)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["fits"]
    assert {each["kind"] for each in told["collectives"]} == {"all-reduce"}
    # A wide model and not many rows: of those the compiler tries for minutes to make them fit.
    wide = ["--config.model.hidden_size=16384", "--config.model.intermediate_size=65536"]
    too_much = dwt("compile", f"--config={config}", "--topology=v5e:2x2", *wide)
    assert too_much.returncode == 3, too_much.stderr
    assert "does not fit" in too_much.stdout
