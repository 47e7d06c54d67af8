"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864, equation 34).

Letters of shapes: B rows, L tokens a row, N stacked projections, H heads, K size of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]
"""cos and sin of the angle of each pair of channels at each position, fp32 [B, L, K/2]."""


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Return the rotation angle per position of each pair i of channels, θ^(−2i/K): float64 [K/2].

    Args:
        head_dim: K, even.
        theta: base of the wavelengths.
    """
    return np.asarray(theta ** (-np.arange(0, head_dim, 2) / head_dim))


def rope_rotation(positions: jax.Array, num_positions: int, frequencies: np.ndarray) -> Rotation:
    """Return the rotation of pair i of channels by position · frequencies[i].

    Args:
        positions: int [B, L], from 0 to num_positions − 1.
        num_positions: upper bound of the positions; larger ones give NaN.
        frequencies: float [K/2], see `rope_frequencies`.
    """
    angles = np.arange(num_positions)[:, None] * frequencies
    # Looked up: XLA fuses cos and sin into every use, and so would compute them again for each head.
    tables = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    cos, sin = (table.at[positions].get(mode="fill", fill_value=jnp.nan) for table in tables)
    return cos, sin


def apply_rope(x: jax.Array, rotation: Rotation, interleaved: bool = False) -> jax.Array:
    """Rotate queries or keys [B, L, N, H, K].

    Args:
        x: projections.
        rotation: from `rope_rotation`.
        interleaved: whether pair i has channels 2i and 2i + 1 instead of i and i + K/2.
    """
    cos, sin = (part[:, :, None, None].astype(x.dtype) for part in rotation)
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    return jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, axis=-1)
