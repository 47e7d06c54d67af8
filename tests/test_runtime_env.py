"""Settings of the process: that memory really comes as they say."""

import subprocess
import sys
from pathlib import Path

import pytest

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


def megabytes():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True
    )
    return {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}


def test_the_heap_has_huge_pages_and_is_no_larger_for_it():
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[never]" in kernel.read_text():
        pytest.skip("this kernel gives nobody huge pages")
    found = megabytes()
    assert found["AnonHugePages"] >= 240
    assert found["Rss"] < 256 + 150  # what was asked for and handed back takes no memory
