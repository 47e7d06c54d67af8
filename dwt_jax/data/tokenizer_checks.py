"""Checks of tokenizer files that the library `tokenizers` does not make, as UserErrors of one line.

The library panics on such files, and a panic prints to stderr before Python can catch it. Whatever can be
checked beforehand is checked here.
"""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError


@contextmanager
def wrap_tokenizer_errors(source: object, expected: str, hidden: str = "") -> Iterator[None]:
    """Convert any exception of the libraries to a UserError.

    `tokenizers` raises bare Exceptions, and panics, which do not derive from Exception.

    Args:
        source: the file or config key that the message names first.
        expected: the expectation, for the message.
        hidden: a path in messages of the libraries that is replaced by `source`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a signal, for example
        text = str(error).replace(hidden, str(source)) if hidden else str(error)
        message = " ".join((text or type(error).__name__).split())[:300]
        raise UserError(f"{source}: {message}, expected {expected}") from None


def check_charsmaps(normalizer: Any, path: Path) -> None:
    """Check the sizes of a normalizer's SentencePiece tables: the library reads beyond damaged ones.

    A table is the size of a trie, the trie, and UTF-8 text. A trie is built in blocks of 256 numbers of
    4 bytes, so any step from a block stays within whole blocks.

    Args:
        normalizer: the `normalizer` of a tokenizer.json.
        path: the file, for messages.

    Raises:
        UserError: for a table with an impossible size.
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
            raise UserError(f"{path}: precompiled_charsmap is damaged, expected a SentencePiece table")


def check_token_ids(vocab: Mapping[str, int], path: Path) -> None:
    """Check that each id has one token and that the ids have no large gaps.

    Args:
        vocab: token → id.
        path: the file, for messages.

    Raises:
        UserError: if the check fails, or if there is no token.
    """
    if not vocab:
        raise UserError(f"{path}: no tokens, expected at least one")
    check_id_gaps(vocab, path)
    if len(set(vocab.values())) < len(vocab):
        i, count = Counter(vocab.values()).most_common(1)[0]
        tokens = " and ".join(sorted(repr(token) for token in vocab if vocab[token] == i)[:3])
        raise UserError(f"{path}: {count} tokens have the id {i} ({tokens}), expected one for each id")


def check_id_gaps(vocab: Mapping[str, int], path: Path) -> None:
    """Check that ids have no large gaps: the library iterates over them id by id.

    Args:
        vocab: token → id.
        path: the file, for messages.

    Raises:
        UserError: if the check fails.
    """
    last = max(vocab, key=lambda token: vocab[token])
    if vocab[last] > 2 * len(vocab) + 1000:
        raise UserError(
            f"{path}: '{last}' has the id {vocab[last]} among {len(vocab)} tokens, expected ids without "
            "large gaps"
        )


def check_byte_level(vocab: Mapping[str, int], path: Path) -> None:
    """Check that a BPE vocabulary is byte-level, without markers at the ends of words.

    Args:
        vocab: token → id.
        path: the file, for messages.

    Raises:
        UserError: if the check fails.
    """
    from tokenizers import pre_tokenizers

    num_missing = sum(letter not in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
    if num_missing or any(len(token) > 4 and token.endswith("</w>") for token in vocab):
        problem = f"lacks {num_missing} of the 256 bytes" if num_missing else "marks ends of words by </w>"
        raise UserError(f"{path}: {problem}, expected byte-level BPE (or a tokenizer.json, with any model)")


def check_tokenizer_parts(settings: dict[str, Any], path: Path) -> None:
    """Check that the parts of a tokenizer.json name no tokens that other parts lack.

    Args:
        settings: the content of a tokenizer.json that the library reads.
        path: the file, for messages.

    Raises:
        UserError: for a missing unknown token, or a post-processor with undeclared special tokens.
    """
    model = settings["model"]
    unk = model.get("unk_token")
    if model.get("type") in ("WordPiece", "WordLevel") and unk not in model["vocab"]:
        raise UserError(
            f"{path}: no {unk} in the model's vocabulary, expected its unk_token, the one for unknown words"
        )
    post_processor = settings.get("post_processor") or {}
    for part in post_processor.get("processors") or [post_processor]:
        token_ids = [piece.get("SpecialToken", {}).get("id") for piece in _template_pieces(part)]
        missing = [token for token in token_ids if token is not None and token not in part["special_tokens"]]
        if missing:
            raise UserError(
                f"{path}: its post_processor puts '{missing[0]}' around a text, expected it among its "
                "special_tokens"
            )


def _template_pieces(processor: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(processor.get("single") or []), *(processor.get("pair") or [])]
