"""The batch that every objective and every model reads."""

from dataclasses import dataclass

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, on the host or on devices.

    Attributes:
        tokens: int [B, L], ids of the vocabulary; on the host as stored, uint16 or uint32.
        segment_ids: int [B, L], the number of the document within its row, from 1 on; 0 is padding. On
            the host as stored, uint8 or uint16.
    """

    tokens: np.ndarray | jax.Array
    segment_ids: np.ndarray | jax.Array
