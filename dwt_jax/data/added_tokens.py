"""Special and added tokens, as the JSON files beside a vocabulary name them.

The same tokens in the same order and with the same flags as transformers 5 adds them
(PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.errors import UserError
from dwt_jax.model_files import is_model_file, read_model_json
from dwt_jax.models.tokenizer_pipelines import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKEN_ROLES = SpecialTokens._fields
TOKEN_KEYS = tuple(f"{role}_token" for role in TOKEN_ROLES)
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_HF_TOKEN_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""In the order in which transformers adds them."""
_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")

BYTE_ORDER_MARK = "\ufeff"

AddedTokensById = Mapping[int, "AddedToken"]
_TokenWithFlags = tuple[str, dict[str, bool]]  # a token, and how it is matched in text


def register_added_tokens(
    tokenizer: "Tokenizer",
    directory: Path,
    defaults: Mapping[str, str],
    added_tokens: AddedTokensById | None = None,
) -> None:
    """Add the tokens that are matched in text before the pipeline runs, as transformers does.

    Added tokens come first, in the order of their ids, then special tokens. Those that the vocabulary lacks
    get the next ids after its own, whatever ids the files declare (see `print_moved_tokens`).

    Args:
        tokenizer: modified in place.
        directory: with tokenizer_config.json, special_tokens_map.json and added_tokens.json, each optional.
        defaults: special tokens by key (`cls_token`), where the files name no others.
        added_tokens: those of tokenizer.json; by default those that `tokenizer` has.

    Raises:
        UserError: for a special token without an id.
    """
    from tokenizers import AddedToken

    existing_tokens = tokenizer.get_added_tokens_decoder()
    existing_contents = {token.content for token in existing_tokens.values()}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens_with_ids = list_added_tokens(directory, existing_tokens if added_tokens is None else added_tokens)
    tokens_to_add = {token: flags for _, token, flags in tokens_with_ids}
    has_id = frozenset(tokens_to_add)
    for key, (token, flags) in _list_special_tokens(directory, defaults):
        if token in has_id:
            tokens_to_add[token] |= {"special": True}
        elif token in existing_contents:
            continue
        elif token in vocab or BYTE_ORDER_MARK + token in vocab:  # the later of two keys with one token wins
            tokens_to_add[token] = {"normalized": False, **flags, "special": True}
        else:
            raise UserError(
                f"{directory}: {key} '{token}' is not in the vocabulary, expected one that has an id"
            )
    tokenizer.add_tokens([AddedToken(token, **flags) for token, flags in tokens_to_add.items()])


def print_moved_tokens(directory: Path, ids: Mapping[str, int]) -> None:
    """Print a line if added tokens have other ids than the files declare, as in transformers.

    Args:
        directory: as for `list_added_tokens`.
        ids: token → id of the loaded tokenizer.
    """
    moved = [(i, token) for i, token, _ in list_added_tokens(directory, {}) if ids.get(token, i) != i]
    if moved:
        i, token = moved[0]
        print(
            f"{directory}: {len(moved)} of its added tokens have other ids than its files declare, as in "
            f"transformers: {token!r} has {ids[token]}, not {i}",
            file=sys.stderr,
        )


def list_added_tokens(
    directory: Path, added_tokens: AddedTokensById
) -> list[tuple[int, str, dict[str, bool]]]:
    """List the tokens that a directory adds to its vocabulary.

    Args:
        directory: with a tokenizer_config.json or an added_tokens.json, each optional.
        added_tokens: those of tokenizer.json. Ignored if tokenizer_config.json has an
            `added_tokens_decoder`, as added_tokens.json is.

    Returns:
        (id, token, flags) sorted by id.

    Raises:
        UserError: for entries that are not tokens by id.
    """
    config = read_json_or_empty(directory / TOKENIZER_CONFIG)
    added_tokens_json = read_json_or_empty(directory / "added_tokens.json")
    decoder = config.get("added_tokens_decoder")
    try:
        if decoder is not None:
            entries = [(int(i), *_parse_token(dict(token), directory)) for i, token in decoder.items()]
        else:
            contents = {token.content for token in added_tokens.values()}
            special = _special_token_strings(config, _read_special_tokens_map(directory))
            entries = [
                (i, token.content, {flag: getattr(token, flag) for flag in _TOKEN_FLAGS})
                for i, token in added_tokens.items()
            ]
            entries += [  # of tokens with one id the last counts, and before all that of tokenizer.json
                (i, token, {"special": token in special, "normalized": token not in special})
                for i, token in {int(i): token for token, i in added_tokens_json.items()}.items()
                if token not in contents and i not in added_tokens
            ]
        if not all(token for _, token, _ in entries):
            raise TypeError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, UserError):
        raise UserError(f"{directory}: invalid added tokens, expected tokens with their ids") from None
    return sorted(entries, key=lambda entry: entry[0])


def _list_special_tokens(directory: Path, defaults: Mapping[str, str]) -> list[tuple[str, _TokenWithFlags]]:
    """(key, token) of the special tokens that the files name, or else `defaults`."""
    config = read_json_or_empty(directory / TOKENIZER_CONFIG)
    special_tokens_map = _read_special_tokens_map(directory)
    settings = config | special_tokens_map
    tokens_by_key = {**defaults, **{key: settings[key] for key in _HF_TOKEN_KEYS if settings.get(key)}}
    pairs = [(key, tokens_by_key[key]) for key in _HF_TOKEN_KEYS if key in tokens_by_key]
    pairs += [  # keys of other models: transformers takes every such key for a special token's
        (key, token)
        for key, token in settings.items()
        if key.endswith("_token") and key not in _HF_TOKEN_KEYS and isinstance(token, str | dict) and token
    ]
    extra_tokens = [*_extra_special_tokens(config), *_extra_special_tokens(special_tokens_map)]
    pairs += [("special token", token) for token in extra_tokens]
    return [(key, _parse_token(token, directory)) for key, token in pairs]


def _extra_special_tokens(settings: dict[str, Any]) -> list[Any]:
    tokens: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        tokens += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return tokens


def _special_token_strings(config: dict[str, Any], special_tokens_map: dict[str, Any]) -> set[str]:
    """The tokens of an added_tokens.json that transformers marks as special: those that it has as strings
    at that point, so not the additional ones of the map."""
    settings = config | {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in special_tokens_map.items()
    }
    extra = {"extra_special_tokens": special_tokens_map.get("extra_special_tokens")}
    candidates = [
        *(settings.get(key) for key in _HF_TOKEN_KEYS),
        *_extra_special_tokens(config),
        *_extra_special_tokens(extra),
    ]
    return {token for token in candidates if isinstance(token, str)}


def _parse_token(value: Any, path: Path) -> _TokenWithFlags:
    if isinstance(value, str):
        return value, {"special": True}
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise UserError(f"{path}: special token {content!r}, expected a token")
    return content, {flag: value[flag] for flag in _TOKEN_FLAGS if isinstance(value.get(flag), bool)}


def _read_special_tokens_map(directory: Path) -> dict[str, Any]:
    """special_tokens_map.json, which transformers ignores beside an added_tokens_decoder."""
    special_tokens_map = read_json_or_empty(directory / _SPECIAL_TOKENS_MAP)
    has_decoder = "added_tokens_decoder" in read_json_or_empty(directory / TOKENIZER_CONFIG)
    return {} if has_decoder else special_tokens_map


def read_special_tokens(directory: Path, defaults: SpecialTokens) -> SpecialTokens:
    """Read the special tokens that the JSON files of a tokenizer name.

    Args:
        directory: with tokenizer_config.json and special_tokens_map.json, each optional; the second
            takes precedence.
        defaults: for roles that neither file names.

    Raises:
        UserError: for a value that is not a token.
    """
    config = read_json_or_empty(directory / TOKENIZER_CONFIG)
    settings = {key: (value, TOKENIZER_CONFIG) for key, value in config.items()}
    special_tokens_map = _read_special_tokens_map(directory)
    settings |= {key: (value, _SPECIAL_TOKENS_MAP) for key, value in special_tokens_map.items()}
    tokens = []
    for key, default in zip(TOKEN_KEYS, defaults, strict=True):
        value, file = settings.get(key, (None, ""))
        token = value.get("content") if isinstance(value, dict) else value
        if token is not None and not isinstance(token, str):
            raise UserError(f"{directory / file}: {key} is {value!r}, expected a token")
        tokens.append(token or default)
    return SpecialTokens(*tokens)


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; an empty one if there is no such file.

    Raises:
        UserError: for a file with anything else, and for a broken link.
    """
    return read_model_json(path, "JSON, an object") if is_model_file(path) else {}
