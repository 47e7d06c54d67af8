"""Fill the masks of texts with a masked language model (`dwt fill-mask`)."""

from collections.abc import Sequence

import jax
import numpy as np

from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors
from dwt_jax.errors import UserError
from dwt_jax.eval.evaluate_model import fit_to_vocabulary
from dwt_jax.eval.masked_words import Guess, MaskedWord, guess_masked_words
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.runs.load import load_model

_BATCH_MASKS = 64
_LENGTH_STEP = 16  # tokens by which the lengths of rows differ
_MASK_TOKENS = ("[MASK]", "<mask>", "<|mask|>")  # of other tokenizers, for a message


def fill_masks(path: str, texts: Sequence[str], top_k: int = 5) -> list[list[list[Guess]]]:
    """Return the most probable tokens for every mask.

    If a text has several masks, each is filled while the others stay masked, as in transformers.

    Args:
        path: run directory or model directory.
        texts: each with at least one mask token of the model's tokenizer.
        top_k: number of tokens for a mask.

    Returns:
        For each text and each of its masks, the best guess first.

    Raises:
        UserError: the model cannot be used, there is no text, a text has no mask or more tokens than the
            model has positions, or a probability is not finite.
    """
    if not texts:
        raise UserError("no text, expected at least one with a mask")
    loaded_model = load_model(path)
    if loaded_model.model.objective != "mlm":
        raise UserError(
            f"--model: {path} predicts next tokens, expected a masked model (dwt generate continues a text)"
        )
    vocabulary = load_vocabulary(loaded_model.tokenizer)
    loaded_model = fit_to_vocabulary(loaded_model, path, len(vocabulary))
    if top_k > len(vocabulary):
        raise UserError(
            f"--top-k is {top_k}, expected at most the {len(vocabulary)} tokens of the vocabulary"
        )
    tokenizer = load_hf_tokenizer(loaded_model.tokenizer)
    with wrap_tokenizer_errors(loaded_model.tokenizer, "a tokenizer that encodes any text"):
        rows = [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    for text, row in zip(texts, rows, strict=True):
        _check_row(text, row, vocabulary, loaded_model.model.max_length)
    params = jax.device_put(loaded_model.params)
    masks = [(row, int(position)) for row in rows for position in np.flatnonzero(row == vocabulary.mask_id)]
    results: list[list[Guess]] = []
    for start in range(0, len(masks), _BATCH_MASKS):
        masked_words = _masked_words(masks[start : start + _BATCH_MASKS], vocabulary, loaded_model.model)
        results += guess_masked_words(params, loaded_model.model, masked_words, loaded_model.tokenizer, top_k)
    remaining = ([_keep_prefix(guess, vocabulary) for guess in result] for result in results)
    guesses = [[next(remaining) for _ in range((row == vocabulary.mask_id).sum())] for row in rows]
    if any(not guess for masks in guesses for guess in masks):
        raise UserError(f"--model: a probability of {path} is not finite, expected finite numbers")
    return guesses


def _check_row(text: str, row: np.ndarray, vocabulary: Vocabulary, max_length: int) -> None:
    """Raise UserError for a text without a mask, and for one that does not fit into the model."""
    mask = vocabulary.tokens[vocabulary.mask_id]
    if vocabulary.mask_id not in row:
        other = next((token for token in _MASK_TOKENS if token in text and token != mask), "")
        hint = f" in place of {other}, which is that of another tokenizer" if other else ""
        raise UserError(f"{text!r} has no mask, expected {mask}{hint}")
    if len(row) > max_length:
        raise UserError(
            f"{text[:60]!r}… has {len(row)} tokens, expected at most the model's {max_length} positions"
        )


def _masked_words(
    masks: Sequence[tuple[np.ndarray, int]], vocabulary: Vocabulary, model: ModelConfig
) -> list[MaskedWord]:
    """Return rows of one length for (tokens, position) of masks. Few lengths occur: each is compiled."""
    longest = max(len(row) for row, _ in masks)
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, model.max_length)
    masked_words = []
    for row, position in masks:
        tokens = np.pad(row, (0, length - len(row)), constant_values=vocabulary.pad_id)
        segment_ids = (np.arange(length) < len(row)).astype(np.int32)
        masked_words.append(MaskedWord("", "", tokens, segment_ids, position))
    return masked_words


def _keep_prefix(guess: Guess, vocabulary: Vocabulary) -> Guess:
    """Return the guess as '##ed' if that is its token: 'ed' may be another."""
    token = vocabulary.tokens[guess.token]
    return guess._replace(word=token) if token.startswith("##") else guess
