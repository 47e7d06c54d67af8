"""Guess masked words of held-out rows, to look at what models have learned.

One word is masked in each of a few rows. The words depend on the prepared data alone, so every model with
its vocabulary is asked the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.targets import EVALUATION_SEED

BLANK = "____"
CONTEXT_TOKENS = 14  # printed on each side of a masked word
MIN_LETTERS = 4


class MaskedWord(NamedTuple):
    """A row with one masked word."""

    text: str  # around the word, which is BLANK
    word: str
    tokens: np.ndarray  # int32 [L], the whole row, with the mask
    segment_ids: np.ndarray  # int32 [L]
    position: int  # of the mask


class Guess(NamedTuple):
    """One of the most probable tokens."""

    word: str
    probability: float


def choose_masked_words(data: Path, count: int) -> list[MaskedWord]:
    """Mask a word in each of `count` held-out rows, evenly spaced.

    A word is one token of at least MIN_LETTERS letters. Each is drawn among the words in the middle half of
    its row. Rows without such a word are left out.

    Args:
        data: a prepared directory.
        count: number of rows, at least 1.
    """
    dataset, vocabulary = open_dataset(data, "held_out"), load_vocabulary(data / "tokenizer")
    tokenizer = load_hf_tokenizer(data / "tokenizer")
    available = num_rows(dataset)
    rows = np.unique(np.linspace(0, available - 1, min(count, available) + 2)[1:-1].astype(np.int64))
    batch = read_rows(dataset, rows)
    masked_words = []
    for row, tokens, segment_ids in zip(
        rows, np.asarray(batch.tokens, np.int32), np.asarray(batch.segment_ids, np.int32), strict=True
    ):
        positions = _word_positions(tokens, segment_ids, vocabulary)
        if not len(positions):
            continue
        position = int(np.random.default_rng([EVALUATION_SEED, int(row)]).choice(positions))
        segment = np.flatnonzero(segment_ids == segment_ids[position])
        start = max(segment[0], position - CONTEXT_TOKENS)
        stop = min(segment[-1] + 1, position + 1 + CONTEXT_TOKENS)
        before, after = (
            tokenizer.decode(tokens[part].tolist(), skip_special_tokens=True)
            for part in (slice(start, position), slice(position + 1, stop))
        )
        word = _word(tokens[position], vocabulary)
        masked = tokens.copy()
        masked[position] = vocabulary.mask_id
        text = f"{before} {BLANK} {after}".strip()
        masked_words.append(MaskedWord(text, word, masked, segment_ids, position))
    return masked_words


def _word_positions(tokens: np.ndarray, segment_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return the positions of words of one token in the middle half of a row, int64."""
    length = len(tokens)
    continues = np.append(vocabulary.continuation[tokens], False)
    is_word = np.array(
        [len(word) >= MIN_LETTERS and word.isalpha() for word in (_word(i, vocabulary) for i in tokens)]
    )
    is_word &= (segment_ids > 0) & ~continues[:-1] & ~continues[1:]
    is_word &= ~np.isin(tokens, vocabulary.special_ids)
    return length // 4 + np.flatnonzero(is_word[length // 4 : length - length // 4])


def _word(token: int, vocabulary: Vocabulary) -> str:
    return vocabulary.tokens[token].removeprefix(vocabulary.word_prefix)


def guess_masked_words(
    params: Params,
    model: ModelConfig,
    masked_words: Sequence[MaskedWord],
    vocabulary: Vocabulary,
    top_k: int = 3,
) -> list[list[Guess]]:
    """Return the `top_k` most probable tokens for each masked word, the best first.

    Args:
        params: of the model.
        model: its config.
        masked_words: what `choose_masked_words` returned.
        vocabulary: of the rows and the model.
        top_k: number of guesses.
    """
    tokens, segment_ids = (
        np.stack([getattr(masked_word, name) for masked_word in masked_words])
        for name in ("tokens", "segment_ids")
    )
    positions = np.array([[masked_word.position] for masked_word in masked_words], np.int32)

    @jax.jit
    def top_guesses(
        params: Params, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        hidden = family(model).encode(params, model, tokens, segment_ids, positions=positions)
        logits = lm_head_logits(params, model, hidden)[:, 0]
        return jax.lax.top_k(jax.nn.softmax(logits), top_k)

    probabilities, ids = jax.device_get(top_guesses(params, tokens, segment_ids, positions))
    return [
        [Guess(_word(i, vocabulary), float(p)) for i, p in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(ids, probabilities, strict=True)
    ]
