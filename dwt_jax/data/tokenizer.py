"""Read and write the tokenizers of directories; load a vocabulary and its digest.

A tokenizer is a directory in the Hugging Face layout, which `transformers.AutoTokenizer` loads.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.data.added_tokens import (
    TOKEN_KEYS,
    TOKEN_ROLES,
    TOKENIZER_CONFIG,
    print_moved_tokens,
    read_json_or_empty,
    read_special_tokens,
)
from dwt_jax.data.hf_tokenizer import (
    GENERIC_TOKENIZER,
    declared_tokenizer_class,
    load_hf_tokenizer,
)
from dwt_jax.data.tokenizer_checks import check_token_ids
from dwt_jax.errors import UserError
from dwt_jax.files import user_path
from dwt_jax.model_files import is_model_file
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.models.tokenizer_pipelines import BYTE_LEVEL_BPE, WORDPIECE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VOCAB_FILES = ("vocab.txt", "vocab.json", "merges.txt")
_TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *_VOCAB_FILES,
)
_MODEL_KEYS = ("model_max_length", "max_len", "model_input_names")
"""Keys of tokenizer_config.json that describe the model beside it."""

MAX_UNKNOWN_SHARE = 0.5
"""Largest share of unknown tokens in a text: with more, the tokenizer is not one for it."""


@dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer that packing, masking and models need."""

    tokens: tuple[str, ...]  # by id
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]  # sorted; the five above and all others that the tokenizer marks as special
    continuation: np.ndarray = field(compare=False)  # bool [vocab]: the token continues a word
    word_prefix: str = ""  # first character of tokens that begin a word: 'Ġ' (byte-level), '▁', or none
    # Of tokenizer.json: normalizer, pre_tokenizer, and a digest of the merges.
    pipeline: Mapping[str, Any] = field(default_factory=dict, compare=False)
    marks_words: bool = True  # whether `continuation` is known; if not, it is False throughout

    def __len__(self) -> int:
        return len(self.tokens)


# Training


def save_tokenizer(tokenizer: "Tokenizer", out: Path, lowercase: bool) -> None:
    """Write a trained WordPiece tokenizer to a new directory `out`, which AutoTokenizer loads."""
    out.mkdir(parents=True)
    special_tokens = dict(zip(TOKEN_KEYS, WORDPIECE.special_tokens, strict=True))
    flags = {**WORDPIECE.flags, "do_lower_case": lowercase}
    config = {"tokenizer_class": WORDPIECE.tokenizer_class, **flags, **special_tokens}
    _write_tokenizer_files(tokenizer, out, config)
    (out / "special_tokens_map.json").write_text(
        json.dumps(special_tokens, indent=2) + "\n", encoding="utf-8"
    )
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


def copy_tokenizer(path: str | Path, out: Path, lowercase: bool = True) -> None:
    """Copy a tokenizer to a new directory, from which AutoTokenizer gives the same ids.

    It does so beside a model of any family, since the copy's class is the one that loads tokenizer.json
    unchanged.

    Args:
        path: as for `load_hf_tokenizer`.
        out: the new directory.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_hf_tokenizer` does.
    """
    path = user_path(path)
    tokenizer, config = _load_complete_tokenizer(path, lowercase)
    out.mkdir(parents=True)
    if path.is_dir():
        copy_tokenizer_files(path, out, _VOCAB_FILES)
    _write_tokenizer_files(tokenizer, out, config)


def _load_complete_tokenizer(path: Path, lowercase: bool = True) -> tuple["Tokenizer", dict[str, Any]]:
    """A tokenizer, and the tokenizer_config.json that belongs to its complete tokenizer.json."""
    tokenizer = load_hf_tokenizer(path, lowercase)
    directory = path if path.is_dir() else path.parent
    tokens = _tokens_by_id(tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    role_ids = _special_token_ids(path, ids)
    print_moved_tokens(directory, ids)
    config = read_json_or_empty(directory / TOKENIZER_CONFIG)
    # Custom code is not copied, tokenizer.json holds the added tokens and flags, and no model is beside it.
    for key in ("auto_map", "added_tokens_decoder", *WORDPIECE.flags, *BYTE_LEVEL_BPE.flags, *_MODEL_KEYS):
        config.pop(key, None)
    config["tokenizer_class"] = GENERIC_TOKENIZER
    # Tokens named in the config are matched in text before the pipeline runs: only added tokens may be.
    added_contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    role_tokens = {f"{role}_token": tokens[i] for role, i in role_ids.items() if tokens[i] in added_contents}
    return tokenizer, config | role_tokens


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a vocabulary.

    Raises:
        UserError: for a tokenizer file that is a broken link.
    """
    present_files = [name for name in _TOKENIZER_FILES if is_model_file(directory / name)]
    return any(name in present_files for name in ("tokenizer.json", "vocab.txt", "vocab.json"))


def copy_tokenizer_files(directory: Path, out: Path, names: Sequence[str] = _TOKENIZER_FILES) -> None:
    """Copy the tokenizer files of a directory, and no others, without what needs code of its own."""
    for name in names:
        if is_model_file(directory / name):
            shutil.copyfile(directory / name, out / name)
    try:
        config = read_json_or_empty(out / TOKENIZER_CONFIG)
    except UserError:  # a damaged file, which has no auto_map either
        return
    if "auto_map" in config:
        _write_tokenizer_config(out, _without_custom_code(config, out))


def _without_custom_code(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A tokenizer_config.json without `auto_map` and the class that it names.

    Their code is not copied, and transformers would not load the tokenizer of `directory` without it.
    """
    config = dict(config)
    own_classes = re.findall(r"\w+", json.dumps(config.pop("auto_map", "")))
    if config.get("tokenizer_class") in own_classes and (directory / "tokenizer.json").exists():
        config["tokenizer_class"] = GENERIC_TOKENIZER
    return config


def copy_model_tokenizer(directory: Path, out: Path, model: ModelConfig) -> None:
    """Copy the tokenizer files of a directory, and describe the model in tokenizer_config.json.

    transformers truncates at `model_max_length` and gives the model `model_input_names`: both are those of
    `model`, whatever they are in `directory`. What it would otherwise find out from other files of
    `directory` is written too: the class, and a tokenizer.json, without which some families load none.

    Args:
        directory: of the tokenizer. If it has none, nothing is added.
        out: an existing directory.
        model: the model that is written to `out`.
    """
    if not has_tokenizer(directory):
        copy_tokenizer_files(directory, out)
        return
    config = read_json_or_empty(directory / TOKENIZER_CONFIG)
    if class_name := declared_tokenizer_class(directory):
        config["tokenizer_class"] = class_name
    names = _TOKENIZER_FILES
    if not is_model_file(directory / "tokenizer.json"):
        try:
            tokenizer, config = _load_complete_tokenizer(directory)
            tokenizer.save(str(out / "tokenizer.json"))
            names = _VOCAB_FILES
        except UserError:  # of a class that is not supported: its files are copied unread
            pass
    copy_tokenizer_files(directory, out, names)
    config = _without_custom_code(config, out)
    config.pop("max_len", None)  # an older name of model_max_length
    config["model_max_length"] = model.max_length
    token_types = ["token_type_ids"] if model.has_token_types else []
    config["model_input_names"] = ["input_ids", *token_types, "attention_mask"]
    _write_tokenizer_config(out, config)


# The vocabulary


def load_vocabulary(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """Load the vocabulary of a tokenizer.

    Special tokens are those that tokenizer_config.json and special_tokens_map.json name, else the defaults
    of the pipeline that has most of its defaults in the vocabulary.

    Args:
        path: as for `load_hf_tokenizer`.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_hf_tokenizer` does, and for a special token that is not in the vocabulary.
    """
    path = user_path(path)
    tokenizer = load_hf_tokenizer(path, lowercase)
    tokens = _tokens_by_id(tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    role_ids = _special_token_ids(path, ids)
    print_moved_tokens(path if path.is_dir() else path.parent, ids)
    special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special_ids |= set(role_ids.values())
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
    merges = json.dumps(settings["model"].get("merges"))
    return {
        "normalizer": settings["normalizer"],
        "pre_tokenizer": settings["pre_tokenizer"],
        "merges": hashlib.sha256(merges.encode()).hexdigest()[:16],
    }


def tokenizer_digest(path: str | Path, lowercase: bool = True) -> str:
    """Return the hex SHA-256 of what maps text to ids: tokens, normalizer, pre-tokenizer and merges.

    A vocab.txt and a tokenizer.json that give the same ids have the same digest.

    Args:
        path: as for `load_hf_tokenizer`.
        lowercase: as for `load_hf_tokenizer`.

    Raises:
        UserError: as `load_hf_tokenizer` does.
    """
    tokenizer = load_hf_tokenizer(path, lowercase)
    settings = json.loads(tokenizer.to_str())
    content = [
        _tokens_by_id(tokenizer, Path(path)),
        settings["normalizer"],
        settings["pre_tokenizer"],
        settings["model"].get("merges"),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokens_by_id(tokenizer: "Tokenizer", path: Path) -> tuple[str, ...]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    check_token_ids(vocab, path)
    by_id = {i: token for token, i in vocab.items()}
    return tuple(by_id.get(i, f"[missing {i}]") for i in range(max(by_id) + 1))


def _special_token_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    """The id of the special token of each role. ids: token → id."""
    defaults = max(
        (WORDPIECE.special_tokens, BYTE_LEVEL_BPE.special_tokens),
        key=lambda tokens: sum(token in ids for token in tokens),
    )
    special_tokens = read_special_tokens(path if path.is_dir() else path.parent, defaults)
    role_ids = {}
    for role, token in zip(TOKEN_ROLES, special_tokens, strict=True):
        if token not in ids:
            raise UserError(
                f"{path}: {role}_token '{token}' is not in the vocabulary, expected the token for that role"
            )
        role_ids[role] = ids[token]
    return role_ids


def _word_marks(tokenizer: "Tokenizer", tokens: tuple[str, ...]) -> tuple[np.ndarray, str, bool]:
    """(bool [vocab]: the token continues a word; the prefix of the others; whether words are marked at all)

    Ends of words (`</w>`) are not read: whether a token continues a word would depend on the one before it.
    """
    settings = json.loads(tokenizer.to_str())
    if continuation_prefix := settings["model"].get("continuing_subword_prefix"):
        return np.array([token.startswith(continuation_prefix) for token in tokens]), "", True
    pipeline = json.dumps([settings["normalizer"], settings["pre_tokenizer"]])
    word_prefix = "Ġ" if '"ByteLevel"' in pipeline else "▁" if '"Metaspace"' in pipeline else ""
    if not word_prefix:  # a token of WordLevel is a word
        return np.zeros(len(tokens), bool), "", settings["model"]["type"] == "WordLevel"
    return np.array([not token.startswith(word_prefix) for token in tokens]), word_prefix, True
