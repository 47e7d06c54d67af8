"""Next-token prediction: each token of a segment is predicted from the earlier ones.

Radford et al. 2019. The first token of a segment is not predicted; predictions never cross segments.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from dwt_jax.config import Config
from dwt_jax.data.batch import Batch
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.objectives.targets import PredictionCounts, Targets


@dataclass(frozen=True)
class NextTokenObjective:
    """Next-token prediction, which has no settings."""

    name: ClassVar[str] = "next_token"


def make_objective(config: Config, vocabulary: Vocabulary) -> NextTokenObjective:
    """Return the objective. It is the same for every config."""
    return NextTokenObjective()


def make_evaluation_objective(vocabulary: Vocabulary) -> NextTokenObjective:
    """Return the objective of the held-out loss."""
    return NextTokenObjective()


def abstract_objective(config: Config, vocab_size: int) -> NextTokenObjective:
    """Return the objective for use without a tokenizer."""
    return NextTokenObjective()


def scheduled_predictions(config: Config) -> PredictionCounts | None:
    """Return None: the number of predictions is the same at every step."""
    return None


def predictions_per_row(objective: NextTokenObjective, length: int) -> int:
    """Return the number of positions of a row of `length` tokens that the LM head is computed at: all."""
    return length


def make_targets(
    batch: Batch,
    keys: jax.Array,
    objective: NextTokenObjective,
    num_predictions: jax.Array | None = None,
) -> Targets:
    """Shift the tokens of each segment by one.

    The last position of a segment has the next token of the row as its label, with weight 0.

    Args:
        batch: tokens and segment ids, int [B, L].
        keys: not used: nothing is random.
        objective: not used.
        num_predictions: not used.
    """
    tokens, segment_ids = jnp.asarray(batch.tokens, jnp.int32), jnp.asarray(batch.segment_ids, jnp.int32)
    next_segment_ids = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    is_prediction = (segment_ids > 0) & (segment_ids == next_segment_ids)
    labels = jnp.roll(tokens, -1, axis=1)
    return Targets(tokens, None, labels, is_prediction.astype(jnp.float32))
