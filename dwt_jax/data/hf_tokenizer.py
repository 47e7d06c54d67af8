"""Tokenizers of Hugging Face directories, with the token ids that `transformers.AutoTokenizer` gives.

A complete tokenizer.json, such as dwt_jax writes, is read by `tokenizers` alone, all others by AutoTokenizer:
importing transformers takes seconds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dwt_jax.data.tokenizer_checks import (
    check_charsmaps,
    check_id_gaps,
    check_token_ids,
    check_tokenizer_parts,
    wrap_tokenizer_errors,
)
from dwt_jax.data.tokenizer_files import (
    TokenizerFiles,
    added_token_ids,
    named_tokens,
    read_tokenizer_files,
)
from dwt_jax.errors import UserError
from dwt_jax.files import user_path
from dwt_jax.model_files import describe_missing_path
from dwt_jax.models.tokenizer_defaults import BEGIN_KEY, END_KEY, TOKEN_KEYS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERIC_TOKENIZER = "PreTrainedTokenizerFast"
"""The class of transformers that loads a tokenizer.json unchanged."""

_NAMED_KEYS = (*TOKEN_KEYS, BEGIN_KEY, END_KEY)


class LoadedTokenizer(NamedTuple):
    """A tokenizer with its files and settings."""

    tokenizer: "Tokenizer"
    special_tokens: dict[str, str]  # by _NAMED_KEYS, those that have one
    source: TokenizerFiles


def load_hf_tokenizer(path: str | Path, lowercase: bool = True) -> "Tokenizer":
    """Load a tokenizer without truncation and padding.

    Args:
        path: a directory of any tokenizer that transformers reads and has a fast class for; or a
            tokenizer.json; or a vocab.txt of WordPiece.
        lowercase: for a vocab.txt without a tokenizer_config.json that has `do_lower_case`.

    Raises:
        UserError: the path is something else; the message names the file.
    """
    return read_tokenizer(path, lowercase).tokenizer


def read_tokenizer(path: str | Path, lowercase: bool = True) -> LoadedTokenizer:
    """Load a tokenizer with its special tokens. Arguments and errors are those of `load_hf_tokenizer`."""
    path = user_path(path)
    if not path.exists():
        raise UserError(
            f"{describe_missing_path(path, 'file')}, expected a tokenizer directory or a vocab.txt"
        )
    source = read_tokenizer_files(path)
    file = source.vocabulary_path
    added_token_ids(source)
    check_charsmaps(source.tokenizer_json.get("normalizer"), file)
    _check_declared_ids(source)
    loaded = _read_generic(source) if _is_complete(source) else _read_auto_tokenizer(source, lowercase)
    check_token_ids(loaded.tokenizer.get_vocab(with_added_tokens=True), file)
    loaded.tokenizer.no_truncation()
    loaded.tokenizer.no_padding()
    return loaded


def _check_declared_ids(source: TokenizerFiles) -> None:
    """Check the ids of a JSON vocabulary before a library steps through them."""
    model = source.tokenizer_json.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else source.vocab_json
    if vocab and isinstance(vocab, dict) and all(isinstance(i, int) for i in vocab.values()):
        check_id_gaps(vocab, source.vocabulary_path)


def _is_complete(source: TokenizerFiles) -> bool:
    """Whether transformers would load the tokenizer.json unchanged: no setting adds a token to it."""
    config = source.config
    if config.get("tokenizer_class") != GENERIC_TOKENIZER or not source.tokenizer_json:
        return False
    if source.settings["special_tokens_map.json"] or source.settings["added_tokens.json"]:
        return False
    if "added_tokens_decoder" in config or not isinstance(config.get("split_special_tokens", False), bool):
        return False
    try:
        contents = {token["content"] for token in source.tokenizer_json["added_tokens"]}
        return contents.issuperset(named_tokens(config))
    except (KeyError, TypeError):
        return False


def _read_generic(source: TokenizerFiles) -> LoadedTokenizer:
    from tokenizers import Tokenizer

    file = source.files["tokenizer.json"]
    with wrap_tokenizer_errors(file, "a tokenizer that 'tokenizers' reads"):
        tokenizer = Tokenizer.from_file(str(file))
    check_tokenizer_parts(source.tokenizer_json, file)
    tokenizer.encode_special_tokens = source.config.get("split_special_tokens", False)
    special_tokens = {
        key: token for key in _NAMED_KEYS for token in named_tokens({key: source.config.get(key)})
    }
    return LoadedTokenizer(tokenizer, special_tokens, source)


def _read_auto_tokenizer(source: TokenizerFiles, lowercase: bool) -> LoadedTokenizer:
    from dwt_jax.data.auto_tokenizer import load_auto_tokenizer

    auto_tokenizer = load_auto_tokenizer(source, lowercase)
    names = auto_tokenizer.special_tokens_map
    special_tokens = {key: str(names[key]) for key in _NAMED_KEYS if names.get(key)}
    return LoadedTokenizer(auto_tokenizer.backend_tokenizer, special_tokens, source)
