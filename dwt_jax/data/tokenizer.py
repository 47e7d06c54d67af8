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
from dwt_jax.data.added_tokens import ROLES, read_json, role_names
from dwt_jax.data.hf_tokenizer import AS_IT_IS, BERT, NORMALIZER, ROBERTAS, SPECIALS, load, wordpiece
from dwt_jax.data.tokenizer_checks import check_ids
from dwt_jax.errors import UserError
from dwt_jax.files import present

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ALPHABET = 1000  # characters at most that get a token of their own, the commonest first
_VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt")
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *_VOCABULARIES,
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
    starts_words: str = ""  # what a token that begins a word begins with: 'Ġ' (byte-level), '▁' or nothing

    def __len__(self) -> int:
        return len(self.tokens)


# Training


def train(
    texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool, sample_megabytes: float = 100.0
) -> "Tokenizer":
    """A WordPiece tokenizer of at most `vocab_size` tokens; the same text gives the same ids.

    texts: called twice, each time for the same texts; the first `sample_megabytes` (10^6
    bytes of UTF-8) of them are read. Raises UserError where the characters alone do not fit.
    """
    from tokenizers import trainers

    tokenizer = wordpiece({token: i for i, token in enumerate(SPECIALS)}, lowercase=lowercase)
    alphabet = _alphabet(_sample(texts(), sample_megabytes), tokenizer)
    inner = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    needed = len(SPECIALS) + len(alphabet) + len(inner)
    if needed > vocab_size:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}, expected at least {needed} for the text's characters"
        )
    # Left to itself the trainer numbers the inner characters in the order of a hash table that
    # differs from process to process, and breaks ties between merges by those numbers. As
    # "special tokens" they are numbered here; what is special is said again below.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts(), sample_megabytes), trainer)
    return wordpiece(tokenizer.get_vocab(), lowercase=lowercase)


def _sample(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    for text in texts:
        if left <= 0:
            return
        left -= len(text.encode())
        yield text


def _alphabet(texts: Iterable[str], tokenizer: "Tokenizer") -> list[str]:
    """The commonest characters after normalisation, sorted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    common = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(common[:ALPHABET])


# Reading and writing


def save(tokenizer: "Tokenizer", out: Path, lowercase: bool) -> None:
    """Write a WordPiece tokenizer as a new directory `out` that AutoTokenizer loads."""
    out.mkdir(parents=True)
    roles = {f"{role}_token": token for role, token in zip(ROLES, SPECIALS, strict=True)}
    settings = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    _write(tokenizer, out, {"tokenizer_class": BERT, **settings, **roles})
    (out / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    words = "".join(f"{token}\n" for token in _tokens(tokenizer, out))
    (out / "vocab.txt").write_text(words, encoding="utf-8")


def _write(tokenizer: "Tokenizer", out: Path, config: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def install(path: str | Path, out: Path, lowercase: bool = True) -> None:
    """Bring the tokenizer at `path` into a new directory `out`, from which AutoTokenizer gives the same
    ids beside a model of any family: its class there is the one that takes tokenizer.json as it is.

    Raises UserError as `load` does.
    """
    path = Path(path).expanduser()
    tokenizer = load(path, lowercase)
    directory = path if path.is_dir() else path.parent
    tokens = _tokens(tokenizer, path)
    roles = _special_roles(path, {token: i for i, token in enumerate(tokens)})
    config = read_json(directory / "tokenizer_config.json")
    for key in ("auto_map", "added_tokens_decoder", *NORMALIZER, "add_prefix_space"):
        config.pop(key, None)  # code that stays where it is, and what tokenizer.json says itself
    out.mkdir(parents=True)
    if path.is_dir():
        copy_files(path, out, _VOCABULARIES)
    config["tokenizer_class"] = AS_IT_IS
    whole = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = {f"{role}_token": tokens[i] for role, i in roles.items() if tokens[i] in whole}
    _write(tokenizer, out, config | named)  # what is named there is found whole in text


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a vocabulary in it. Raises UserError for files that are links to nothing."""
    there = [name for name in _FILES if present(directory / name)]
    return any(name in there for name in ("tokenizer.json", "vocab.txt", "vocab.json"))


def copy_files(directory: Path, out: Path, names: Sequence[str] = _FILES) -> None:
    """The tokenizer files of a directory, and no others, into another one."""
    for name in names:
        if present(directory / name):
            shutil.copyfile(directory / name, out / name)


# What others need


def vocabulary(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """The vocabulary of a tokenizer directory, tokenizer.json or vocab.txt.

    Special tokens by their roles: from tokenizer_config.json and special_tokens_map.json, else
    by BERT's or RoBERTa's names. Raises UserError for a role that no token has.
    """
    path = Path(path).expanduser()
    tokenizer = load(path, lowercase)
    tokens = _tokens(tokenizer, path)
    ids = {token: i for i, token in enumerate(tokens)}
    roles = _special_roles(path, ids)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} | set(
        roles.values()
    )
    continuation, starts_words = _word_shape(tokenizer, tokens)
    continuation[sorted(special)] = False
    continuation.flags.writeable = False
    return Vocabulary(
        tokens=tokens,
        **{f"{role}_id": roles[role] for role in ROLES},
        special_ids=tuple(sorted(special)),
        continuation=continuation,
        starts_words=starts_words,
    )


def digest(path: str | Path, lowercase: bool = True) -> str:
    """Hex SHA-256 of what turns text into ids: tokens, normaliser, pre-tokeniser, merges.

    A vocab.txt and a tokenizer.json that do the same have the same digest.
    """
    tokenizer = load(path, lowercase)
    settings = json.loads(tokenizer.to_str())
    merges = settings["model"].get("merges")
    known = [_tokens(tokenizer, Path(path)), settings["normalizer"], settings["pre_tokenizer"], merges]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _tokens(tokenizer: "Tokenizer", where: Path) -> tuple[str, ...]:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    check_ids(vocab, where)
    by_id = {i: token for token, i in vocab.items()}
    return tuple(by_id.get(i, f"[missing {i}]") for i in range(max(by_id) + 1))


def _special_roles(path: Path, ids: dict[str, int]) -> dict[str, int]:
    usual = max((SPECIALS, ROBERTAS), key=lambda names: sum(name in ids for name in names))
    roles = {}
    for role, token in zip(ROLES, role_names(path if path.is_dir() else path.parent, usual), strict=True):
        if token not in ids:
            raise UserError(
                f"{path}: {role}_token '{token}' is not in the vocabulary, expected the token for that role"
            )
        roles[role] = ids[token]
    return roles


def _word_shape(tokenizer: "Tokenizer", tokens: tuple[str, ...]) -> tuple[np.ndarray, str]:
    """(which tokens go on with a word, what the others begin with)"""
    settings = json.loads(tokenizer.to_str())
    if prefix := settings["model"].get("continuing_subword_prefix"):
        return np.array([token.startswith(prefix) for token in tokens]), ""
    around = json.dumps([settings["normalizer"], settings["pre_tokenizer"]])
    mark = "Ġ" if '"ByteLevel"' in around else "▁" if '"Metaspace"' in around else ""
    if not mark:
        return np.zeros(len(tokens), bool), ""
    return np.array([not token.startswith(mark) for token in tokens]), mark


def sample_of(sources: Iterable[Source], keep: Callable[[str], bool], megabytes: float) -> Iterator[str]:
    """Texts for `train`: the beginnings of all sources, each up to its equal share.

    keep: which documents may be used (the held-out ones may not).
    """
    from dwt_jax.data.sources import documents

    sources = tuple(sources)
    for source in sources:
        yield from _sample(filter(keep, documents(source)), megabytes / len(sources))
