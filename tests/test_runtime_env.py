"""Process settings: memory use with huge pages, and the cache of ahead-of-time compilation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dwt_jax import runtime_env
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
