"""Continue texts with a causal language model (`dwt generate`).

For inspection only: each token costs a forward pass over the whole text, since nothing is cached.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors
from dwt_jax.errors import UserError
from dwt_jax.eval.evaluate_model import fit_to_vocabulary
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.runs.load import load_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LENGTH_STEP = 32  # tokens by which the lengths of rows differ: each is compiled


def continue_texts(
    path: str, texts: Sequence[str], *, max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """Return a continuation of each text.

    A continuation begins with a space where a word begins, so that it can be appended to the text. It ends
    at the end token (not returned), after `max_new_tokens`, or at the last position of the model.

    Args:
        path: run directory or model directory.
        texts: texts of at least one token each.
        max_new_tokens: maximum length of a continuation.
        temperature: sampling temperature; 0: always take the most probable token.
        seed: random seed. Each text is sampled independently.

    Raises:
        UserError: the model cannot be used, there is no text, a text has as many tokens as the model has
            positions, or a probability is not finite.
    """
    if not texts:
        raise UserError("no text, expected at least one to continue")
    loaded_model = load_model(path)
    model = loaded_model.model
    if model.objective != "next_token":
        raise UserError(
            f"--model: {path} predicts masked tokens, expected a causal language model (dwt fill-mask fills "
            "masks)"
        )
    vocabulary = load_vocabulary(loaded_model.tokenizer)
    loaded_model = fit_to_vocabulary(loaded_model, path, len(vocabulary))
    tokenizer = load_hf_tokenizer(loaded_model.tokenizer)
    params = jax.device_put(loaded_model.params)
    continuations = []
    for number, text in enumerate(texts):
        with wrap_tokenizer_errors(loaded_model.tokenizer, "a tokenizer that encodes any text"):
            ids = [vocabulary.cls_id, *tokenizer.encode(text, add_special_tokens=False).ids]
        if len(ids) >= model.max_length:
            raise UserError(
                f"{text[:60]!r}… has {len(ids)} tokens, expected fewer than the model's {model.max_length} "
                "positions"
            )
        key = jax.random.fold_in(jax.random.key(seed), number)
        end = min(len(ids) + max_new_tokens, model.max_length)
        new_ids = _continue(params, loaded_model.model, ids, end, temperature, key, vocabulary)
        continuations.append(decode_continuation(tokenizer, ids, new_ids))
    return continuations


def decode_continuation(tokenizer: "Tokenizer", ids: list[int], new_ids: list[int]) -> str:
    """Decode a continuation together with its text: alone, a word would lose its space or keep '##'.

    Args:
        tokenizer: of the model.
        ids: of the text.
        new_ids: token ids of the continuation.
    """
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text = tokenizer.decode([*ids, *new_ids], skip_special_tokens=True)
    return text[len(before) :] if text.startswith(before) else tokenizer.decode(new_ids)


def _continue(
    params: Params,
    model: ModelConfig,
    ids: list[int],
    end: int,
    temperature: float,
    key: jax.Array,
    vocabulary: Vocabulary,
) -> list[int]:
    """The ids that follow `ids`, up to `end` tokens in all."""
    all_ids = list(ids)
    while len(all_ids) < end:
        length = min(-(-len(all_ids) // _LENGTH_STEP) * _LENGTH_STEP, model.max_length)
        row = np.pad(np.array(all_ids, np.int32), (0, length - len(all_ids)))
        logits = np.asarray(_jit_next_logits(model)(params, row, len(all_ids)))[: len(vocabulary)]
        if not np.isfinite(logits).all():
            raise UserError("--model: a probability is not finite, expected finite numbers")
        if temperature > 0:
            draw_key = jax.random.fold_in(key, len(all_ids))
            next_id = int(jax.random.categorical(draw_key, jnp.asarray(logits) / temperature))
        else:
            next_id = int(logits.argmax())
        if next_id == vocabulary.sep_id:
            break
        all_ids.append(next_id)
    return all_ids[len(ids) :]


@functools.cache
def _jit_next_logits(model: ModelConfig) -> Any:
    """Return the jitted (params, tokens [L], number of tokens n) → logits of token n, fp32 [V]."""

    def next_logits(params: Params, tokens: jax.Array, count: jax.Array) -> jax.Array:
        segment_ids = (jnp.arange(tokens.shape[0]) < count).astype(jnp.int32)
        last = jnp.reshape(count - 1, (1, 1))
        hidden = family(model).encode(params, model, tokens[None], segment_ids[None], positions=last)
        return lm_head_logits(params, model, hidden)[0, 0]

    return jax.jit(next_logits)
