"""FLOPs by formula. XLA's own count takes the body of a scan once; this one is tested by hand.

A product [m, k] · [k, n] is 2·m·k·n FLOPs; a backward pass is twice its forward pass;
everything that is not a matrix product is left out, as is customary for MFU
(Chowdhery et al. 2022, appendix B).
"""

from dwt_jax.config import Model
from dwt_jax.models.common.layers import padded_vocab_size


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
