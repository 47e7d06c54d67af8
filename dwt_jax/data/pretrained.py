"""Tokenizers of Hugging Face directories, read so that the ids are those of transformers.

transformers builds a BertTokenizer and a RobertaTokenizer from their vocabulary and the
settings in tokenizer_config.json. Any other class, and a tokenizer.json with other parts than its
class has, is taken as it is here (where transformers would build a class of its own anew, its
settings may win there).
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.errors import UserError
from dwt_jax.files import read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's
ROBERTAS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
ROLES = ("pad", "unk", "cls", "sep", "mask")
BERT, ROBERTA, AS_IT_IS = "BertTokenizer", "RobertaTokenizer", "PreTrainedTokenizerFast"
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Keys of tokenizer_config.json → of tokenizers' BertNormalizer."""
POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS did not fetch."""
_SAME = {
    **{f"{name}Tokenizer": BERT for name in ("DistilBert", "Electra", "MobileBert", "SqueezeBert", "Lxmert")},
    **{f"{name}Tokenizer": ROBERTA for name in ("Bart", "Longformer")},
}
_OF_MODELS = {"bert": BERT, "distilbert": BERT, "roberta": ROBERTA}


def load(path: str | Path, lowercase: bool = True) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory (tokenizer.json, vocab.txt, or vocab.json with
    merges.txt), a tokenizer.json or a vocab.txt, without truncation or padding.

    `lowercase`: for a vocab.txt without a tokenizer_config.json that knows better. Raises
    UserError, naming the file, for anything else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a tokenizer directory or a vocab.txt")
    whole = path if path.suffix == ".json" else path / "tokenizer.json"
    words = path if path.is_file() else path / "vocab.txt"
    for file in (whole, words):
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file}: a link to nothing, expected a file")
    named = _class_said(path)
    if whole.is_file():
        return _whole(whole, named)
    if words.is_file() and named in ("", BERT):
        return _bert(words, lowercase)
    if not words.is_file() and (path / "vocab.json").is_file() and named in ("", ROBERTA):
        return _byte_level(path)
    if words.is_file() or (path / "vocab.json").is_file():
        expected = BERT if words.is_file() else ROBERTA
        raise UserError(
            f"{path}: tokenizer_class is '{named}', expected {expected} (or a tokenizer.json, with any class)"
        )
    raise UserError(
        f"{path}: no tokenizer.json, vocab.txt or vocab.json with merges.txt in it, expected one of them"
    )


def _class_said(path: Path) -> str:
    """The class that transformers would take: of tokenizer_config.json, of config.json, of its
    model_type; '' where nothing says."""
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / "config.json")
    said = read_json(directory / "tokenizer_config.json").get("tokenizer_class")
    said = said or config.get("tokenizer_class")
    name = str(said or _OF_MODELS.get(str(config.get("model_type")), "")).removesuffix("Fast")
    return _SAME.get(name, name)


def _is_plain(settings: dict[str, Any], named: str) -> bool:
    """Whether a tokenizer.json is what the class would build by itself."""
    kinds = {part: (settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    if named == BERT:
        return list(kinds.values()) == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
    return named == ROBERTA and list(kinds.values()) == [None, "ByteLevel", "BPE"]


def _whole(path: Path, named: str) -> "Tokenizer":
    """tokenizer.json; settings of the class that are also in tokenizer_config.json are taken there."""
    from tokenizers import Tokenizer, normalizers

    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a Git LFS pointer, expected the file itself (git lfs pull)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: {error}, expected a tokenizer that 'tokenizers' reads") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if _is_plain(json.loads(tokenizer.to_str()), named):
        names = role_names(path.parent, SPECIALS if named == BERT else ROBERTAS)
        if named == BERT:
            settings = _normalizer(path.parent / "tokenizer_config.json", True)
            tokenizer.normalizer = normalizers.BertNormalizer(**settings)
            _frame(tokenizer, names, path)
        else:
            _byte_pieces(tokenizer, names, path)
        there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        _add_specials(tokenizer, [name for name in names if name not in there], path.parent)
    return _with_added(tokenizer, path.parent)


def _normalizer(where: Path, lowercase: bool) -> dict[str, Any]:
    usual = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    return {theirs: _flag(where, ours, usual[ours]) for ours, theirs in NORMALIZER.items()}


def _flag(where: Path, key: str, usual: bool | None) -> bool | None:
    found = read_json(where).get(key, usual)
    if found is not None and not isinstance(found, bool):
        raise UserError(f"{where}: {key} is {found!r}, expected true or false")
    return usual if found is None else found


def wordpiece(
    vocab: dict[str, int],
    *,
    names: tuple[str, ...] = SPECIALS,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> "Tokenizer":
    """BERT's pipeline around a vocabulary. names: of its special tokens, in the order of ROLES."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=names[1], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=handle_chinese_chars
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    _frame(tokenizer, names, Path())
    return tokenizer


def _id(tokenizer: "Tokenizer", token: str, where: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"{where}: no {token} in the vocabulary, expected that special token")
    return found


def _frame(tokenizer: "Tokenizer", names: tuple[str, ...], where: Path) -> None:
    """[CLS] a [SEP] b [SEP]"""
    from tokenizers import processors

    _, _, cls, sep, _ = names
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, _id(tokenizer, token, where)) for token in (cls, sep)],
        )
    except ValueError:
        raise UserError(f"{where}: special tokens {cls!r} and {sep!r}, expected plain names") from None


def _byte_pieces(tokenizer: "Tokenizer", names: tuple[str, ...], where: Path) -> None:
    """RoBERTa's bytes, and <s> a </s></s> b </s>"""
    from tokenizers import pre_tokenizers, processors

    _, _, cls, sep, _ = names
    space = bool(_flag(where.parent / "tokenizer_config.json", "add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.post_processor = processors.RobertaProcessing(
        (sep, _id(tokenizer, sep, where)), (cls, _id(tokenizer, cls, where)), add_prefix_space=space
    )


def _bert(path: Path, lowercase: bool) -> "Tokenizer":
    """BERT's tokenizer from a vocab.txt and the JSON files beside it."""
    vocab, names = _read_words(path), role_names(path.parent, SPECIALS)
    vocab |= {token: i for token, i in _added(path.parent, vocab).items() if token in names}
    if missing := [name for name in names if name not in vocab]:
        raise UserError(
            f"{path}: no {' '.join(missing)} among its {len(vocab)} lines, expected BERT's special tokens"
        )
    settings = _normalizer(path.parent / "tokenizer_config.json", lowercase)
    tokenizer = wordpiece(vocab, names=names, **settings)
    _add_specials(tokenizer, names, path.parent)
    return _with_added(tokenizer, path.parent)


def _added(directory: Path, known: dict[str, int]) -> dict[str, int]:
    """Tokens that files beside the vocabulary add to it, by their ids."""
    config = read_json(directory / "tokenizer_config.json")
    try:
        said = dict(config.get("added_tokens_decoder") or {}).items()
        added = {token["content"]: int(i) for i, token in said}
        added = added or {t: int(i) for t, i in read_json(directory / "added_tokens.json").items()}
        if not all(isinstance(token, str) and token for token in added):
            raise TypeError
        return {t: i for t, i in sorted(added.items(), key=lambda item: item[1]) if t not in known}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise UserError(f"{directory}: added tokens that are not tokens by number, expected those") from None


def _flags(directory: Path) -> dict[str, dict[str, bool]]:
    """How tokens are found in text, where a file says so."""
    config = read_json(directory / "tokenizer_config.json")
    said: list[Any] = [*config.values(), *(config.get("added_tokens_decoder") or {}).values()]
    said += read_json(directory / "special_tokens_map.json").values()
    known = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return {
        token["content"]: {key: token[key] for key in known if isinstance(token.get(key), bool)}
        for token in said
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _add_specials(tokenizer: "Tokenizer", names: Sequence[str], directory: Path) -> None:
    """Tokens that are found whole in text, as they stand."""
    from tokenizers import AddedToken

    flags = _flags(directory)
    plain = {"normalized": False}
    tokens = [AddedToken(name, **{**plain, **flags.get(name, {}), "special": True}) for name in names]
    tokenizer.add_special_tokens(tokens)


def _with_added(tokenizer: "Tokenizer", directory: Path) -> "Tokenizer":
    """With the tokens that files beside the vocabulary add, and those that they call special."""
    from tokenizers import AddedToken

    added, flags = _added(directory, tokenizer.get_vocab(with_added_tokens=True)), _flags(directory)
    for token, i in added.items():
        tokenizer.add_tokens([AddedToken(token, **flags.get(token, {}))])
        if tokenizer.token_to_id(token) != i:
            raise UserError(
                f"{directory}: added token '{token}' has the id {i}, expected the next after the "
                f"vocabulary's ({tokenizer.token_to_id(token)})"
            )
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for name in _more_specials(directory):
        if tokenizer.token_to_id(name) is None:
            raise UserError(
                f"{directory}: special token '{name}' is not in the vocabulary, expected one that has an id"
            )
        if name not in there:
            _add_specials(tokenizer, [name], directory)
    return tokenizer


def _more_specials(directory: Path) -> list[str]:
    """Special tokens beyond the five roles."""
    said = read_json(directory / "tokenizer_config.json") | read_json(directory / "special_tokens_map.json")
    found: list[Any] = [said.get(key) for key in ("bos_token", "eos_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = said.get(key) or []
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else [more]
    names: list[Any] = [
        token.get("content") if isinstance(token, dict) else token for token in found if token
    ]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{directory}: special token {wrong[0]!r}, expected a token")
    return list(dict.fromkeys(names))


def _byte_level(directory: Path) -> "Tokenizer":
    """RoBERTa's byte-level BPE from vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    where = directory / "vocab.json"
    try:
        model = models.BPE.from_file(str(where), str(directory / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{directory}: {error}, expected vocab.json and merges.txt of a BPE") from None
    tokenizer, vocab = Tokenizer(model), read_json(where)
    names = role_names(directory, ROBERTAS)
    if missing := [name for name in names if name not in vocab]:
        raise UserError(f"{where}: no {' '.join(missing)}, expected RoBERTa's special tokens")
    lacking = sum(letter not in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
    if lacking or any(len(token) > 4 and token.endswith("</w>") for token in vocab):
        found = f"lacks {lacking} of the 256 bytes" if lacking else "marks ends of words by </w>"
        raise UserError(f"{where}: {found}, expected byte-level BPE (or a tokenizer.json, with any model)")
    tokenizer.decoder = decoders.ByteLevel()
    _byte_pieces(tokenizer, names, where)
    _add_specials(tokenizer, names, directory)
    return _with_added(tokenizer, directory)


def _read_words(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}, expected a UTF-8 file with one token a line") from None
    while lines and not lines[-1].strip():
        lines.pop()
    tokens = [line.rstrip("\r") for line in lines]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise UserError(f"{path}: token '{twice}' is there more than once, expected each token once")
    return {token: i for i, token in enumerate(tokens)}


def role_names(directory: Path, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The special tokens in the order of ROLES, as the JSON files of a tokenizer name them, else `usual`."""
    files = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    said = {key: (value, file) for file in files for key, value in read_json(file).items()}
    names = []
    for role, name in zip(ROLES, usual, strict=True):
        named, file = said.get(f"{role}_token", (None, directory))
        token = named.get("content") if isinstance(named, dict) else named
        if token is not None and not isinstance(token, str):
            raise UserError(f"{file}: {role}_token is {named!r}, expected a token")
        names.append(token or name)
    return tuple(names)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    return read_object(path, "JSON, an object") if path.is_file() else {}
