"""Special and added tokens, as the JSON files beside a vocabulary name them.

The same tokens in the same order, with the same flags, as transformers 5 adds them
(PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.errors import UserError
from dwt_jax.files import present, read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

ROLES = ("pad", "unk", "cls", "sep", "mask")
KEYS = tuple(f"{role}_token" for role in ROLES)
CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""In the order in which transformers adds them."""
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")

Own = Mapping[int, "AddedToken"]  # the added tokens of a tokenizer.json, by id
_Token = tuple[str, dict[str, bool]]  # a token, and how it is found in text


def add(tokenizer: "Tokenizer", directory: Path, usual: Mapping[str, str], own: Own | None = None) -> None:
    """Add the tokens that are found whole in text as transformers does: those that have a number in
    the order of the numbers, then special ones.

    usual: the class's special tokens by their keys. own: tokenizer.json's added tokens, by default
    those that the tokenizer has.
    """
    from tokenizers import AddedToken

    there = tokenizer.get_added_tokens_decoder()
    whole = {token.content for token in there.values()}
    known = tokenizer.get_vocab(with_added_tokens=True)
    with_numbers = numbered(directory, there if own is None else own)
    found = {token: flags for _, token, flags in with_numbers}
    numbers = found.copy()
    for key, (token, flags) in _specials(directory, usual):
        if token in numbers:
            found[token] |= {"special": True}
        elif token in known and token not in whole:  # of two keys with one token the later
            found[token] = {"normalized": False, **flags, "special": True}
        elif token not in known:
            raise UserError(
                f"{directory}: {key} '{token}' is not in the vocabulary, expected one that has an id"
            )
    tokenizer.add_tokens([AddedToken(token, **flags) for token, flags in found.items()])
    for i, token, _ in with_numbers:
        if token not in known and tokenizer.token_to_id(token) != i:
            raise UserError(
                f"{directory}: added token '{token}' has the id {i}, expected the next after the "
                f"vocabulary's ({tokenizer.token_to_id(token)})"
            )


def numbered(directory: Path, own: Own) -> list[tuple[int, str, dict[str, bool]]]:
    """(id, token, how it is found) of the tokens that are added to a vocabulary, sorted by their ids: those
    of added_tokens_decoder, else those of added_tokens.json and of tokenizer.json (`own`)."""
    config, listed = read_json(directory / CONFIG), read_json(directory / "added_tokens.json")
    decoder = config.get("added_tokens_decoder")
    try:
        if decoder is not None:
            found = [(int(i), *_token(dict(token), directory)) for i, token in decoder.items()]
        else:
            inherent = {token.content: i for i, token in own.items()}
            special = _called_special(config, _map(directory))
            found = [
                (i, token.content, {key: getattr(token, key) for key in _FLAGS}) for i, token in own.items()
            ]
            found += [
                (int(i), token, {"special": token in special, "normalized": token not in special})
                for token, i in listed.items()
                if token not in inherent
            ]
        if not all(token for _, token, _ in found):
            raise TypeError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, UserError):
        raise UserError(f"{directory}: added tokens that are not tokens by number, expected those") from None
    return sorted(found, key=lambda entry: entry[0])


def _specials(directory: Path, usual: Mapping[str, str]) -> list[tuple[str, _Token]]:
    """(key, token) of the special tokens that the files name, or else the class (`usual`)."""
    config, table = read_json(directory / CONFIG), _map(directory)
    said = config | table
    named = {**usual, **{key: said[key] for key in _NAMED if said.get(key)}}
    found = [(key, named[key]) for key in _NAMED if key in named]
    found += [  # of other models: transformers takes every such key for a special token's
        (key, token)
        for key, token in said.items()
        if key.endswith("_token") and key not in _NAMED and isinstance(token, str | dict) and token
    ]
    found += [("special token", token) for token in (*_extras(config), *_extras(table))]
    return [(key, _token(token, directory)) for key, token in found]


def _extras(said: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = said.get(key) or []
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else [more]
    return found


def _called_special(config: dict[str, Any], table: dict[str, Any]) -> set[str]:
    """Which tokens of an added_tokens.json transformers takes for special: those that it has as strings
    by then, so not the additional ones of the map."""
    names = config | {
        k: token.get("content") if isinstance(token, dict) else token for k, token in table.items()
    }
    more = {"extra_special_tokens": table.get("extra_special_tokens")}
    found = [*(names.get(key) for key in _NAMED), *_extras(config), *_extras(more)]
    return {token for token in found if isinstance(token, str)}


def _token(said: Any, where: Path) -> _Token:
    if isinstance(said, str):
        return said, {"special": True}
    content = said.get("content") if isinstance(said, dict) else said
    if not isinstance(content, str):
        raise UserError(f"{where}: special token {content!r}, expected a token")
    return content, {key: said[key] for key in _FLAGS if isinstance(said.get(key), bool)}


def _map(directory: Path) -> dict[str, Any]:
    """special_tokens_map.json; transformers does not look at it beside an added_tokens_decoder."""
    table = read_json(directory / _MAP)
    return {} if "added_tokens_decoder" in read_json(directory / CONFIG) else table


def role_names(directory: Path, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The special tokens in the order of ROLES, as the JSON files of a tokenizer name them, else `usual`."""
    said = {key: (value, CONFIG) for key, value in read_json(directory / CONFIG).items()}
    said |= {key: (value, _MAP) for key, value in _map(directory).items()}
    names = []
    for key, name in zip(KEYS, usual, strict=True):
        named, file = said.get(key, (None, ""))
        token = named.get("content") if isinstance(named, dict) else named
        if token is not None and not isinstance(token, str):
            raise UserError(f"{directory / file}: {key} is {named!r}, expected a token")
        names.append(token or name)
    return tuple(names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    return read_object(path, "JSON, an object") if present(path) else {}
