"""Tokenizers of Hugging Face directories, with the token ids that transformers gives.

transformers builds the tokenizer classes of `PIPELINES` from a vocabulary, its added tokens and the flags
in tokenizer_config.json, and so does this module. A tokenizer.json of another class, or with other
components than its class has, is loaded unchanged. transformers may rebuild a class of that kind, and then
the flags in tokenizer_config.json take precedence there.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dwt_jax.data.added_tokens import (
    BYTE_ORDER_MARK,
    TOKEN_KEYS,
    TOKENIZER_CONFIG,
    AddedTokensById,
    list_added_tokens,
    read_json_or_empty,
    read_special_tokens,
    register_added_tokens,
)
from dwt_jax.data.tokenizer_checks import (
    check_charsmaps,
    check_token_ids,
    check_tokenizer_parts,
    wrap_tokenizer_errors,
)
from dwt_jax.errors import UserError
from dwt_jax.files import LFS_POINTER_PREFIX, reject_lfs_pointer, user_path
from dwt_jax.model_files import describe_hub_cache, describe_missing_path, is_model_file, read_model_json
from dwt_jax.models.tokenizer_pipelines import (
    BYTE_LEVEL_BPE,
    PIPELINES,
    TOKENIZER_CLASSES,
    WORDPIECE,
    Flags,
    SpecialTokens,
    TokenizerPipeline,
    component_types,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERIC_TOKENIZER = "PreTrainedTokenizerFast"
"""The class of transformers that loads a tokenizer.json unchanged."""


def load_hf_tokenizer(path: str | Path, lowercase: bool = True) -> "Tokenizer":
    """Load a tokenizer without truncation and padding.

    Args:
        path: a directory with a tokenizer.json, a vocab.txt, or a vocab.json and a merges.txt; or a
            tokenizer.json; or a vocab.txt.
        lowercase: for a vocab.txt without a tokenizer_config.json that has `do_lower_case`.

    Raises:
        UserError: for anything else; the message names the file.
    """
    path = user_path(path)
    if not path.exists():
        raise UserError(
            f"{describe_missing_path(path, 'file')}, expected a tokenizer directory or a vocab.txt"
        )
    directory = path if path.is_dir() else path.parent
    tokenizer_json = path if path.is_file() and path.suffix == ".json" else path / "tokenizer.json"
    vocab_txt = path if path.is_file() else path / "vocab.txt"
    vocab_json = path / "vocab.json"
    declared_class = declared_tokenizer_class(directory)
    class_name = declared_class.removesuffix("Fast")
    pipeline = PIPELINES.get(class_name)
    if is_model_file(tokenizer_json):
        tokenizer = _from_tokenizer_json(tokenizer_json, pipeline)
    elif is_model_file(vocab_txt) and (not class_name or pipeline is WORDPIECE):
        tokenizer = _from_vocab_txt(vocab_txt, lowercase)
    elif (
        not is_model_file(vocab_txt)
        and is_model_file(vocab_json)
        and (not class_name or pipeline is BYTE_LEVEL_BPE)
    ):
        tokenizer = _from_bpe_files(directory)
    elif is_model_file(vocab_txt) or is_model_file(vocab_json):
        expected = (WORDPIECE if is_model_file(vocab_txt) else BYTE_LEVEL_BPE).tokenizer_class
        raise UserError(
            f"{path}: tokenizer_class is '{declared_class}', expected {expected} (or a tokenizer.json, with "
            "any class)"
        )
    else:
        contents = describe_hub_cache(path) or "no tokenizer in it"
        raise UserError(
            f"{path}: {contents}, expected a tokenizer.json, a vocab.txt, or a vocab.json with merges.txt"
        )
    tokenizer.encode_special_tokens = bool(
        _read_flag(directory / TOKENIZER_CONFIG, "split_special_tokens", False)
    )
    return tokenizer


def build_wordpiece_tokenizer(vocab: dict[str, int], *, lowercase: bool = True) -> "Tokenizer":
    """Build a WordPiece tokenizer around a vocabulary that has the default special tokens."""
    from tokenizers import AddedToken

    special_tokens, flags = WORDPIECE.special_tokens, {**WORDPIECE.flags, "do_lower_case": lowercase}
    tokenizer = WORDPIECE.build(vocab, [], special_tokens, flags)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    tokenizer.post_processor = WORDPIECE.post_processor(tokenizer, special_tokens, flags)
    return tokenizer


def declared_tokenizer_class(directory: Path) -> str:
    """Return the class that transformers would take; '' if no file determines it.

    By precedence: that of tokenizer_config.json, that of config.json, that of config.json's model_type.

    Raises:
        UserError: for a class that is not a name.
    """
    for file in (directory / TOKENIZER_CONFIG, directory / "config.json"):
        if class_name := read_json_or_empty(file).get("tokenizer_class"):
            if not isinstance(class_name, str):
                raise UserError(f"{file}: tokenizer_class is {class_name!r}, expected a name")
            return class_name
    return TOKENIZER_CLASSES.get(str(read_json_or_empty(directory / "config.json").get("model_type")), "")


def _read_flags(pipeline: TokenizerPipeline, path: Path, lowercase: bool) -> Flags:
    """lowercase: the default of `do_lower_case`, where the pipeline has it."""
    defaults = {key: lowercase if key == "do_lower_case" else flag for key, flag in pipeline.flags.items()}
    return {key: _read_flag(path, key, default) for key, default in defaults.items()}


def _read_flag(path: Path, key: str, default: bool | None) -> bool | None:
    value = read_json_or_empty(path).get(key, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r}, expected true or false")
    return default if value is None else value


def _build_tokenizer(
    pipeline: TokenizerPipeline,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    path: Path,
    *,
    lowercase: bool = True,
    added_tokens: AddedTokensById | None = None,
) -> "Tokenizer":
    """A pipeline around a vocabulary, with the settings of the files beside `path`."""
    directory = path.parent
    special_tokens = read_special_tokens(directory, pipeline.special_tokens)
    flags = _read_flags(pipeline, directory / TOKENIZER_CONFIG, lowercase)
    if pipeline.unk_in_vocab and special_tokens.unk not in vocab:
        raise UserError(
            f"{path}: no {special_tokens.unk} in the vocabulary, expected the token for unknown words"
        )
    with wrap_tokenizer_errors(directory, pipeline.vocab_files):
        tokenizer = pipeline.build(vocab, merges, special_tokens, flags)
    defaults = {key: token for key, token in pipeline.optional_tokens.items() if token in vocab}
    defaults |= dict(zip(TOKEN_KEYS, special_tokens, strict=True))
    register_added_tokens(tokenizer, directory, defaults, added_tokens)
    try:
        tokenizer.post_processor = pipeline.post_processor(tokenizer, special_tokens, flags)
    except ValueError:
        raise UserError(
            f"{path}: special tokens {special_tokens.cls!r} and {special_tokens.sep!r}, expected plain names"
        ) from None
    return tokenizer


def _from_tokenizer_json(path: Path, pipeline: TokenizerPipeline | None) -> "Tokenizer":
    """The tokenizer of a tokenizer.json. If its components are those of `pipeline`, only the vocabulary,
    the merges and the added tokens are taken from it."""
    from tokenizers import Tokenizer

    expected = "a tokenizer that 'tokenizers' reads"
    check_charsmaps(read_model_json(path, expected).get("normalizer"), path)
    with wrap_tokenizer_errors(path, expected):
        tokenizer = Tokenizer.from_file(str(path))
    check_token_ids(tokenizer.get_vocab(with_added_tokens=True), path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.loads(tokenizer.to_str())
    if pipeline is None or component_types(settings) != pipeline.component_types:
        check_tokenizer_parts(settings, path)
        register_added_tokens(tokenizer, path.parent, {})
        return tokenizer
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    merges = [(left, right) for left, right in settings["model"].get("merges", [])]
    return _build_tokenizer(pipeline, vocab, merges, path, added_tokens=tokenizer.get_added_tokens_decoder())


def _from_vocab_txt(path: Path, lowercase: bool) -> "Tokenizer":
    vocab = _read_vocab_txt(path)
    if missing := _missing_special_tokens(path.parent, vocab, WORDPIECE.special_tokens):
        raise UserError(
            f"{path}: no {' '.join(missing)} among its {len(vocab)} lines, expected the special tokens of "
            f"{WORDPIECE.tokenizer_class}"
        )
    return _build_tokenizer(WORDPIECE, vocab, [], path, lowercase=lowercase)


def _missing_special_tokens(directory: Path, vocab: dict[str, int], defaults: SpecialTokens) -> list[str]:
    """The special tokens that neither the vocabulary nor the added tokens have."""
    special_tokens = read_special_tokens(directory, defaults)
    known_tokens = {*vocab, *(token for _, token, _ in list_added_tokens(directory, {}))}
    return [token for token in special_tokens if known_tokens.isdisjoint((token, BYTE_ORDER_MARK + token))]


def _read_vocab_txt(path: Path) -> dict[str, int]:
    """The tokens of a vocab.txt, as transformers reads it: of a token on several lines the last one counts,
    and a byte-order mark is part of the first token."""
    from tokenizers import models

    _reject_lfs_pointer_file(path)
    with wrap_tokenizer_errors(path, "a UTF-8 file with one token a line"):
        vocab = models.WordPiece.read_file(str(path))
    if vocab and vocab.get("") == max(vocab.values()):  # a line without a token at the end
        del vocab[""]
    return vocab


def _from_bpe_files(directory: Path) -> "Tokenizer":
    """The tokenizer of a vocab.json and a merges.txt."""
    from tokenizers import models

    vocab_path, merges_path = directory / "vocab.json", directory / "merges.txt"
    read_model_json(vocab_path, "JSON, an object")
    if is_model_file(merges_path):
        _reject_lfs_pointer_file(merges_path)
    with wrap_tokenizer_errors(directory, BYTE_LEVEL_BPE.vocab_files):
        vocab, merges = models.BPE.read_file(str(vocab_path), str(merges_path))
    if missing := _missing_special_tokens(directory, vocab, BYTE_LEVEL_BPE.special_tokens):
        raise UserError(
            f"{vocab_path}: no {' '.join(missing)}, expected the special tokens of "
            f"{BYTE_LEVEL_BPE.tokenizer_class}"
        )
    _check_byte_level(vocab, vocab_path)
    return _build_tokenizer(BYTE_LEVEL_BPE, vocab, merges, vocab_path)


def _reject_lfs_pointer_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            reject_lfs_pointer(path, file.read(len(LFS_POINTER_PREFIX)))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected a file that can be read") from None


def _check_byte_level(vocab: dict[str, int], path: Path) -> None:
    from tokenizers import pre_tokenizers

    num_missing = sum(letter not in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
    if num_missing or any(len(token) > 4 and token.endswith("</w>") for token in vocab):
        problem = f"lacks {num_missing} of the 256 bytes" if num_missing else "marks ends of words by </w>"
        raise UserError(f"{path}: {problem}, expected byte-level BPE (or a tokenizer.json, with any model)")
