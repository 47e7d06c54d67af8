"""The result of an objective for a batch: inputs of the model, and labels at some positions."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.objectives.teacher_sample import TeacherSample

EVALUATION_SEED = 20230518  # fixed: the same targets for every model that is ever compared


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """Labels to predict in rows of L tokens, P of them a row.

    Attributes:
        inputs: int32 [B, L], the tokens that student and teacher read.
        positions: int32 [B, P], distinct in a row, where the labels are predicted; None: at all
            positions, so that P is L.
        labels: int32 [B, P], the tokens to predict.
        weights: float32 [B, P], 1 for a prediction, 0 for a filler.
        teacher: what a cache has of the teacher at these positions; None: there is no cache.
    """

    inputs: jax.Array
    positions: jax.Array | None
    labels: jax.Array
    weights: jax.Array
    teacher: TeacherSample | None = None

    def num_predictions(self) -> jax.Array:
        """Return the number of predictions as an fp32 scalar, at least 1."""
        return jnp.maximum(self.weights.sum(), 1)


class PredictionCounts:
    """Numbers of predictions by step and number of tokens, computed when indexed by the step."""

    def __init__(self, probabilities: np.ndarray, length: int) -> None:
        """Take float64 probabilities [steps] and the length L of a row."""
        self.probabilities, self.length = probabilities, length

    def __getitem__(self, steps: Any) -> np.ndarray:
        """Return round(probability · n), at least 1, for n from 0 to L: int32 [..., L + 1]."""
        shares = self.probabilities[steps, None] * np.arange(self.length + 1)
        return np.maximum(1, np.rint(shares)).astype(np.int32)  # rint rounds as Python's round does


def row_keys(seed: jax.Array | int, step: jax.Array | int, rows: jax.Array) -> jax.Array:
    """Derive a random key for each row of a batch, independent of its sharding.

    Args:
        seed: uint32 scalar.
        step: step of the run; evaluation passes 0.
        rows: int [B], numbers of the rows: within the batch, in evaluation within the split.

    Returns:
        keys [B], the same under every sharding.
    """
    key = jax.random.key(seed, impl="threefry2x32")  # the same numbers under every sharding
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
