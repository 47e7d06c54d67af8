"""Find the tokens with the roles padding, unknown, begin, end and mask."""

from collections.abc import Mapping
from pathlib import Path

from dwt_jax.data.hf_tokenizer import LoadedTokenizer
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import (
    BEGIN_KEY,
    BYTE_LEVEL_TOKENS,
    END_KEY,
    TOKEN_ROLES,
    WORDPIECE_TOKENS,
)


def is_framed_by_end_token(named: Mapping[str, str], ids: Mapping[str, int]) -> bool:
    """Return whether texts are framed by `bos_token` (or `eos_token`) and `eos_token`.

    They are if there is an `eos_token`, and either no mask token (as in tokenizers of decoders) or no tokens
    like [CLS] and [SEP].

    Args:
        named: the tokens that the tokenizer names, by their keys.
        ids: token → id.
    """
    if END_KEY not in named or "mask_token" not in named:
        return END_KEY in named
    has_default = any(
        {tokens.cls, tokens.sep} <= ids.keys() for tokens in (WORDPIECE_TOKENS, BYTE_LEVEL_TOKENS)
    )
    return not has_default and "cls_token" not in named and "sep_token" not in named


def special_token_ids(path: Path, loaded: LoadedTokenizer, ids: Mapping[str, int]) -> dict[str, int]:
    """Return the id of the special token of each role; -1: the tokenizer has none.

    Args:
        path: of the tokenizer, for messages.
        loaded: the tokenizer.
        ids: token → id.

    Raises:
        UserError: a token is not in the vocabulary.
    """
    named = loaded.special_tokens
    if is_framed_by_end_token(named, ids):
        end = named[END_KEY]
        tokens = {
            "pad": named.get("pad_token", end),
            "unk": named.get("unk_token"),
            "cls": named.get(BEGIN_KEY, end),
            "sep": end,
            "mask": named.get("mask_token"),
        }
        return {role: -1 if token is None else ids[token] for role, token in tokens.items()}
    candidates = WORDPIECE_TOKENS, BYTE_LEVEL_TOKENS
    defaults = max(candidates, key=lambda tokens: sum(token in ids for token in tokens))
    role_ids = {}
    for role, default in zip(TOKEN_ROLES, defaults, strict=True):
        token = named.get(f"{role}_token", default)
        if token not in ids:
            is_known = END_KEY in named or any(token in ids for token in defaults)
            raise UserError(
                f"{path}: {role}_token '{token}' is not in the vocabulary, expected the token for that role"
                f"{'' if is_known else ' (or an eos_token in tokenizer_config.json, for a decoder)'}"
            )
        role_ids[role] = ids[token]
    return role_ids
