"""Process settings that must be made before jax is imported, and the cache directory."""

import ctypes
import errno
import hashlib
import os
import platform
import sys
import traceback
from pathlib import Path

from dwt_jax.errors import UserError

# AVX-512 vectors where the CPU has them, since XLA prefers 256 bits: 9–19 % of a step, measured.
_XLA_FLAGS = ("--xla_cpu_prefer_vector_width=512",)

NUMERIC_SETTINGS = {
    "JAX_ENABLE_X64": "false",
    "JAX_EXPLICIT_X64_DTYPES": "warn",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": "true",
    "JAX_ENABLE_CUSTOM_PRNG": "false",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "false",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_ALLOW_F16_REDUCTIONS": "true",
    "JAX_DISABLE_JIT": "false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
    "JAX_DEBUG_NANS": "false",
    "JAX_DEBUG_INFS": "false",
}
"""Settings of JAX that decide what is computed, or whether: their values, which are JAX's defaults.

They are the same for every run and evaluation, whatever the environment or a later version of JAX says."""

_BOOLEANS = {"true": ("1", "t", "y", "on", "yes"), "false": ("0", "f", "n", "off", "no")}  # as JAX reads them

PRECISION_VARIABLES = ("JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")
"""Variables that set the precision of matrix products. A run records them, and resumes under the same."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_HUGE_PAGE_BYTES, _MADV_HUGEPAGE = 2 << 20, 14  # sys/mman.h


def check_numeric_settings() -> None:
    """Check that the environment does not contradict NUMERIC_SETTINGS.

    Raises:
        UserError: a variable has another value.
    """
    for name, expected in NUMERIC_SETTINGS.items():
        value = os.environ.get(name, expected).strip().lower()
        if value != expected and value not in _BOOLEANS.get(expected, ()):
            raise UserError(
                f"{name}: {os.environ[name]!r} in the environment, expected it unset or {expected}: results "
                "depend on it"
            )


def precision_environment() -> str:
    """Return PRECISION_VARIABLES as the environment has them: NAME=VALUE, separated by spaces."""
    return " ".join(f"{name}={os.environ[name]}" for name in PRECISION_VARIABLES if os.environ.get(name))


def backend_problem(error: BaseException) -> str:
    """Return a message if jax raised `error` because it cannot start a backend, else ''."""
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, (RuntimeError, AssertionError)) or "jax._src.xla_bridge" not in frames:
        return ""
    reason = " ".join(str(error).split())[:200] or "no such device"  # jax asserts that there is a GPU
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return (
            f"JAX_PLATFORMS: {platforms!r}, which JAX cannot use ({reason}), expected a platform of this "
            "machine (cpu, cuda, tpu), or JAX_PLATFORMS unset"
        )
    return (
        f"JAX cannot use a device ({reason}), expected one that no other process uses, with a working plugin "
        "and driver, or JAX_PLATFORMS=cpu"
    )


def set_up_env() -> None:
    """Check the environment and set what a command needs. Call it before jax is imported.

    Raises:
        UserError: as `check_numeric_settings`.
    """
    check_numeric_settings()
    set_xla_env()


def set_xla_env() -> None:
    """Set JAX's numeric settings, XLA's CPU flags, the compilation cache and malloc's options.

    Flags and options set by the user win. Call `check_numeric_settings` before.

    The flags have no effect on other backends. The cache of compiled programs lets a resumed run start
    at once. XLA allocates its temporaries at each step; glibc maps and unmaps large blocks each time,
    and the page faults took a quarter of a step on CPU. With these options it reuses the same pages.
    """
    current_flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in _XLA_FLAGS if flag.partition("=")[0] not in current_flags]
    os.environ["XLA_FLAGS"] = " ".join([*current_flags.split(), *missing])
    for name, value in NUMERIC_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compile_cache_dir()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
            libc.mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads would still be unmapped
            _enable_huge_pages(libc)
        except (OSError, AttributeError):  # another libc: slower, not wrong
            pass


def _enable_huge_pages(libc: ctypes.CDLL) -> None:
    """Request 2 MB pages for future heap allocations; most kernels grant them only on madvise.

    A step of a 4 x 256 model takes 4 % less time with them, measured side by side. The block, half of the
    machine's memory in size, is freed unused: it takes addresses but no memory, and malloc places later
    allocations in it.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="utf-8").strip() == "2":
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
    """Set the environment of a process that compiles ahead of time and runs nothing on an accelerator.

    libtpu does not query the machine for its TPUs. The compilation cache is off: without its device a
    cached program cannot be loaded, and a loaded one would lack its HLO text.
    """
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
    """Return the directory of prepared data and compiled programs.

    It is $DWT_CACHE, or dwt-jax in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: the home directory is unknown.
    """
    text = os.environ.get("DWT_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dwt-jax"
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: the home directory is unknown, expected DWT_CACHE to name a directory")
    return Path(path)


def make_cache_dir() -> Path:
    """Return the cache directory; create it if it does not exist.

    Raises:
        UserError: the directory cannot be created or written to.
    """
    path = cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(path, os.W_OK | os.X_OK):
            return path
        reason = os.strerror(errno.EACCES)
    raise UserError(f"{path}: {reason}, expected DWT_CACHE to name a directory that can be written to")


def cpu_has_bf16_products() -> bool:
    """Return whether the CPU multiplies bf16 matrices faster than fp32 ones (AMX, or AVX-512 with bf16)."""
    return bool({"amx_bf16", "avx512_bf16"} & set(_cpu_features().split()))


def _cpu_features() -> str:
    """Return the CPU's features as /proc/cpuinfo lists them, or its name where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _compile_cache_dir() -> Path:
    """One directory per CPU type: machines of several types may share a home directory, and a program
    compiled for one type crashes on another."""
    return cache_dir() / f"compiled-{hashlib.sha256(_cpu_features().encode()).hexdigest()[:8]}"
