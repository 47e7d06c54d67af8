"""Settings of the process that have to be made before jax is imported, each with its reason."""

import ctypes
import os
import sys

# AVX-512 vectors where the CPU has them; XLA prefers 256 bits. 9–19 % of a step, measured.
_XLA_FLAGS = ("--xla_cpu_prefer_vector_width=512",)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def tune() -> None:
    """Flags for XLA's CPU backend (they do nothing elsewhere) and a malloc that keeps memory.

    XLA allocates its temporaries anew each step. glibc maps and unmaps large blocks each
    time, and the page faults took a quarter of a step on CPU; told not to, it hands the same
    pages out again. What the user set in XLA_FLAGS wins.
    """
    present = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in _XLA_FLAGS if flag.partition("=")[0] not in present]
    os.environ["XLA_FLAGS"] = " ".join([*present.split(), *missing])
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):  # another libc: slower, not wrong
            pass
