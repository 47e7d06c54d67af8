"""Train a WordPiece vocabulary, or take any Hugging Face tokenizer, and what others need of it.

A tokenizer is a directory in the Hugging Face layout, always; `transformers.AutoTokenizer`
reads it.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.config import Source
from dwt_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
ALPHABET = 1000  # characters at most that get a token of their own, the commonest first
_ROLES = ("pad", "unk", "cls", "sep", "mask")
_CONVENTIONS = (SPECIALS, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))  # BERT's, RoBERTa's
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
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

    tokenizer = _wordpiece({token: i for i, token in enumerate(SPECIALS)}, lowercase)
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
    return _wordpiece(tokenizer.get_vocab(), lowercase)


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


def _wordpiece(vocab: dict[str, int], lowercase: bool) -> "Tokenizer":
    """BERT's pipeline around a vocabulary that holds SPECIALS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


# Reading and writing


def save(tokenizer: "Tokenizer", out: Path, lowercase: bool) -> None:
    """Write a WordPiece tokenizer as a new directory `out` that AutoTokenizer loads."""
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    roles = {f"{role}_token": token for role, token in zip(_ROLES, SPECIALS, strict=True)}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        **roles,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    (out / "vocab.txt").write_text("".join(f"{token}\n" for token in _tokens(tokenizer)), encoding="utf-8")


def install(path: str | Path, out: Path, lowercase: bool = True) -> None:
    """Bring the tokenizer at `path` into a new directory `out`.

    A directory's tokenizer files are copied as they are; where a vocab.txt is all there is,
    the rest is written beside it, lower-casing as the directory's tokenizer_config.json says,
    else as `lowercase` says. Raises UserError as `load` does.
    """
    path = Path(path).expanduser()
    tokenizer = load(path, lowercase)
    if path.is_file() or not any((path / name).exists() for name in ("tokenizer.json", "vocab.json")):
        save(tokenizer, out, _lowercase(path, lowercase))
    out.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        copy_files(path, out)


def copy_files(directory: Path, out: Path) -> None:
    """The tokenizer files of a directory, and no others, into another one."""
    for name in _FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)


def load(path: str | Path, lowercase: bool = True) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory (tokenizer.json, vocab.txt, or vocab.json with
    merges.txt), a tokenizer.json or a vocab.txt, without truncation or padding.

    `lowercase`: for a vocab.txt without a tokenizer_config.json that knows better. Raises
    UserError, naming the file, for anything else.
    """
    from tokenizers import Tokenizer

    path = Path(path).expanduser()
    whole = path if path.suffix == ".json" else path / "tokenizer.json"
    words = path if path.is_file() else path / "vocab.txt"
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a tokenizer directory or a vocab.txt")
    if whole.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{whole}: {error}, expected a tokenizer that 'tokenizers' reads") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not words.is_file() and (path / "vocab.json").is_file():
        return _byte_level(path)
    if not words.is_file():
        raise UserError(
            f"{path}: no tokenizer.json, vocab.txt or vocab.json with merges.txt in it, expected one of them"
        )
    return _wordpiece(_read_words(words), _lowercase(path, lowercase))


def _byte_level(directory: Path) -> "Tokenizer":
    """RoBERTa's byte-level BPE from vocab.json and merges.txt, as transformers reads them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = _json(directory / "vocab.json")
    config = _json(directory / "tokenizer_config.json")
    try:
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{directory}: {error}, expected vocab.json and merges.txt of a BPE") from None
    tokenizer = Tokenizer(model)
    roles = {role: token for role, token in zip(_ROLES, _CONVENTIONS[1], strict=True) if token in vocab}
    if missing := {"cls", "sep"} - set(roles):
        raise UserError(
            f"{directory}: no {' '.join(sorted(missing))} in vocab.json, expected RoBERTa's <s> and </s>"
        )
    space = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (roles["sep"], vocab[roles["sep"]]),
        (roles["cls"], vocab[roles["cls"]]),
        add_prefix_space=space,
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in roles.values()])
    return tokenizer


def _read_words(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}, expected a UTF-8 file with one token a line") from None
    while lines and not lines[-1].strip():
        lines.pop()
    tokens = [line.rstrip("\r") for line in lines]
    if missing := [token for token in SPECIALS if token not in tokens]:
        raise UserError(
            f"{path}: no {' '.join(missing)} among its {len(tokens)} lines, expected BERT's special tokens"
        )
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"{path}: token '{twice}' is there more than once, expected each token once")
    return {token: i for i, token in enumerate(tokens)}


def _lowercase(path: Path, otherwise: bool) -> bool:
    directory = path if path.is_dir() else path.parent
    return bool(_json(directory / "tokenizer_config.json").get("do_lower_case", otherwise))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}, expected JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a JSON {type(found).__name__}, expected an object")
    return found


# What others need


def vocabulary(path: str | Path, lowercase: bool = True) -> Vocabulary:
    """The vocabulary of a tokenizer directory, tokenizer.json or vocab.txt.

    Special tokens by their roles: from tokenizer_config.json and special_tokens_map.json, else
    by BERT's or RoBERTa's names. Raises UserError for a role that no token has.
    """
    path = Path(path).expanduser()
    tokenizer = load(path, lowercase)
    tokens = _tokens(tokenizer)
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
        **{f"{role}_id": roles[role] for role in _ROLES},
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
    known = [_tokens(tokenizer), settings["normalizer"], settings["pre_tokenizer"], merges]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _tokens(tokenizer: "Tokenizer") -> tuple[str, ...]:
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    return tuple(by_id.get(i, f"[missing {i}]") for i in range(max(by_id) + 1))


def _special_roles(path: Path, ids: dict[str, int]) -> dict[str, int]:
    directory = path if path.is_dir() else path.parent
    said = {**_json(directory / "special_tokens_map.json"), **_json(directory / "tokenizer_config.json")}
    convention = max(_CONVENTIONS, key=lambda names: sum(name in ids for name in names))
    roles = {}
    for role, usual in zip(_ROLES, convention, strict=True):
        named = said.get(f"{role}_token") or usual
        token = named["content"] if isinstance(named, dict) else named
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
