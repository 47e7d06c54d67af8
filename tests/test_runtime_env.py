"""Process settings: memory use with huge pages, and the cache of ahead-of-time compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax import runtime_env
from dwt_jax.errors import UserError
from helpers.runs import environment

PROGRAM = """
from dwt_jax import runtime_env
runtime_env.set_xla_env()
block = bytearray(256 << 20)
block[::4096] = bytes(len(block[::4096]))
for line in open("/proc/self/smaps_rollup"):
    if line.startswith(("AnonHugePages", "Rss")):
        print(line.split()[0].rstrip(":"), int(line.split()[1]) >> 10)
"""


def memory_in_mib():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True
    )
    return {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}


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


def test_set_xla_env_gives_the_heap_huge_pages_without_more_memory():
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[never]" in kernel.read_text():
        pytest.skip("this kernel grants no huge pages")
    memory = memory_in_mib()
    assert memory["AnonHugePages"] >= 240
    assert memory["Rss"] < 256 + 150  # the block that was freed takes no memory


def test_use_cpu_only_disables_the_compilation_cache(monkeypatch):
    """A second `dwt compile` would try to load from it, which no compiler can without its device."""
    monkeypatch.setattr(os, "environ", {"JAX_ENABLE_COMPILATION_CACHE": "true"})
    runtime_env.use_cpu_only()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
