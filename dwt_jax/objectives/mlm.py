"""Masked language modelling: some tokens of a row are hidden and predicted.

Masks are drawn on the device, with a key for each row (see `targets.row_keys`), so that they do not
depend on how the batch is sharded (Devlin et al. 2019, section 3.1).
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Config, Mlm, Schedule
from dwt_jax.data.batch import Batch
from dwt_jax.data.encode import MAX_WORD_TOKENS
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.errors import UserError
from dwt_jax.objectives.schedules import schedule_values
from dwt_jax.objectives.targets import PredictionCounts, Targets


class MaskingVocab(NamedTuple):
    """The part of a vocabulary that masking needs; hashable, so that it can be a static argument."""

    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    continuations: bytes = b""  # packed bits [vocab_size]; only for whole-word masking

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, whole_word: bool) -> "MaskingVocab":
        """Extract the part of a tokenizer's vocabulary that masking needs.

        Raises:
            UserError: the vocabulary has no mask token.
        """
        if vocabulary.mask_id < 0:
            raise UserError(
                "data.tokenizer.path: the tokenizer has no mask_token, expected one for a masked "
                "model (or a decoder's model_type)"
            )
        bits = np.packbits(vocabulary.continuation).tobytes() if whole_word else b""
        return cls(len(vocabulary.tokens), vocabulary.mask_id, tuple(vocabulary.special_ids), bits)

    def continuation(self) -> np.ndarray:
        """Return bool [vocab_size], whether a token continues a word."""
        bits = np.unpackbits(np.frombuffer(self.continuations, np.uint8), count=self.vocab_size)
        return bits.astype(bool)


@dataclass(frozen=True)
class MlmObjective:
    """Masked language modelling with the settings of a config and a vocabulary.

    The probability of `config` is a constant, the highest of the run: it determines the shapes.
    """

    config: Mlm
    vocabulary: MaskingVocab
    name: ClassVar[str] = "mlm"

    @property
    def probability(self) -> float:
        """Share of a row's tokens that are predicted, at most."""
        return self.config.probability.value


def make_objective(config: Config, vocabulary: Vocabulary) -> MlmObjective:
    """Return the objective of `config.mlm`.

    Raises:
        UserError: whole-word masking with a vocabulary that does not mark where words begin.
    """
    if config.mlm.whole_word and not vocabulary.marks_words:
        raise UserError(
            "mlm.whole_word is True, but the tokenizer does not mark where words begin, expected False (or a "
            "tokenizer with '##', 'Ġ' or '▁')"
        )
    return _objective(config.mlm, MaskingVocab.from_vocabulary(vocabulary, config.mlm.whole_word))


def make_evaluation_objective(vocabulary: Vocabulary) -> MlmObjective:
    """Return the original masking (15 % of the tokens, 80/10/10), independent of the run's masking."""
    return _objective(Mlm(), MaskingVocab.from_vocabulary(vocabulary, whole_word=False))


def abstract_objective(config: Config, vocab_size: int) -> MlmObjective:
    """Return `config.mlm` for a vocabulary of known size only: shapes and program are right."""
    bits = bytes(-(-vocab_size // 8)) if config.mlm.whole_word else b""
    # Which ids are special changes constants alone.
    return _objective(config.mlm, MaskingVocab(vocab_size, 4, tuple(range(5)), bits))


def _objective(config: Mlm, vocabulary: MaskingVocab) -> MlmObjective:
    """Return the objective without scheduled values, so that all schedules share a program."""
    highest = Schedule(value=max(config.probability.stage_values()))
    return MlmObjective(dataclasses.replace(config, probability=highest), vocabulary)


def scheduled_predictions(config: Config) -> PredictionCounts | None:
    """Return the numbers of predictions of all steps; None if they are the same at every step."""
    schedule, steps = config.mlm.probability, max(config.train.steps, 1)
    if schedule.kind == "constant":
        return None
    values = schedule_values(schedule, steps, np.float64)
    # A rounding error may take an interpolated value beyond the ends, and its row beyond P predictions.
    stages = schedule.stage_values()
    return PredictionCounts(np.clip(values, min(stages), max(stages)), config.data.sequence_length)


def predictions_per_row(objective: MlmObjective, length: int) -> int:
    """Return the number of predictions of a full row of `length` tokens, the highest of the run."""
    return max(1, round(objective.probability * length))


def make_targets(
    batch: Batch, keys: jax.Array, objective: MlmObjective, num_predictions: jax.Array | None = None
) -> Targets:
    """Draw the predictions of each row.

    A row with n tokens (specials counted, padding not) has round(probability · n) predictions. A full row
    has exactly P at the highest probability of the run; unused predictions have weight 0. Special tokens and
    padding are never predicted. With `whole_word`, whole words are chosen in random order as long as they
    fit, so a row may have fewer predictions, by less than a word. The tokens of a word of more than
    `MAX_WORD_TOKENS` tokens, or of more than the row's number, are chosen one by one.

    Args:
        batch: tokens and segment ids, int [B, L].
        keys: one random key a row [B].
        objective: probabilities and vocabulary.
        num_predictions: number of predictions of a row by its number of tokens, int [L + 1]; None: that of
            the objective's probability.
    """
    tokens, segment_ids = jnp.asarray(batch.tokens, jnp.int32), jnp.asarray(batch.segment_ids, jnp.int32)
    mask_row = functools.partial(_mask_row, objective=objective, table=num_predictions)
    return jax.vmap(mask_row)(tokens, segment_ids, keys)


def _mask_row(
    tokens: jax.Array,
    segment_ids: jax.Array,
    key: jax.Array,
    objective: MlmObjective,
    table: jax.Array | None,
) -> Targets:
    """Return the targets of one row [L]."""
    mlm, vocabulary, length = objective.config, objective.vocabulary, tokens.shape[0]
    max_predictions = predictions_per_row(objective, length)
    choose_key, action_key, random_key = jax.random.split(key, 3)
    special = jnp.isin(tokens, jnp.array(vocabulary.special_ids, jnp.int32))
    candidate = (segment_ids > 0) & ~special
    num_tokens = (segment_ids > 0).sum()
    if table is None:  # not computed from num_tokens, because rounding in fp32 is not Python's
        table = jnp.array([predictions_per_row(objective, n) for n in range(length + 1)], jnp.int32)
    num_predictions = table[num_tokens]
    uniform = jax.random.uniform(choose_key, (length,))
    if mlm.whole_word:
        order, is_prediction = _choose_whole_words(
            tokens, segment_ids, candidate, uniform, num_predictions, vocabulary
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
    return Targets(tokens, positions, labels, is_prediction.astype(jnp.float32))


def _choose_whole_words(
    tokens: jax.Array,
    segment_ids: jax.Array,
    candidate: jax.Array,
    uniform: jax.Array,
    num_predictions: jax.Array,
    vocabulary: MaskingVocab,
) -> tuple[jax.Array, jax.Array]:
    """Choose whole words in random order, each if it still fits into `num_predictions`.

    Text without spaces, as Chinese in byte-level BPE or Unigram, is one long word: its tokens are chosen one
    by one, as without `whole_word`. So the first choice always fits.

    Returns:
        positions int [L], the chosen ones first, and bool [L], whether each of them is chosen.
    """
    length = tokens.shape[0]
    index = jnp.arange(length)
    previous = jnp.roll(candidate & (segment_ids == jnp.roll(segment_ids, -1)), 1).at[0].set(False)
    continues = jnp.asarray(vocabulary.continuation())[tokens] & candidate & previous

    def word_starts(continues: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first token and the number of tokens of the word that each token is in."""
        start = jax.lax.cummax(jnp.where(continues, 0, index))
        return start, jnp.zeros(length, jnp.int32).at[start].add(candidate)[start]

    size = word_starts(continues)[1]
    start, size = word_starts(continues & (size <= jnp.minimum(MAX_WORD_TOKENS, num_predictions)))
    order = jnp.argsort(jnp.where(candidate, uniform[start], 2.0), stable=True)  # words stay together

    def select_word(
        carry: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        num_selected, select_current = carry
        fits = candidate[position] & (num_selected + size[position] <= num_predictions)
        is_start = start[position] == position
        select_current = jnp.where(is_start, fits, select_current)  # a word's first token decides for all
        num_selected = num_selected + jnp.where(select_current & is_start, size[position], 0)
        return (num_selected, select_current), select_current

    is_selected = jax.lax.scan(select_word, (jnp.int32(0), jnp.array(False)), order)[1]
    selected_first = jnp.argsort(~is_selected, stable=True)
    return order[selected_first], is_selected[selected_first]
