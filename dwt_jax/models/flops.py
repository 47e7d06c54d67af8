"""FLOPs by formula, for every family. (XLA counts the body of a scan only once.)

A product [m, k] · [k, n] has 2·m·k·n FLOPs, and a backward pass twice those of the forward pass. Operations
other than matrix products are not counted, as usual for MFU (Chowdhery et al. 2022, appendix B).
"""

from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig


def forward_flops(config: ModelConfig, rows: int, length: int, predictions: int) -> float:
    """Return the FLOPs of one forward pass.

    Args:
        config: sizes of the model.
        rows: rows of the batch.
        length: tokens a row.
        predictions: positions a row that the LM head is computed at.
    """
    return family(config).forward_flops(config, rows, length, predictions)


def encoder_flops(config: ModelConfig, rows: int, length: int, output_positions: int) -> float:
    """Return the FLOPs up to the last hidden states at `output_positions` a row."""
    return family(config).encoder_flops(config, rows, length, output_positions)


def training_step_flops(config: ModelConfig, rows: int, length: int, predictions: int) -> float:
    """Return the FLOPs of a forward and backward pass of the student alone."""
    return 3 * forward_flops(config, rows, length, predictions)
