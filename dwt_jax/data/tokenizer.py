"""Train a WordPiece vocabulary, or take any Hugging Face tokenizer, and what others need of it.

A tokenizer is a directory in the Hugging Face layout, always; `transformers.AutoTokenizer`
reads it.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.config import Source
from dwt_jax.data.added_tokens import TOKEN_ROLES, read_json_or_empty, read_special_tokens
from dwt_jax.data.hf_tokenizer import (
    BERT_SPECIAL_TOKENS,
    BERT_TOKENIZER,
    GENERIC_TOKENIZER,
    NORMALIZER_KEYS,
    ROBERTA_SPECIAL_TOKENS,
    build_wordpiece_tokenizer,
    load_hf_tokenizer,
)
from dwt_jax.data.tokenizer_checks import check_token_ids
from dwt_jax.errors import UserError
from dwt_jax.files import is_file_or_raise

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_ALPHABET_SIZE = 1000  # characters at most that get a token of their own, the commonest first
_VOCAB_FILES = ("vocab.txt", "vocab.json", "merges.txt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *_VOCAB_FILES,
)


@dataclass(frozen=True)
class Vocabulary:
    """What packing, masking and models need of a tokenizer; without the library that reads it."""

    tokens: tuple[str, ...]  # by id
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]  # sorted; the five and whatever else the tokenizer calls special
    continuation: np.ndarray = field(compare=False)  # bool [vocab]: goes on with the word before it
    word_prefix: str = ""  # what a token that begins a word begins with: 'Ġ' (byte-level), '▁' or nothing

    def __len__(self) -> int:
        return len(self.tokens)


# Training


def train_tokenizer(
    texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool, sample_megabytes: float = 100.0
) -> "Tokenizer":
    """A WordPiece tokenizer of at most `vocab_size` tokens; the same text gives the same ids.

    texts: called twice, each time for the same texts; the first `sample_megabytes` (10^6
    bytes of UTF-8) of them are read. Raises UserError where the characters alone do not fit.
    """
    from tokenizers import trainers

    tokenizer = build_wordpiece_tokenizer(
        {token: i for i, token in enumerate(BERT_SPECIAL_TOKENS)}, lowercase=lowercase
    )
    alphabet = _common_characters(_take_megabytes(texts(), sample_megabytes), tokenizer)
    continuations = [
        f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1
    ]
    min_vocab_size = len(BERT_SPECIAL_TOKENS) + len(alphabet) + len(continuations)
    if min_vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}, expected at least {min_vocab_size} for the text's characters"
        )
    # Left to itself the trainer numbers the inner characters in the order of a hash table that
    # differs from process to process, and breaks ties between merges by those numbers. As
    # "special tokens" they are numbered here; what is special is said again below.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIAL_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_take_megabytes(texts(), sample_megabytes), trainer)
    return build_wordpiece_tokenizer(tokenizer.get_vocab(), lowercase=lowercase)


def _take_megabytes(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    remaining = megabytes * 1e6
    for text in texts:
        if remaining <= 0:
            return
        remaining -= len(text.encode())
        yield text


def _common_characters(texts: Iterable[str], tokenizer: "Tokenizer") -> list[str]:
    """The commonest characters after normalisation, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(common[:MAX_ALPHABET_SIZE])


# Reading and writing


def save_tokenizer(tokenizer: "Tokenizer", out: Path, lowercase: bool) -> None:
    """Write a WordPiece tokenizer as a new directory `out` that AutoTokenizer loads."""
    out.mkdir(parents=True)
    roles = {f"{role}_token": token for role, token in zip(TOKEN_ROLES, BERT_SPECIAL_TOKENS, strict=True)}
    settings = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    _write_tokenizer_files(tokenizer, out, {"tokenizer_class": BERT_TOKENIZER, **settings, **roles})
    (out / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    vocab_text = "".join(f"{token}\n" for token in _tokens_by_id(tokenizer, out))
    (out / "vocab.txt").write_text(vocab_text, encoding="utf-8")


def _write_tokenizer_files(tokenizer: "Tokenizer", out: Path, config: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(path: str | Path, out: Path, lowercase: bool = True) -> None:
    """Bring the tokenizer at `path` into a new directory `out`, from which AutoTokenizer gives the same
    ids beside a model of any family: its class there is the one that takes tokenizer.json as it is.

    Raises UserError as `load` does.
    """
    path = Path(path).expanduser()
    tokenizer = load_hf_tokenizer(path, lowercase)
    directory = path if path.is_dir() else path.parent
    tokens = _tokens_by_id(tokenizer, path)
    roles = _special_token_ids(path, {token: i for i, token in enumerate(tokens)})
    config = read_json_or_empty(directory / "tokenizer_config.json")
    for key in ("auto_map", "added_tokens_decoder", *NORMALIZER_KEYS, "add_prefix_space"):
        config.pop(key, None)  # code that stays where it is, and what tokenizer.json says itself
    out.mkdir(parents=True)
    if path.is_dir():
        copy_tokenizer_files(path, out, _VOCAB_FILES)
    config["tokenizer_class"] = GENERIC_TOKENIZER
    added_contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    role_tokens = {f"{role}_token": tokens[i] for role, i in roles.items() if tokens[i] in added_contents}
    _write_tokenizer_files(tokenizer, out, config | role_tokens)  # what is named there is found whole in text


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a vocabulary in it. Raises UserError for files that are links to nothing."""
    present_files = [name for name in _TOKENIZER_FILES if is_file_or_raise(directory / name)]
    return any(name in present_files for name in ("tokenizer.json", "vocab.txt", "vocab.json"))


def copy_tokenizer_files(directory: Path, out: Path, names: Sequence[str] = _TOKENIZER_FILES) -> None:
    """The tokenizer files of a directory, and no others, into another one."""
    for name in names:
        if is_file_or_raise(directory / name):
            shutil.copyfile(directory / name, out / name)


# What others need


def load_vocabulary(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """The vocabulary of a tokenizer directory, tokenizer.json or vocab.txt.

    Special tokens by their roles: from tokenizer_config.json and special_tokens_map.json, else
    by BERT's or RoBERTa's names. Raises UserError for a role that no token has.
    """
    path = Path(path).expanduser()
    tokenizer = load_hf_tokenizer(path, lowercase)
    tokens = _tokens_by_id(tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    roles = _special_token_ids(path, ids)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} | set(
        roles.values()
    )
    continuation, word_prefix = _continuation_and_prefix(tokenizer, tokens)
    continuation[sorted(special)] = False
    continuation.flags.writeable = False
    return Vocabulary(
        tokens=tokens,
        **{f"{role}_id": roles[role] for role in TOKEN_ROLES},
        special_ids=tuple(sorted(special)),
        continuation=continuation,
        word_prefix=word_prefix,
    )


def tokenizer_digest(path: str | Path, lowercase: bool = True) -> str:
    """Hex SHA-256 of what turns text into ids: tokens, normaliser, pre-tokeniser, merges.

    A vocab.txt and a tokenizer.json that do the same have the same digest.
    """
    tokenizer = load_hf_tokenizer(path, lowercase)
    settings = json.loads(tokenizer.to_str())
    merges = settings["model"].get("merges")
    content = [
        _tokens_by_id(tokenizer, Path(path)),
        settings["normalizer"],
        settings["pre_tokenizer"],
        merges,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokens_by_id(tokenizer: "Tokenizer", path: Path) -> tuple[str, ...]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    check_token_ids(vocab, path)
    by_id = {i: token for token, i in vocab.items()}
    return tuple(by_id.get(i, f"[missing {i}]") for i in range(max(by_id) + 1))


def _special_token_ids(path: Path, ids: dict[str, int]) -> dict[str, int]:
    defaults = max(
        (BERT_SPECIAL_TOKENS, ROBERTA_SPECIAL_TOKENS), key=lambda names: sum(name in ids for name in names)
    )
    roles = {}
    for role, token in zip(
        TOKEN_ROLES, read_special_tokens(path if path.is_dir() else path.parent, defaults), strict=True
    ):
        if token not in ids:
            raise UserError(
                f"{path}: {role}_token '{token}' is not in the vocabulary, expected the token for that role"
            )
        roles[role] = ids[token]
    return roles


def _continuation_and_prefix(tokenizer: "Tokenizer", tokens: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """(which tokens go on with a word, what the others begin with)"""
    settings = json.loads(tokenizer.to_str())
    if prefix := settings["model"].get("continuing_subword_prefix"):
        return np.array([token.startswith(prefix) for token in tokens]), ""
    pipeline = json.dumps([settings["normalizer"], settings["pre_tokenizer"]])
    word_prefix = "Ġ" if '"ByteLevel"' in pipeline else "▁" if '"Metaspace"' in pipeline else ""
    if not word_prefix:
        return np.zeros(len(tokens), bool), ""
    return np.array([not token.startswith(word_prefix) for token in tokens]), word_prefix


def sample_documents(
    sources: Iterable[Source], keep: Callable[[str], bool], megabytes: float
) -> Iterator[str]:
    """Texts for `train_tokenizer`: the beginnings of all sources, each up to its equal share.

    keep: which documents may be used (the held-out ones may not).
    """
    from dwt_jax.data.sources import iter_documents

    sources = tuple(sources)
    for source in sources:
        yield from _take_megabytes(filter(keep, iter_documents(source)), megabytes / len(sources))
