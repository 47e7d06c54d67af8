"""Read and write the tokenizers of directories; load a vocabulary and its digest.

A tokenizer is a directory in the Hugging Face layout, which `transformers.AutoTokenizer` loads.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.data.auto_tokenizer import FILE_KEYS, UnsupportedTokenizerError, model_tokenizer_class
from dwt_jax.data.hf_tokenizer import (
    GENERIC_TOKENIZER,
    LoadedTokenizer,
    load_hf_tokenizer,
    read_tokenizer,
)
from dwt_jax.data.special_tokens import is_framed_by_end_token, special_token_ids
from dwt_jax.data.tokenizer_checks import check_token_ids
from dwt_jax.data.tokenizer_files import (
    SETTINGS_FILES,
    TOKENIZER_CONFIG,
    VOCABULARY_FILES,
    added_token_ids,
    has_tokenizer,
    read_json_or_empty,
)
from dwt_jax.files import user_path
from dwt_jax.logs import logger
from dwt_jax.model_files import is_model_file
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.models.tokenizer_defaults import TOKEN_KEYS, TOKEN_ROLES, WORDPIECE_TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_READABLE_FILES = ("vocab.txt", "vocab.json", "merges.txt")
"""Files that are copied beside a complete tokenizer.json, for other programs."""

_PIPELINE_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space")
_MODEL_KEYS = ("model_max_length", "max_len", "model_input_names", "padding_side")
"""Keys of tokenizer_config.json that describe the model beside it. Padding is on the right in training,
as in transformers where no key says otherwise."""

MAX_UNKNOWN_SHARE = 0.5
"""Largest share of unknown tokens in a text: with more, the tokenizer is not one for it."""


@dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer that packing, masking and models need."""

    tokens: tuple[str, ...]  # by id
    pad_id: int
    unk_id: int  # -1: none, as in byte-level tokenizers of decoders
    cls_id: int  # what a text begins with
    sep_id: int  # what it ends with
    mask_id: int  # -1: none, the tokenizer of a decoder
    special_ids: tuple[int, ...]  # sorted; those above and all others that the tokenizer marks as special
    continuation: np.ndarray = field(compare=False)  # bool [vocab]: the token continues a word
    word_prefix: str = ""  # first character of tokens that begin a word: 'Ġ' (byte-level), '▁', … or none
    # Of tokenizer.json: what maps text to ids besides the tokens.
    pipeline: Mapping[str, Any] = field(default_factory=dict, compare=False)
    marks_words: bool = True  # whether `continuation` is known; if not, it is False throughout

    def __len__(self) -> int:
        return len(self.tokens)


# Files


def save_tokenizer(tokenizer: "Tokenizer", out: Path, lowercase: bool) -> None:
    """Write a trained WordPiece tokenizer to a new directory `out`, which AutoTokenizer loads.

    Its class is the one that loads tokenizer.json unchanged.
    `do_lower_case` is for programs that read vocab.txt.
    """
    out.mkdir(parents=True)
    special_tokens = dict(zip(TOKEN_KEYS, WORDPIECE_TOKENS, strict=True))
    config = {"tokenizer_class": GENERIC_TOKENIZER, "do_lower_case": lowercase, **special_tokens}
    _write_tokenizer_files(tokenizer, out, config)
    vocab_text = "".join(f"{token}\n" for token in _tokens_by_id(tokenizer, out))
    (out / "vocab.txt").write_text(vocab_text, encoding="utf-8")


def _write_tokenizer_files(tokenizer: "Tokenizer", out: Path, config: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(out / "tokenizer.json"))
    _write_tokenizer_config(out, config)


def _write_tokenizer_config(out: Path, config: dict[str, Any]) -> None:
    (out / TOKENIZER_CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def copy_tokenizer(tokenizer: str | Path | LoadedTokenizer, out: Path, lowercase: bool = True) -> None:
    """Copy a tokenizer to a directory, from which AutoTokenizer gives the same ids.

    It does so beside a model of any family, since the copy's class is the one that loads tokenizer.json
    unchanged.

    Args:
        tokenizer: as for `load_hf_tokenizer`, or one that was loaded.
        out: the directory, new or empty.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_vocabulary` does.
    """
    if not isinstance(tokenizer, LoadedTokenizer):
        tokenizer = read_tokenizer(tokenizer, lowercase)
    _write_complete_tokenizer(tokenizer, out, {})


def _write_complete_tokenizer(loaded: LoadedTokenizer, out: Path, model_settings: dict[str, Any]) -> None:
    """Write a tokenizer's complete tokenizer.json and its tokenizer_config.json."""
    path = loaded.source.path
    tokens = _tokens_by_id(loaded.tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    role_ids = special_token_ids(path, loaded, ids)
    _print_moved_tokens(loaded, ids)
    # Custom code is not copied, and tokenizer.json holds the added tokens and the pipeline.
    omitted = {*FILE_KEYS, "added_tokens_decoder", *_PIPELINE_KEYS, *_MODEL_KEYS}
    config = {key: value for key, value in loaded.source.config.items() if key not in omitted}
    config["tokenizer_class"] = GENERIC_TOKENIZER
    # Tokens named in the config are matched in text before the pipeline runs: only added tokens may be.
    added_contents = {token.content for token in loaded.tokenizer.get_added_tokens_decoder().values()}
    named = loaded.special_tokens
    if not is_framed_by_end_token(named, ids):
        named |= {f"{role}_token": tokens[i] for role, i in role_ids.items()}
    config |= {key: token for key, token in named.items() if token in added_contents}
    out.mkdir(parents=True, exist_ok=True)
    for name in _READABLE_FILES:
        if path.is_dir() and name in loaded.source.files:
            shutil.copyfile(loaded.source.files[name], out / name)
    _write_tokenizer_files(loaded.tokenizer, out, config | model_settings)


def copy_model_tokenizer(directory: Path, out: Path, model: ModelConfig) -> None:
    """Copy the tokenizer of a directory, as `copy_tokenizer` does, and describe the model beside it.

    transformers truncates at `model_max_length` and gives the model `model_input_names`: both are set from
    `model`, not from `directory`. If a tokenizer needs Python code or a missing package, its files are copied
    unchanged.

    Args:
        directory: of the tokenizer. If it has none, nothing is added.
        out: an existing directory.
        model: the model that is written to `out`.

    Raises:
        UserError: for a damaged tokenizer, and one without a special token for each role.
    """
    if not has_tokenizer(directory):
        return
    token_types = ["token_type_ids"] if model.has_token_types else []
    model_settings = {
        "model_max_length": model.max_length,
        "model_input_names": ["input_ids", *token_types, "attention_mask"],
    }
    try:
        _write_complete_tokenizer(read_tokenizer(directory), out, model_settings)
    except UnsupportedTokenizerError:
        _copy_unread(directory, out, model_settings)


def _copy_unread(directory: Path, out: Path, model_settings: dict[str, Any]) -> None:
    """Copy the tokenizer files of a directory, without what names code that is not copied."""
    for name in (*SETTINGS_FILES, *VOCABULARY_FILES):
        if name != "config.json" and is_model_file(directory / name):
            shutil.copyfile(directory / name, out / name)
    config, model_config = map(read_json_or_empty, (out / TOKENIZER_CONFIG, directory / "config.json"))
    own_classes = re.findall(r"\w+", json.dumps(config.pop("auto_map", "")))
    class_name = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    class_name = class_name or model_tokenizer_class(str(model_config.get("model_type")))
    if class_name in own_classes and "tokenizer.json" in os.listdir(out):
        class_name = GENERIC_TOKENIZER
    for key in _MODEL_KEYS:
        config.pop(key, None)
    classes = {"tokenizer_class": class_name} if class_name else {}
    _write_tokenizer_config(out, config | classes | model_settings)


def _print_moved_tokens(loaded: LoadedTokenizer, ids: Mapping[str, int]) -> None:
    """Print a line if added tokens have other ids than the files declare, as in transformers."""
    declared = added_token_ids(loaded.source)
    moved = sorted((i, token) for token, i in declared.items() if ids.get(token, i) != i)
    for i, token in moved[:1]:
        logger.warning(
            f"{loaded.source.path}: {len(moved)} of its added tokens have other ids than its files declare, "
            f"as in transformers: {token!r} has {ids[token]}, not {i}"
        )


# The vocabulary


def load_vocabulary(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """Load the vocabulary of a tokenizer.

    Special tokens are those of transformers, else WORDPIECE_TOKENS or BYTE_LEVEL_TOKENS, whichever has
    most of its own in the vocabulary. With an `eos_token` and without a mask, or without tokens like [CLS]
    and [SEP], a text begins with the `bos_token`, or else the `eos_token`, and ends with the `eos_token`.

    Args:
        path: as for `load_hf_tokenizer`.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_hf_tokenizer` does, and for a special token that is not in the vocabulary.
    """
    path = user_path(path)
    loaded = read_tokenizer(path, lowercase)
    tokenizer, tokens = loaded.tokenizer, _tokens_by_id(loaded.tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    role_ids = special_token_ids(path, loaded, ids)
    _print_moved_tokens(loaded, ids)
    special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special_ids |= {i for i in role_ids.values() if i >= 0}
    continuation, word_prefix, marks_words = _word_marks(tokenizer, tokens)
    continuation[sorted(special_ids)] = False
    continuation.flags.writeable = False
    return Vocabulary(
        tokens=tokens,
        **{f"{role}_id": role_ids[role] for role in TOKEN_ROLES},
        special_ids=tuple(sorted(special_ids)),
        continuation=continuation,
        word_prefix=word_prefix,
        pipeline=_pipeline_settings(tokenizer),
        marks_words=marks_words,
    )


def _pipeline_settings(tokenizer: "Tokenizer") -> dict[str, Any]:
    settings = json.loads(tokenizer.to_str())
    return {
        "normalizer": settings["normalizer"],
        "pre_tokenizer": settings["pre_tokenizer"],
        "merges": _short_digest(settings["model"].get("merges")),
        **_encoding_settings(settings),
    }


def _encoding_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What else maps text to ids, where it is not the default: most tokenizers have nothing here.

    Special tokens are left out, which are not looked for in a text.

    Args:
        settings: the content of a tokenizer.json.
    """
    model = settings["model"]
    kind = model["type"]
    defaults = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "type": "WordPiece"}
    if kind in ("BPE", "Unigram"):  # told apart by merges and scores
        defaults = {"type": kind}
    omitted = ("vocab", "merges", "unk_token", "unk_id")
    changed = {
        key: value
        for key, value in model.items()
        if key not in omitted and value not in (None, False, "", defaults.get(key))
    }
    result: dict[str, Any] = {"model": changed} if changed else {}
    if kind == "Unigram":  # rounded, since not every version reads what it wrote to the last bit
        result["scores"] = _short_digest([f"{score:.6g}" for _, score in model["vocab"]])
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = {
        token["content"]: " ".join(flag for flag in flags if token[flag]) or "no flags"
        for token in settings["added_tokens"]
        if not token["special"]
    }
    return result | ({"added_tokens": added} if added else {})


def _short_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def tokenizer_digest(path: str | Path, lowercase: bool = True) -> str:
    """Return the hex SHA-256 of everything that maps text to ids: tokens, pipeline, merges or scores.

    A vocab.txt and a tokenizer.json that give the same ids have the same digest.

    Args:
        path: as for `load_hf_tokenizer`.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_hf_tokenizer` does.
    """
    tokenizer = load_hf_tokenizer(path, lowercase)
    settings = json.loads(tokenizer.to_str())
    content: list[Any] = [
        _tokens_by_id(tokenizer, Path(path)),
        settings["normalizer"],
        settings["pre_tokenizer"],
        settings["model"].get("merges"),
    ]
    if others := _encoding_settings(settings):  # left out where empty, so that rows keep their digest
        content.append(others)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokens_by_id(tokenizer: "Tokenizer", path: Path) -> tuple[str, ...]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    check_token_ids(vocab, path)
    by_id = {i: token for token, i in vocab.items()}
    return tuple(by_id.get(i, f"[missing {i}]") for i in range(max(by_id) + 1))


def _word_marks(tokenizer: "Tokenizer", tokens: tuple[str, ...]) -> tuple[np.ndarray, str, bool]:
    """(bool [vocab]: the token continues a word; the prefix of the others; whether words are marked at all)

    Ends of words (`</w>`) are not read: whether a token continues a word would depend on the one before it.
    """
    settings = json.loads(tokenizer.to_str())
    if continuation_prefix := settings["model"].get("continuing_subword_prefix"):
        return np.array([token.startswith(continuation_prefix) for token in tokens]), "", True
    word_prefix = _word_prefix(tokenizer, tokens)
    if not word_prefix:  # a token of WordLevel is a word, unless letters are divided
        is_word = settings["model"]["type"] == "WordLevel" and len(_pre_tokenize("ab", tokenizer)) == 1
        return np.zeros(len(tokens), bool), "", is_word
    return np.array([not token.startswith(word_prefix) for token in tokens]), word_prefix, True


def _word_prefix(tokenizer: "Tokenizer", tokens: tuple[str, ...]) -> str:
    """The character that stands for the space before a word and begins the word's first token; '' for none.

    It is asked of the tokenizer itself: the space may be replaced by the normalizer or the pre-tokenizer,
    by any character, or be dropped before either sees it.
    """
    pieces = _pre_tokenize("a b", tokenizer)
    match = re.search("a(.)b", "".join(pieces))
    if match is None:
        return ""
    prefix = match[1]
    if len(pieces) > 1:
        return prefix if pieces[-1].startswith(prefix) else ""
    # Not divided: whether tokens begin or end with the character is up to the vocabulary.
    begin = sum(token.startswith(prefix) for token in tokens)
    end = sum(token.endswith(prefix) and token.strip(prefix) != "" for token in tokens)
    return prefix if begin > 100 * end else ""


def _pre_tokenize(text: str, tokenizer: "Tokenizer") -> list[str]:
    """Divide a text as before the model: normalized, into pieces that no token reaches across."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
