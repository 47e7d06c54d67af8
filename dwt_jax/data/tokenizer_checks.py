"""What the library 'tokenizers' leaves unchecked until it panics, refused in one line.

Its panics print lines of their own on stderr before Python sees them: what can be checked before
is checked here.
"""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError


@contextmanager
def wrap_tokenizer_errors(source: object, expected: str) -> Iterator[None]:
    """Whatever the library raises, as a UserError: bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: {message}, expected {expected}") from None


def check_charsmaps(normalizer: Any, path: Path) -> None:
    """Raises UserError for a table of SentencePiece's that the library would read out of its bounds.

    The table is the size of a trie, the trie and UTF-8 text; a trie is built in blocks of 256
    numbers of 4 bytes, so that a step within it stays within it.
    """
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        normalizer = normalizer.get("normalizers")
    if isinstance(normalizer, list):
        for part in normalizer:
            check_charsmaps(part, path)
    elif isinstance(normalizer, dict) and "precompiled_charsmap" in normalizer:
        try:
            table = base64.b64decode(normalizer["precompiled_charsmap"] or "", validate=True)
            size = int.from_bytes(table[:4], "little")
            table[4 + size :].decode()
            is_valid = 0 < size <= len(table) - 4 and size % 1024 == 0
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise UserError(f"{path}: precompiled_charsmap is damaged, expected a table of SentencePiece's")


def check_token_ids(vocab: Mapping[str, int], path: Path) -> None:
    """Raises UserError for a vocabulary that is no list of tokens: an id for two of them, or large gaps
    (which the library would walk through one by one)."""
    by_id = {i: token for token, i in vocab.items()}
    if not by_id:
        raise UserError(f"{path}: no tokens, expected some")
    if max(by_id) > 2 * len(by_id) + 1000:
        raise UserError(
            f"{path}: '{by_id[max(by_id)]}' has the id {max(by_id)} among {len(by_id)} tokens, expected ids "
            "without large gaps"
        )
    if len(by_id) < len(vocab):
        i, count = Counter(vocab.values()).most_common(1)[0]
        names = " and ".join(sorted(repr(token) for token in vocab if vocab[token] == i)[:3])
        raise UserError(f"{path}: {count} tokens have the id {i} ({names}), expected one for each id")


def check_tokenizer_parts(settings: dict[str, Any], path: Path) -> None:
    """Raises UserError where parts of a tokenizer.json name tokens that others lack. settings: the file
    as the library writes it."""
    model = settings["model"]
    unk = model.get("unk_token")
    if model["type"] in ("WordPiece", "WordLevel") and unk not in model["vocab"]:
        raise UserError(
            f"{path}: no {unk} in the model's vocabulary, expected its unk_token, the one for unknown words"
        )
    processor = settings["post_processor"] or {}
    for part in processor.get("processors") or [processor]:
        token_ids = [piece.get("SpecialToken", {}).get("id") for piece in _template_pieces(part)]
        if missing := [name for name in token_ids if name is not None and name not in part["special_tokens"]]:
            raise UserError(
                f"{path}: its post_processor puts '{missing[0]}' around a text, expected that among its "
                "special_tokens"
            )


def _template_pieces(processor: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(processor.get("single") or []), *(processor.get("pair") or [])]
