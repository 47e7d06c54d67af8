"""The files of a tokenizer directory and their settings.

Directories are untrusted: a file is used only after `is_model_file` has checked it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dwt_jax.errors import UserError
from dwt_jax.files import LFS_POINTER_PREFIX, reject_lfs_pointer
from dwt_jax.model_files import describe_hub_cache, is_model_file, read_model_json

TOKENIZER_CONFIG = "tokenizer_config.json"
SETTINGS_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)
SENTENCEPIECE_SUFFIX = ".model"
_TOKEN_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class TokenizerFiles(NamedTuple):
    """The files of a tokenizer."""

    path: Path  # as the user named it
    files: Mapping[str, Path]  # those that exist, by the names under which transformers looks for them
    settings: Mapping[str, dict[str, Any]]  # of SETTINGS_FILES; empty for a file that does not exist
    tokenizer_json: dict[str, Any]  # empty without one
    vocab_json: dict[str, Any]  # empty without one, and beside a tokenizer.json, which has its own

    @property
    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        return self.settings[TOKENIZER_CONFIG]

    @property
    def vocabulary_path(self) -> Path:
        """The file that holds the vocabulary, for messages."""
        return next(self.files[name] for name in VOCABULARY_FILES if name in self.files)

    @property
    def tokenizer_class(self) -> str:
        """The class that the files name; '' if they name none."""
        return self.config.get("tokenizer_class") or self.settings["config.json"].get("tokenizer_class") or ""

    @property
    def truncation_side(self) -> str:
        """Side on which a long text is truncated: 'left', or 'right' (transformers' default)."""
        return self.config.get("truncation_side", "right")


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Find and check the files of a tokenizer, and read those that are JSON.

    Args:
        path: a directory, a tokenizer.json or a vocab.txt, of any name. Settings beside a file are its own.

    Raises:
        UserError: for a file that may not be read or is damaged, and if there is no vocabulary.
    """
    directory = path if path.is_dir() else path.parent
    names = (*SETTINGS_FILES, *(VOCABULARY_FILES if path.is_dir() else ()))
    candidates = {name: directory / name for name in names}
    if not path.is_dir():
        candidates["tokenizer.json" if path.suffix == ".json" else "vocab.txt"] = path
    files = {name: file for name, file in candidates.items() if is_model_file(file)}
    settings = {name: read_json_or_empty(directory / name) for name in SETTINGS_FILES}
    for name in (TOKENIZER_CONFIG, "config.json"):
        if not isinstance(settings[name].get("tokenizer_class") or "", str):
            class_name = settings[name]["tokenizer_class"]
            raise UserError(f"{directory / name}: tokenizer_class is {class_name!r}, expected a name")
    if (side := settings[TOKENIZER_CONFIG].get("truncation_side", "right")) not in ("left", "right"):
        raise UserError(
            f"{directory / TOKENIZER_CONFIG}: truncation_side is {side!r}, expected left or right"
        )
    if not any(name in files for name in VOCABULARY_FILES if name != "merges.txt"):
        contents = describe_hub_cache(path) or "no tokenizer in it"
        raise UserError(
            f"{path}: {contents}, expected a tokenizer.json, a vocab.txt, or a vocab.json with merges.txt"
        )
    for name in files.keys() - {*SETTINGS_FILES, "tokenizer.json", "vocab.json"}:
        _reject_lfs_pointer_file(files[name])
    tokenizer_json, vocab_json = {}, {}
    if "tokenizer.json" in files:
        tokenizer_json = read_model_json(files["tokenizer.json"], "a tokenizer that 'tokenizers' reads")
    elif "vocab.json" in files:
        vocab_json = read_model_json(files["vocab.json"], "JSON, an object")
        if "merges.txt" not in files:
            raise UserError(f"{path}: vocab.json without merges.txt, expected both")
    source = TokenizerFiles(path, files, settings, tokenizer_json, vocab_json)
    _check_named_tokens(source)
    return source


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a vocabulary.

    Raises:
        UserError: for a tokenizer file that may not be read, such as a broken link.
    """
    present = [name for name in (*SETTINGS_FILES, *VOCABULARY_FILES) if is_model_file(directory / name)]
    return any(name in present for name in VOCABULARY_FILES if name != "merges.txt")


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; an empty one if there is no such file.

    Raises:
        UserError: for a file with anything else, and for a broken link.
    """
    return read_model_json(path, "JSON, an object") if is_model_file(path) else {}


def added_token_ids(source: TokenizerFiles) -> dict[str, int]:
    """Return the ids that the settings of a tokenizer declare for its added tokens.

    transformers reads no added_tokens.json beside an `added_tokens_decoder`, and adds tokens beyond the
    vocabulary in the order of their ids, without gaps: they may get others.

    Raises:
        UserError: for entries that are not tokens with their ids.
    """
    decoder = source.config.get("added_tokens_decoder")
    try:
        if decoder is None:
            return {token: int(i) for token, i in source.settings["added_tokens.json"].items()}
        ids = {token["content"]: int(i) for i, token in decoder.items()}
        if not all(isinstance(token, str) and token for token in ids):
            raise TypeError
        return ids
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        directory = source.path if source.path.is_dir() else source.path.parent
        raise UserError(f"{directory}: invalid added tokens, expected tokens with their ids") from None


def named_tokens(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the special tokens that a tokenizer_config.json names, and invalid values in their place."""
    values = [
        value
        for key, value in settings.items()
        if key in _TOKEN_KEYS or (key.endswith("_token") and isinstance(value, str | dict))
    ]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(key) or []
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [extra]
    for value in values:
        token = value.get("content") if isinstance(value, dict) else value
        if token is not None and token != "":
            yield token


def _check_named_tokens(source: TokenizerFiles) -> None:
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        for token in named_tokens(source.settings[name]):
            if not isinstance(token, str):
                raise UserError(f"{source.files[name]}: special token {token!r}, expected a token")


def _reject_lfs_pointer_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            reject_lfs_pointer(path, file.read(len(LFS_POINTER_PREFIX)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected a file that can be read") from None
