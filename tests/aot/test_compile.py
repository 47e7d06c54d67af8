"""Ahead-of-time compilation: what is reported, what is refused, what does not fit."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.aot import accelerators, report
from dwt_jax.aot import compile as aot_compile
from dwt_jax.cli import main
from dwt_jax.config_loader import load_config
from dwt_jax.errors import UserError
from dwt_jax.models import bert, flops
from helpers.runs import dwt, make_project

OOM_MESSAGE = (  # of libtpu 0.0.52 for v5e:2x2
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (252.78G) exceeds available HBM (15.75G). HLO module: jit__step."
)
LONG_ROWS = {"data.sequence_length": "1024", "model.max_position_embeddings": "1024"}
TEACHER = {"distill.preset": "paper_normal", "train.batch_size": "8"}


@pytest.fixture
def config(tmp_path):
    return str(make_project(tmp_path))


@pytest.fixture
def one_device(monkeypatch):
    """A topology `one:1` of a device of this process, with 1 GiB of memory."""

    def devices(chip, topology, count, shape):
        return np.asarray(jax.devices()[:1]).reshape(1, 1, 1)

    chip = accelerators.Chip("one", "cpu", 1e11, 2**30, 1e10, 1e9, (1,))
    monkeypatch.setattr(aot_compile, "_topology_devices", devices)
    monkeypatch.setitem(accelerators.CHIPS, "one", chip)


@pytest.mark.slow
def test_compile_step_reports_memory_flops_and_bounds_of_the_training_step(config, one_device):
    """Parameters and two moments in fp32, the teacher in bf16, ids in 16 bits, segments in 8."""
    overrides = {**TEACHER, "teacher.path": config}
    target = aot_compile.make_compile_target(load_config(config, overrides), "one:1")
    step = aot_compile.compile_step(target, 8)
    student, teacher = target.step_config.model, target.step_config.teacher
    params = jax.eval_shape(lambda: bert.init_params(student, jax.random.key(0)))
    num_params = sum(x.size for x in jax.tree.leaves(params))
    scalars = 4 * 7 + 4 * 4 + 4  # counters and running means, schedules, seed
    arguments = 12 * num_params + 2 * num_params + 8 * 32 * 3 + scalars
    assert step.memory["arguments"] == pytest.approx(arguments, abs=64)
    assert step.fits
    assert step.collectives == []
    student_flops = flops.training_step_flops(student, 8, 32, 5)
    assert step.flops == student_flops + flops.forward_flops(teacher.models[0], 8, 32, 5)
    assert step.roofline_seconds["compute"] == step.flops / 1e11
    written = 12 * num_params + 2 * step.memory["temporaries"]  # the teacher is only read
    assert step.roofline_seconds["memory"] * 1e10 == pytest.approx(arguments + written, abs=2**10)
    text = report.format_compile_report(step)
    assert "compiled, not run" in text
    assert "teacher 2 x 32" in text
    json.dumps(step._asdict())
    two = {"teacher.path": "", "teacher.paths": f"{config},{config}"}
    two_teachers = aot_compile.make_compile_target(load_config(config, {**TEACHER, **two}), "one:1")
    of_two = aot_compile.compile_step(two_teachers, 8)
    assert of_two.teacher == "2 x 32 + 2 x 32"
    assert of_two.memory["arguments"] == pytest.approx(arguments + 2 * num_params, abs=64)
    assert of_two.flops - step.flops == flops.forward_flops(teacher.models[0], 8, 32, 5)
    less_memory = target.chip._replace(memory_bytes=step.memory["total"] - 1)
    assert not aot_compile.compile_step(target._replace(chip=less_memory), 8).fits


@pytest.mark.slow
def test_compile_step_uses_the_peak_of_the_compute_dtype(config, one_device):
    overrides = {"precision.compute_dtype": "float32"}
    target = aot_compile.make_compile_target(load_config(config, overrides), "one:1")
    step = aot_compile.compile_step(target, 8)
    assert step.roofline_seconds["compute"] == step.flops / 0.5e11


def test_parse_oom_message_returns_the_required_bytes():
    assert aot_compile.parse_oom_message(OOM_MESSAGE) == {"required": 252.78 * 2**30}
    assert aot_compile.parse_oom_message("RESOURCE_EXHAUSTED: no more") == {}


def test_compile_command_reports_a_step_that_does_not_fit(config, one_device, monkeypatch, capsys):
    class OutOfMemory:
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(OOM_MESSAGE)

    monkeypatch.setattr(aot_compile, "lower_step", lambda target, batch_size: OutOfMemory())
    assert report.compile_command(load_config(config), "one:1", as_json=False, max_batch=False) == 3
    assert "does not fit; requires 252.78 GiB, 1.00 GiB available" in capsys.readouterr().out
    assert report.compile_command(load_config(config), "one:1", as_json=True, max_batch=True) == 3
    step = json.loads(capsys.readouterr().out)
    assert step["batch_size"] == 1
    assert not step["fits"]
    assert step["memory"] == {"required": 252.78 * 2**30, "available": 2**30}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 512))
def test_find_largest_batch_is_within_a_sixteenth_of_the_limit(limit, start):
    class Target:
        mesh = type("mesh", (), {"shape": {"data": 4, "fsdp": 2}})
        step_config = type("step_config", (), {"gradient_accumulation_steps": 1})

    class Step:
        compile_seconds = 0.0

        def __init__(self, batch_size):
            self.batch_size, self.fits = batch_size, batch_size <= 8 * limit

    tried = []
    original = aot_compile.compile_step
    aot_compile.compile_step = lambda target, batch_size: tried.append(batch_size) or Step(batch_size)
    try:
        largest_fit, smallest_overflow = aot_compile.find_largest_batch(Target, 8 * start)
    finally:
        aot_compile.compile_step = original
    assert largest_fit.batch_size <= 8 * limit < smallest_overflow.batch_size
    assert smallest_overflow.batch_size - largest_fit.batch_size <= max(8, largest_fit.batch_size // 16)
    assert len(tried) < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_compile_prints_user_errors_as_one_line(config, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("dwt_jax.runtime_env.use_cpu_only", lambda: None)
    assert main(["compile", f"--config={config}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_teacher_config_is_read_from_config_run_or_model_directory(config, tmp_path):
    assert aot_compile._load_teacher_config(config, 300).num_hidden_layers == 2
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": {"num_hidden_layers": 3}, "train": {"steps": 1}}))
    assert aot_compile._load_teacher_config(str(run), 300).num_hidden_layers == 3
    sizes = {"model_type": "bert", "num_hidden_layers": 5, "vocab_size": 99}
    (run / "config.json").write_text(json.dumps(sizes))
    assert aot_compile._load_teacher_config(str(run), 300).num_hidden_layers == 5
    assert aot_compile._load_teacher_config(str(run), 300).vocab_size == 300
    with pytest.raises(UserError, match="expected a run, a model directory or a config file"):
        aot_compile._load_teacher_config(str(tmp_path / "nothing"), 300)


def test_a_teacher_of_another_objective_is_refused(config, one_device, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 99}))
    run = load_config(config, {**TEACHER, "teacher.path": str(tmp_path / "llama")})
    with pytest.raises(UserError, match=r"teacher\.path: .* is a llama, which has the next-token loss"):
        aot_compile.make_compile_target(run, "one:1")


@pytest.mark.parametrize(
    ("platform", "overrides", "expected"),
    [
        ("tpu", {"model.attention_probs_dropout_prob": "0", **LONG_ROWS}, "splash"),
        ("tpu", {"model.attention_probs_dropout_prob": "0"}, "reference"),
        ("tpu", {"model.attention_probs_dropout_prob": "0.1", **LONG_ROWS}, "reference"),
        ("tpu", {"precision.attention": "reference"}, "reference"),
        ("cpu", {}, "reference"),
    ],
)
def test_attention_is_chosen_for_the_topology(config, one_device, monkeypatch, platform, overrides, expected):
    monkeypatch.setitem(accelerators.CHIPS, "one", accelerators.CHIPS["one"]._replace(platform=platform))
    with jax.default_matmul_precision(None):
        target = aot_compile.make_compile_target(load_config(config, overrides), "one:1")
    assert target.step_config.policy.attention == expected


def test_attention_that_the_topology_cannot_compute_is_refused(config, one_device):
    with pytest.raises(
        UserError, match=r"precision\.attention is 'splash', expected the platform tpu, found cpu"
    ):
        aot_compile.make_compile_target(load_config(config, {"precision.attention": "splash"}), "one:1")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the compiler for TPUs is not installed")
def test_compile_for_a_tpu_topology(config):
    teacher = [f"--config.teacher.path={config}", "--config.distill.preset=paper_normal"]
    command = ["compile", f"--config={config}", "--topology=v5e:2x2"]
    done = dwt(*command, "--json", "--config.train.batch_size=8", *teacher)
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)
    assert step["fits"]
    assert {collective["kind"] for collective in step["collectives"]} == {"all-reduce"}
    # In the environment of the tests products of bf16 are those of fp32, which splash does not have.
    splash = ["--config.precision.attention=splash", "--config.model.attention_probs_dropout_prob=0"]
    for dtype, variables in (("float32", {}), ("bfloat16", {"JAX_DEFAULT_MATMUL_PRECISION": "default"})):
        flags = [
            "--json",
            "--config.train.batch_size=8",
            f"--config.precision.compute_dtype={dtype}",
            *splash,
        ]
        done = dwt(*command, *flags, variables=variables)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["attention"] == "splash"
    # Many rows would not do: the compiler tries for minutes to make them fit. A wide model fails at once.
    wide = ["--config.model.hidden_size=16384", "--config.model.intermediate_size=65536"]
    done = dwt(*command, *wide)
    assert done.returncode == 3, done.stderr
    assert "does not fit" in done.stdout
