"""Settings of the process that have to be made before jax is imported, each with its reason."""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

# AVX-512 vectors where the CPU has them; XLA prefers 256 bits. 9–19 % of a step, measured.
_XLA_FLAGS = ("--xla_cpu_prefer_vector_width=512",)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_HUGE_PAGE_BYTES, _MADV_HUGEPAGE = 2 << 20, 14  # sys/mman.h


def set_xla_env() -> None:
    """Flags for XLA's CPU backend (they do nothing elsewhere), a cache of compiled programs, so
    that a resumed run starts at once, and a malloc that keeps memory.

    XLA allocates its temporaries anew each step. glibc maps and unmaps large blocks each
    time, and the page faults took a quarter of a step on CPU; told not to, it hands the same
    pages out again. What the user set in the environment wins.
    """
    current_flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in _XLA_FLAGS if flag.partition("=")[0] not in current_flags]
    os.environ["XLA_FLAGS"] = " ".join([*current_flags.split(), *missing])
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compile_cache_dir()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
            libc.mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads are unmapped all the same
            _enable_huge_pages(libc)
        except (OSError, AttributeError):  # another libc: slower, not wrong
            pass


def _enable_huge_pages(libc: ctypes.CDLL) -> None:
    """Let the heap to come, up to half of the machine's memory, have pages of 2 MB.

    Most distributions' kernels give them to those who ask alone (`madvise`). A step of 4 x 256 takes 4 % less
    time with them, measured side by side. The block is handed back unused: it takes addresses, no
    memory, and what malloc hands out later lies in it.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        return  # addresses are charged as memory there
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(size)
    if block:
        aligned_start = -(-block // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        libc.madvise(
            aligned_start,
            (block + size - aligned_start) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES,
            _MADV_HUGEPAGE,
        )
        libc.free(block)


def use_cpu_only() -> None:
    """For compiling alone: this process runs nothing on an accelerator, even where there is one, and
    libtpu does not look for the machine that it is on. Nor is what it compiles kept: without its device a
    program cannot be read back, and one that could be would come without its text."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def cache_dir() -> Path:
    """Where prepared data and compiled programs are kept: $DWT_CACHE or ~/.cache/dwt-jax."""
    return Path(os.environ.get("DWT_CACHE") or Path.home() / ".cache" / "dwt-jax")


def _compile_cache_dir() -> Path:
    """One folder a kind of processor: a home directory may be shared by several kinds, and a
    program compiled for one crashes on another."""
    try:
        cpu = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        )
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return cache_dir() / f"compiled-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}"
