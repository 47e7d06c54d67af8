"""FLOPs by formula. XLA's own count takes the body of a scan once; this one is tested by hand.

A product [m, k] · [k, n] is 2·m·k·n FLOPs; a backward pass is twice its forward pass;
everything that is not a matrix product is left out, as is customary for MFU
(Chowdhery et al. 2022, appendix B).
"""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from dwt_jax.config import Model
from dwt_jax.errors import UserError
from dwt_jax.models.common.layers import padded_vocab_size

# Dense bf16 peak of one chip in FLOP/s, by the start of its jax device_kind (makers' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_flops(model: Model, rows: int, length: int, predictions: int) -> float:
    """One forward pass over `rows` of `length` tokens, the head at `predictions` positions a row.

    Per token and layer: query, key, value, output 8D², MLP 4DF, scores and mixing 4LD. Of these the
    last layer has key and value alone, 4D², per token, and the rest per prediction (functional.encode).
    Per prediction: transform 2D², decoder 2DV (V padded: that is what is computed).
    """
    per_prediction = 2 * model.hidden_size**2 + 2 * model.hidden_size * padded_vocab_size(model.vocab_size)
    return encoder_flops(model, rows, length, predictions) + float(rows * predictions * per_prediction)


def encoder_flops(model: Model, rows: int, length: int, output_positions: int) -> float:
    """One forward pass up to the last hidden states at `wanted` positions a row."""
    width, inner = model.hidden_size, model.intermediate_size
    key_value, rest = 4 * width**2, 4 * width**2 + 4 * width * inner + 4 * length * width
    per_token = (model.num_hidden_layers - 1) * (key_value + rest) + key_value
    return float(rows * (length * per_token + output_positions * rest))


def training_step_flops(model: Model, rows: int, length: int, predictions: int) -> float:
    """Forward and backward pass of the student alone."""
    return 3 * forward_flops(model, rows, length, predictions)


def peak_flops_per_device(dtype: str) -> float | None:
    """Peak FLOP/s of one device of the default backend, None where it is not known.

    On CPU it is measured with one large product and shared among the simulated devices.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measure_peak_flops(dtype) / jax.local_device_count()
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] * (0.5 if dtype == "float32" else 1.0) if matches else None


def _measure_peak_flops(dtype: str, size: int = 1024) -> float:
    if "DWT_PEAK_FLOPS" in os.environ:  # a run on a busy machine may say what it knows
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
