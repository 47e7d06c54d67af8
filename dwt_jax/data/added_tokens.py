"""Special and added tokens, as the JSON files beside a vocabulary name them.

The same tokens in the same order, with the same flags, as transformers 5 adds them
(PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.errors import UserError
from dwt_jax.files import is_file_or_raise, read_json_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKEN_ROLES = ("pad", "unk", "cls", "sep", "mask")
TOKEN_KEYS = tuple(f"{role}_token" for role in TOKEN_ROLES)
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_HF_TOKEN_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""In the order in which transformers adds them."""
_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")

AddedTokensById = Mapping[int, "AddedToken"]  # the added tokens of a tokenizer.json, by id
_TokenWithFlags = tuple[str, dict[str, bool]]  # a token, and how it is found in text


def register_added_tokens(
    tokenizer: "Tokenizer",
    directory: Path,
    defaults: Mapping[str, str],
    added_tokens: AddedTokensById | None = None,
) -> None:
    """Add the tokens that are found whole in text as transformers does: those that have a number in
    the order of the numbers, then special ones.

    usual: the class's special tokens by their keys. own: tokenizer.json's added tokens, by default
    those that the tokenizer has.
    """
    from tokenizers import AddedToken

    existing_tokens = tokenizer.get_added_tokens_decoder()
    existing_contents = {token.content for token in existing_tokens.values()}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    numbered_tokens = list_added_tokens(directory, existing_tokens if added_tokens is None else added_tokens)
    flags_by_token = {token: flags for _, token, flags in numbered_tokens}
    numbered_flags = flags_by_token.copy()
    for key, (token, flags) in _list_special_tokens(directory, defaults):
        if token in numbered_flags:
            flags_by_token[token] |= {"special": True}
        elif token in vocab and token not in existing_contents:  # of two keys with one token the later
            flags_by_token[token] = {"normalized": False, **flags, "special": True}
        elif token not in vocab:
            raise UserError(
                f"{directory}: {key} '{token}' is not in the vocabulary, expected one that has an id"
            )
    tokenizer.add_tokens([AddedToken(token, **flags) for token, flags in flags_by_token.items()])
    for i, token, _ in numbered_tokens:
        if token not in vocab and tokenizer.token_to_id(token) != i:
            raise UserError(
                f"{directory}: added token '{token}' has the id {i}, expected the next after the "
                f"vocabulary's ({tokenizer.token_to_id(token)})"
            )


def list_added_tokens(
    directory: Path, added_tokens: AddedTokensById
) -> list[tuple[int, str, dict[str, bool]]]:
    """(id, token, how it is found) of the tokens that are added to a vocabulary, sorted by their ids: those
    of added_tokens_decoder, else those of added_tokens.json and of tokenizer.json (`own`)."""
    config, added_json = (
        read_json_or_empty(directory / TOKENIZER_CONFIG),
        read_json_or_empty(directory / "added_tokens.json"),
    )
    decoder = config.get("added_tokens_decoder")
    try:
        if decoder is not None:
            entries = [(int(i), *_parse_token(dict(token), directory)) for i, token in decoder.items()]
        else:
            ids_by_content = {token.content: i for i, token in added_tokens.items()}
            special = _special_token_strings(config, _read_special_tokens_map(directory))
            entries = [
                (i, token.content, {key: getattr(token, key) for key in _TOKEN_FLAGS})
                for i, token in added_tokens.items()
            ]
            entries += [
                (int(i), token, {"special": token in special, "normalized": token not in special})
                for token, i in added_json.items()
                if token not in ids_by_content
            ]
        if not all(token for _, token, _ in entries):
            raise TypeError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, UserError):
        raise UserError(f"{directory}: added tokens that are not tokens by number, expected those") from None
    return sorted(entries, key=lambda entry: entry[0])


def _list_special_tokens(directory: Path, defaults: Mapping[str, str]) -> list[tuple[str, _TokenWithFlags]]:
    """(key, token) of the special tokens that the files name, or else the class (`usual`)."""
    config, table = read_json_or_empty(directory / TOKENIZER_CONFIG), _read_special_tokens_map(directory)
    settings = config | table
    tokens_by_key = {**defaults, **{key: settings[key] for key in _HF_TOKEN_KEYS if settings.get(key)}}
    pairs = [(key, tokens_by_key[key]) for key in _HF_TOKEN_KEYS if key in tokens_by_key]
    pairs += [  # of other models: transformers takes every such key for a special token's
        (key, token)
        for key, token in settings.items()
        if key.endswith("_token") and key not in _HF_TOKEN_KEYS and isinstance(token, str | dict) and token
    ]
    pairs += [
        ("special token", token) for token in (*_extra_special_tokens(config), *_extra_special_tokens(table))
    ]
    return [(key, _parse_token(token, directory)) for key, token in pairs]


def _extra_special_tokens(settings: dict[str, Any]) -> list[Any]:
    tokens: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        tokens += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return tokens


def _special_token_strings(config: dict[str, Any], table: dict[str, Any]) -> set[str]:
    """Which tokens of an added_tokens.json transformers takes for special: those that it has as strings
    by then, so not the additional ones of the map."""
    names = config | {
        k: token.get("content") if isinstance(token, dict) else token for k, token in table.items()
    }
    extra = {"extra_special_tokens": table.get("extra_special_tokens")}
    candidates = [
        *(names.get(key) for key in _HF_TOKEN_KEYS),
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
    return content, {key: value[key] for key in _TOKEN_FLAGS if isinstance(value.get(key), bool)}


def _read_special_tokens_map(directory: Path) -> dict[str, Any]:
    """special_tokens_map.json; transformers does not look at it beside an added_tokens_decoder."""
    table = read_json_or_empty(directory / _SPECIAL_TOKENS_MAP)
    return {} if "added_tokens_decoder" in read_json_or_empty(directory / TOKENIZER_CONFIG) else table


def read_special_tokens(directory: Path, defaults: tuple[str, ...]) -> tuple[str, ...]:
    """The special tokens in the order of ROLES, as the JSON files of a tokenizer name them, else `usual`."""
    settings = {
        key: (value, TOKENIZER_CONFIG)
        for key, value in read_json_or_empty(directory / TOKENIZER_CONFIG).items()
    }
    settings |= {
        key: (value, _SPECIAL_TOKENS_MAP) for key, value in _read_special_tokens_map(directory).items()
    }
    names = []
    for key, name in zip(TOKEN_KEYS, defaults, strict=True):
        entry, file = settings.get(key, (None, ""))
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token is not None and not isinstance(token, str):
            raise UserError(f"{directory / file}: {key} is {entry!r}, expected a token")
        names.append(token or name)
    return tuple(names)


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    return read_json_object(path, "JSON, an object") if is_file_or_raise(path) else {}
