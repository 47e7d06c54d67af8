"""Process settings: memory use with huge pages, and the cache of ahead-of-time compilation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax import runtime_env
from dwt_jax.cli import main
from dwt_jax.errors import UserError
from helpers.runs import environment

PROGRAM = """
import ctypes
from dwt_jax import runtime_env
from dwt_jax.cli import main
runtime_env.set_xla_env()
block = bytearray(256 << 20)
block[::4096] = bytes(len(block[::4096]))
address = ctypes.addressof(ctypes.c_char.from_buffer(block, 128 << 20))
holds_block = False
for line in open("/proc/self/smaps"):
    first, *others = line.split()
    if "-" in first:
        start, end = (int(part, 16) for part in first.split("-"))
        holds_block = start <= address < end
    elif first == "VmFlags:" and holds_block:
        print(*others)
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("Rss"):
        print(int(line.split()[1]) >> 10)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DWT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"DWT_CACHE": "~/a"}, "/home/me/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dwt-jax"),
        ({}, "/home/me/.cache/dwt-jax"),
    ],
)
def test_cache_is_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("DWT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert runtime_env.cache_dir() == Path(expected)


def test_without_a_home_directory_the_variable_is_named(monkeypatch):
    for name in ("DWT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(UserError, match="home directory is unknown, expected DWT_CACHE to name a directory"):
        runtime_env.cache_dir()


def test_set_xla_env_requests_huge_pages_for_the_heap_without_more_memory():
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[never]" in kernel.read_text():
        pytest.skip("this kernel grants no huge pages")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True
    )
    flags, resident_mib = done.stdout.splitlines()
    assert "hg" in flags.split()  # requested; how many are granted depends on the machine's free memory
    assert int(resident_mib) < 256 + 150  # the block that was freed takes no memory


def test_use_cpu_only_disables_the_compilation_cache(monkeypatch):
    """A second `dwt compile` would try to load from it, which no compiler can without its device."""
    monkeypatch.setattr(os, "environ", {"JAX_ENABLE_COMPILATION_CACHE": "true"})
    runtime_env.use_cpu_only()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_numeric_settings_are_those_of_jax():
    """A version of JAX with another default must be noticed, and so must a name that it does not know."""
    program = "import json, jax; print(json.dumps(jax.config.values, default=lambda x: x.value))"
    env = {name: value for name, value in environment().items() if name not in runtime_env.NUMERIC_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    defaults = json.loads(done.stdout)
    defaults["jax_explicit_x64_dtypes"] = {1: "warn"}[defaults["jax_explicit_x64_dtypes"]]
    expected = {name: str(defaults[name.lower()]).lower() for name in runtime_env.NUMERIC_SETTINGS}
    assert expected == runtime_env.NUMERIC_SETTINGS


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("JAX_ENABLE_X64", "1", True),
        ("JAX_ENABLE_X64", "True", True),
        ("JAX_ENABLE_X64", "0", False),
        ("JAX_ENABLE_X64", "no", False),
        ("JAX_THREEFRY_PARTITIONABLE", "0", True),
        ("JAX_THREEFRY_PARTITIONABLE", "TRUE", False),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg", True),
        ("JAX_RANDOM_SEED_OFFSET", "7", True),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", True),
        ("JAX_DISABLE_JIT", "1", True),
        ("JAX_DISABLE_JIT", "", True),
        ("JAX_TRACEBACK_FILTERING", "off", False),
    ],
)
def test_an_environment_that_changes_results_is_refused(monkeypatch, name, value, is_refused):
    monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(UserError, match=f"^{name}: '{value}' in the environment, expected it unset or"):
            runtime_env.check_numeric_settings()
    else:
        runtime_env.check_numeric_settings()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--config=configs/paper.py:student", "--workdir=run"),
        ("evaluate", "--model=model", "--data=rows"),
        ("finetune", "--model=model", "--workdir=tuned"),
        ("study", "--config=configs/study/demo.py:1", "--workdir=study"),
        ("demo", "--workdir=demo"),
        ("export", "--model=model", "--out=out"),
        ("compile", "--config=configs/paper.py:student", "--topology=cpu"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_computes_refuses_it(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setattr(runtime_env, "set_xla_env", lambda: pytest.fail("refused too late"))
    arguments = [text.replace("=run", f"={tmp_path}/run") for text in arguments]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("dwt: JAX_ENABLE_X64: '1' in the environment")


USE_A_DEVICE = """
import sys
from dwt_jax.cli.exit_status import exit_status
def use_a_device():
    import jax
    jax.devices()
sys.exit(exit_status(use_a_device))
"""


def has_device(platform):
    return any(Path("/dev").glob({"cuda": "nvidia[0-9]*", "tpu": "accel*"}.get(platform, "-")))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense", "cuda,nonsense"])
def test_absent_backend_in_jax_platforms_is_one_line(platform):
    if has_device(platform):
        pytest.skip(f"this machine has a device for {platform}")
    done = subprocess.run(
        [sys.executable, "-c", USE_A_DEVICE],
        env=environment(JAX_PLATFORMS=platform),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("dwt: ")]
    assert len(lines) == 1
    assert f"JAX_PLATFORMS: '{platform}', which JAX cannot use" in lines[0]
    assert "Traceback" not in done.stderr


def raised_in(module, error):
    """The error as code of that module raises it."""
    with pytest.raises(type(error)) as raised:
        exec("raise error", {"__name__": module, "error": error})
    return raised.value


def test_a_backend_that_fails_without_jax_platforms_is_one_line(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    error = raised_in("jax._src.xla_bridge", RuntimeError("Unable to initialize backend 'tpu': in\nuse"))
    message = runtime_env.backend_problem(error)
    assert message.startswith("JAX cannot use a device (Unable to initialize backend 'tpu': in use), ")


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("elsewhere", RuntimeError("Unable to initialize backend 'cuda'")),
        ("jax._src.xla_bridge", KeyboardInterrupt()),
        ("jax._src.xla_bridge", ValueError("x")),
    ],
)
def test_other_errors_are_no_problem_of_the_backend(monkeypatch, module, error):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert runtime_env.backend_problem(raised_in(module, error)) == ""


def test_cache_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "x", "Not a directory")):
        monkeypatch.setenv("DWT_CACHE", str(path))
        with pytest.raises(UserError, match=f"{path}: {reason}, expected DWT_CACHE to name a directory"):
            runtime_env.make_cache_dir()
    monkeypatch.setenv("DWT_CACHE", str(tmp_path / "new" / "cache"))
    assert runtime_env.make_cache_dir().is_dir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="Permission denied, expected DWT_CACHE"):
        runtime_env.make_cache_dir()
