"""Read a tokenizer through `transformers.AutoTokenizer`.

AutoTokenizer gets a temporary directory. It holds links to the files that were checked, and settings without
the keys that name other files or code. It therefore reads nothing else and looks nothing up.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dwt_jax.data.tokenizer_checks import check_byte_level, check_tokenizer_parts, wrap_tokenizer_errors
from dwt_jax.data.tokenizer_files import (
    SENTENCEPIECE_SUFFIX,
    TOKENIZER_CONFIG,
    TokenizerFiles,
    added_token_ids,
)
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import VOCAB_JSON_CLASS, VOCAB_TXT_CLASS

EXPECTED = "a tokenizer that transformers reads"
_MODEL_KEYS = ("model_type", "tokenizer_class", "model_name", "transformers_version")
"""Keys of config.json that AutoTokenizer chooses the class by."""
FILE_KEYS = (
    "auto_map",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "merges",
    "merges_file",
    "tokenizer_file",
    "tokenizer_object",
    "vocab",
    "vocab_file",
)
"""Keys of tokenizer_config.json that name files or code, or objects in their place."""

_BYTE_ORDER_MARK = "\ufeff"


class UnsupportedTokenizerError(UserError):
    """A possibly valid tokenizer without a usable fast class: it needs Python code or a missing package."""


def load_auto_tokenizer(source: TokenizerFiles, lowercase: bool) -> Any:
    """Load a tokenizer as `AutoTokenizer.from_pretrained` does, without its code and without network.

    Args:
        source: its files.
        lowercase: whether to lower-case, for a vocab.txt whose settings do not say.

    Returns:
        A tokenizer of transformers, with a `backend_tokenizer`.

    Raises:
        UserError: the tokenizer cannot be loaded; UnsupportedTokenizerError if it has no fast class.
    """
    path, file = source.path, source.vocabulary_path
    class_name = source.tokenizer_class or _default_class(source)
    if class_name == "PreTrainedTokenizerFast" and "tokenizer.json" not in source.files:
        raise UserError(f"{path}: no tokenizer.json, expected one with tokenizer_class '{class_name}'")
    with (
        TemporaryDirectory(prefix="dwt-tokenizer-") as folder,
        wrap_tokenizer_errors(path, EXPECTED, hidden=folder),
        _quiet_transformers(),
    ):
        from transformers import AutoTokenizer

        _stage(source, lowercase, class_name, Path(folder))
        _reject_custom_code(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ImportError as error:
            message = " ".join(str(error).split())[:200]
            raise UnsupportedTokenizerError(f"{path}: {message}, expected {EXPECTED}") from None
        _check_class(source, tokenizer)
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_special_tokens(source, tokenizer)
    if class_name == VOCAB_JSON_CLASS and source.vocab_json:
        check_byte_level(source.vocab_json, file)
    check_tokenizer_parts(settings, file)
    return tokenizer


def model_tokenizer_class(model_type: str) -> str:
    """Return the tokenizer class that AutoTokenizer has for a type of models; '' if it has none."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type) or ""


def _stage(source: TokenizerFiles, lowercase: bool, class_name: str, folder: Path) -> None:
    for name, file in source.files.items():
        if name == "vocab.txt":  # an empty line at its end is no token
            (folder / name).write_bytes(file.read_bytes().rstrip())
        elif name not in source.settings:
            (folder / name).symlink_to(file.resolve())
    config = {key: value for key, value in source.config.items() if key not in FILE_KEYS}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            config[key] = {"__type": "AddedToken", **value}
    if class_name:
        config["tokenizer_class"] = class_name
    if "vocab.txt" in source.files and "tokenizer.json" not in source.files:
        config.setdefault("do_lower_case", lowercase)
    model_config = source.settings["config.json"]
    settings = dict(source.settings)
    settings[TOKENIZER_CONFIG] = config
    settings["config.json"] = {key: model_config[key] for key in _MODEL_KEYS if key in model_config}
    for name, content in settings.items():
        if content:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _default_class(source: TokenizerFiles) -> str:
    """The class of a tokenizer without settings; '' where AutoTokenizer derives it from the model's type."""
    if source.settings["config.json"].get("model_type"):
        return ""
    if "tokenizer.json" in source.files:
        return "PreTrainedTokenizerFast"
    if "vocab.txt" in source.files:
        return VOCAB_TXT_CLASS
    return VOCAB_JSON_CLASS


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without warnings and logs of transformers, those of its import (no PyTorch) included."""
    advisory = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(advisory)
    os.environ[advisory] = "1"
    try:
        from transformers import logging
    finally:
        os.environ.pop(advisory)
        if before is not None:
            os.environ[advisory] = before
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _reject_custom_code(source: TokenizerFiles) -> None:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = source.config.get("tokenizer_class") or ""
    if "auto_map" in source.config and tokenizer_class_from_name(name) is None:
        raise UnsupportedTokenizerError(
            f"{source.path}: {name or 'its tokenizer'} is Python code beside the files (auto_map), which "
            "is not run, expected a tokenizer_class of transformers"
        )


def _check_class(source: TokenizerFiles, tokenizer: Any) -> None:
    """Check that the class is fast, and that its files are there: otherwise it makes up a vocabulary."""
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedTokenizerError(
            f"{source.path}: {name} has no fast tokenizer in transformers, expected a class that has one"
        )
    if "tokenizer.json" in source.files or any(file.endswith(SENTENCEPIECE_SUFFIX) for file in source.files):
        return
    expected = [file for key, file in tokenizer.vocab_files_names.items() if key != "tokenizer_file"]
    if missing := [file for file in expected if file not in source.files]:
        raise UserError(
            f"{source.path}: no {' '.join(missing)}, expected {' and '.join(expected)} of {name}, or a "
            "tokenizer.json"
        )


def _check_special_tokens(source: TokenizerFiles, tokenizer: Any) -> None:
    """Check that special tokens are those of the files: transformers gives new ids to others, for which no
    model has a row."""
    for role in ("cls_token", "sep_token"):
        name = str(getattr(tokenizer, role, None) or "")
        if name.startswith("$") or ":" in name:
            raise UserError(f"{source.vocabulary_path}: {role} is {name!r}, expected a plain name")
    if not any(name in source.files for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return  # of SentencePiece, whose classes add tokens to the file's own
    backend = tokenizer.backend_tokenizer
    vocab = backend.get_vocab(with_added_tokens=False)
    declared = {token["content"] for token in source.tokenizer_json.get("added_tokens") or []}
    declared |= added_token_ids(source).keys()
    added = [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]
    missing = [
        token
        for token in added
        if token not in vocab and _BYTE_ORDER_MARK + token not in vocab and token not in declared
    ]
    if missing:
        raise UserError(
            f"{source.vocabulary_path}: no {' '.join(missing)} among its {len(vocab)} tokens, expected the "
            f"special tokens of {type(tokenizer).__name__} and of the settings beside it"
        )
