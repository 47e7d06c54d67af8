"""Peak FLOP/s of the devices, for MFU."""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from dwt_jax.errors import UserError

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 peak of one device in FLOP/s, by the prefix of its jax device_kind (vendors' data sheets)."""


def peak_flops_per_device(dtype: str) -> float | None:
    """Return the peak FLOP/s of one device of the default backend, or None if unknown.

    On CPU it is measured with a large matrix product and divided by the number of simulated devices.

    Args:
        dtype: dtype of the operands; float32 has half the peak of bfloat16.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measure_peak_flops(dtype) / jax.local_device_count()
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] * (0.5 if dtype == "float32" else 1.0) if matches else None


def _measure_peak_flops(dtype: str, size: int = 1024) -> float:
    if "DWT_PEAK_FLOPS" in os.environ:  # a fixed value, for runs on a busy machine
        try:
            return float(os.environ["DWT_PEAK_FLOPS"])
        except ValueError:
            text = os.environ["DWT_PEAK_FLOPS"]
            raise UserError(
                f"DWT_PEAK_FLOPS is {text!r}, expected FLOP/s of one process, e.g. 3e11"
            ) from None
    a: Any = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32).astype(dtype) * 1e-3)
    product(a).block_until_ready()
    best_seconds = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * size**3 / best_seconds
