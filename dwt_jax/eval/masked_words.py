"""Predict masked words of held-out rows, to inspect what models have learned.

One word is masked in each of a few rows. The words depend on the prepared data alone, so they are the same
for every model with its vocabulary.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from dwt_jax.data.dataset import num_rows, open_dataset, read_rows
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives.targets import EVALUATION_SEED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
    token: int  # its id


def choose_masked_words(data: Path, count: int) -> list[MaskedWord]:
    """Mask one word in each of up to `count` evenly spaced held-out rows.

    A word is a whole word that is a single token of at least MIN_LETTERS letters. It is drawn with a fixed
    seed from the middle half of its row. A row without such a word is skipped, not replaced.

    Args:
        data: a prepared directory.
        count: number of rows to try, at least 1.
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
        positions = _word_positions(tokens, segment_ids, vocabulary, tokenizer)
        if not positions:
            continue
        position = int(np.random.default_rng([EVALUATION_SEED, int(row)]).choice(positions))
        start, stop = _context(tokens, segment_ids, position, vocabulary)
        before, after = (
            tokenizer.decode(tokens[part].tolist(), skip_special_tokens=True).strip()
            for part in (slice(start, position), slice(position + 1, stop))
        )
        word = decode_token(tokenizer, tokens[position])
        masked = tokens.copy()
        masked[position] = vocabulary.mask_id
        text = f"{before} {BLANK} {after}".strip()
        masked_words.append(MaskedWord(text, word, masked, segment_ids, position))
    return masked_words


def _word_positions(
    tokens: np.ndarray, segment_ids: np.ndarray, vocabulary: Vocabulary, tokenizer: "Tokenizer"
) -> list[int]:
    """Return the positions of words of one token in the middle half of a row."""
    continues = np.append(vocabulary.continuation[tokens], False)
    candidates = (segment_ids > 0) & ~continues[:-1] & ~continues[1:]
    candidates &= ~np.isin(tokens, vocabulary.special_ids)
    length = len(tokens)
    positions = [int(i) for i in np.flatnonzero(candidates) if length // 4 <= i < length - length // 4]
    texts = [decode_token(tokenizer, tokens[i]) for i in positions]
    return [
        i for i, text in zip(positions, texts, strict=True) if len(text) >= MIN_LETTERS and text.isalpha()
    ]


def _context(
    tokens: np.ndarray, segment_ids: np.ndarray, position: int, vocabulary: Vocabulary
) -> tuple[int, int]:
    """Return (start, stop) of whole words around a position, of its segment."""
    segment = np.flatnonzero(segment_ids == segment_ids[position])
    start, stop = max(segment[0], position - CONTEXT_TOKENS), min(segment[-1] + 1, position + CONTEXT_TOKENS)
    while start > segment[0] and vocabulary.continuation[tokens[start]]:
        start -= 1
    while stop <= segment[-1] and vocabulary.continuation[tokens[stop]]:
        stop += 1
    return int(start), int(stop)


def decode_token(tokenizer: "Tokenizer", token: int) -> str:
    """Return the text of one token, without the space or mark before it."""
    return tokenizer.decode([int(token)], skip_special_tokens=False).strip().removeprefix("##")


def guess_masked_words(
    params: Params,
    model: ModelConfig,
    masked_words: Sequence[MaskedWord],
    tokenizer_dir: Path,
    top_k: int = 3,
) -> list[list[Guess]]:
    """Return the `top_k` most probable tokens for each masked word, the best first.

    Args:
        params: of the model.
        model: its config.
        masked_words: what `choose_masked_words` returned.
        tokenizer_dir: of the rows and the model.
        top_k: number of guesses.

    Returns:
        A list for each word; an empty one where the model's logits are not finite.
    """
    if not masked_words:
        return []
    tokenizer = load_hf_tokenizer(tokenizer_dir)
    tokens, segment_ids = (
        np.stack([getattr(masked_word, name) for masked_word in masked_words])
        for name in ("tokens", "segment_ids")
    )
    positions = np.array([[masked_word.position] for masked_word in masked_words], np.int32)

    top = _top_tokens(params, tokens, segment_ids, positions, model=model, top_k=top_k)
    probabilities, ids = jax.device_get(top)
    return [
        [Guess(decode_token(tokenizer, i), float(p), int(i)) for i, p in zip(row_ids, row, strict=True)]
        if np.isfinite(row).all()
        else []
        for row_ids, row in zip(ids, probabilities, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _top_tokens(
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    model: ModelConfig,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the highest probabilities at one position of each row and their tokens, [B, top_k] each."""
    hidden = family(model).encode(params, model, tokens, segment_ids, positions=positions)
    logits = lm_head_logits(params, model, hidden)[:, 0]
    return jax.lax.top_k(jax.nn.softmax(logits), top_k)
