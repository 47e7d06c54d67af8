"""Which tokens are predicted and what the student sees in their place, drawn on the device.

Every row has a key of its own, made from (seed, step, row of the batch), so that the masks
do not depend on how the batch is laid over devices. BERT (Devlin et al. 2019, section 3.1).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Mlm
from dwt_jax.data.tokenizer import Vocabulary

EVALUATION_SEED = 20230518  # fixed: the same masks for every model that is ever compared


class MaskingVocab(NamedTuple):
    """What masking needs of a vocabulary, hashable, so that it can be a static argument."""

    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    continuations: bytes = b""  # packed bits [vocab]; only for whole-word masking

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, whole_word: bool) -> "MaskingVocab":
        bits = np.packbits(vocabulary.continuation).tobytes() if whole_word else b""
        return cls(len(vocabulary.tokens), vocabulary.mask_id, tuple(vocabulary.special_ids), bits)

    def continuation(self) -> np.ndarray:
        """bool [vocab_size]"""
        bits = np.unpackbits(np.frombuffer(self.continuations, np.uint8), count=self.vocab_size)
        return bits.astype(bool)


class MaskedBatch(NamedTuple):
    """P = round(rate · L) predictions a row; those beyond a row's own number weigh 0."""

    tokens: jax.Array  # int32 [B, L], what the models read
    positions: jax.Array  # int32 [B, P], distinct in a row
    labels: jax.Array  # int32 [B, P], the tokens that were there
    weights: jax.Array  # float32 [B, P], 1 for a prediction, 0 for a filler


def max_predictions_per_seq(mlm: Mlm, length: int) -> int:
    return max(1, round(mlm.probability * length))


def row_keys(seed: jax.Array | int, step: jax.Array | int, rows: jax.Array) -> jax.Array:
    """A key for each of int [B] rows at a step. Evaluation says step 0 and the row's number."""
    key = jax.random.key(seed, impl="threefry2x32")  # the same numbers under every sharding
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def apply_mlm_mask(
    tokens: jax.Array, segments: jax.Array, keys: jax.Array, mlm: Mlm, vocabulary: MaskingVocab
) -> MaskedBatch:
    """Draw the predictions of each row.

    tokens, segments: int [B, L]; keys: [B]. A row with n tokens (specials counted, padding
    not) gets round(rate · n) predictions: exactly P where it is full. Never a special token
    or padding. With `whole_word`, words are taken whole, in random order, as long as they
    fit, so a row may stay below its number by less than a word.
    """
    tokens, segments = tokens.astype(jnp.int32), segments.astype(jnp.int32)
    return jax.vmap(functools.partial(_mask_row, mlm=mlm, vocabulary=vocabulary))(tokens, segments, keys)


def _mask_row(tokens, segments, key, mlm: Mlm, vocabulary: MaskingVocab) -> MaskedBatch:
    length = tokens.shape[0]
    max_predictions = max_predictions_per_seq(mlm, length)
    choose_key, action_key, random_key = jax.random.split(key, 3)
    special = jnp.isin(tokens, jnp.array(vocabulary.special_ids, jnp.int32))
    candidate = (segments > 0) & ~special
    num_tokens = (segments > 0).sum()
    # A table, because rounding in fp32 is not Python's: at some rates a full row would lack one.
    num_predictions = jnp.array([max_predictions_per_seq(mlm, n) for n in range(length + 1)], jnp.int32)[
        num_tokens
    ]
    uniform = jax.random.uniform(choose_key, (length,))
    if mlm.whole_word:
        order, is_prediction = _choose_whole_words(
            tokens, segments, candidate, uniform, num_predictions, vocabulary
        )
    else:
        order = jnp.argsort(jnp.where(candidate, uniform, 2.0))
        is_prediction = jnp.arange(length) < jnp.minimum(num_predictions, candidate.sum())
    positions, is_prediction = order[:max_predictions].astype(jnp.int32), is_prediction[:max_predictions]
    labels = tokens[positions]
    ordinary_ids = np.setdiff1d(np.arange(vocabulary.vocab_size), vocabulary.special_ids).astype(np.int32)
    random = jnp.asarray(ordinary_ids)[
        jax.random.randint(random_key, (max_predictions,), 0, ordinary_ids.size)
    ]
    action = jax.random.uniform(action_key, (max_predictions,))
    replacements = jnp.where(action < mlm.mask_token_share + mlm.random_token_share, random, labels)
    replacements = jnp.where(action < mlm.mask_token_share, vocabulary.mask_id, replacements)
    tokens = tokens.at[positions].set(jnp.where(is_prediction, replacements, labels), unique_indices=True)
    return MaskedBatch(tokens, positions, labels, is_prediction.astype(jnp.float32))


def _choose_whole_words(tokens, segments, candidate, uniform, num_predictions, vocabulary: MaskingVocab):
    """(order, chosen), both [L]: positions with the chosen ones first, and which those are.

    Words come in random order; each is taken if it still fits into `wanted`.
    """
    length = tokens.shape[0]
    index = jnp.arange(length)
    previous = jnp.roll(candidate & (segments == jnp.roll(segments, -1)), 1).at[0].set(False)
    continues = jnp.asarray(vocabulary.continuation())[tokens] & candidate & previous
    start = jax.lax.cummax(jnp.where(continues, 0, index))  # of the word that each token is in
    size = jnp.zeros(length, jnp.int32).at[start].add(candidate)[start]
    order = jnp.argsort(jnp.where(candidate, uniform[start], 2.0), stable=True)  # words stay together

    def select_word(carry, position):
        num_selected, select_current = carry
        fits = candidate[position] & (num_selected + size[position] <= num_predictions)
        select_current = jnp.where(
            start[position] == position, fits, select_current
        )  # a word's first token decides for all
        return (
            num_selected + jnp.where(select_current & (start[position] == position), size[position], 0),
            select_current,
        ), select_current

    is_selected = jax.lax.scan(select_word, (jnp.int32(0), False), order)[1]
    selected_first = jnp.argsort(~is_selected, stable=True)
    return order[selected_first], is_selected[selected_first]
