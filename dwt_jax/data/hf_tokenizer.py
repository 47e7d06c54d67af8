"""Tokenizers of Hugging Face directories, read so that the ids are those of transformers.

transformers builds a BertTokenizer and a RobertaTokenizer from their vocabulary, its added tokens and the
settings in tokenizer_config.json; so does this. Any other class, and a tokenizer.json with other parts than
its class has, is taken as it is here (where transformers would build a class of its own anew, its
settings may win there).
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.data.added_tokens import CONFIG, KEYS, Own, add, numbered, read_json, role_names
from dwt_jax.data.tokenizer_checks import check_charsmaps, check_ids, check_parts, refusing
from dwt_jax.errors import UserError
from dwt_jax.files import POINTER, present, read_object, refuse_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's
ROBERTAS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
BERT, ROBERTA, AS_IT_IS = "BertTokenizer", "RobertaTokenizer", "PreTrainedTokenizerFast"
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Keys of tokenizer_config.json → of tokenizers' BertNormalizer."""
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
    directory = path if path.is_dir() else path.parent
    whole = path if path.is_file() and path.suffix == ".json" else path / "tokenizer.json"
    words = path if path.is_file() else path / "vocab.txt"
    pieces = path / "vocab.json"
    said = _class_said(directory)
    named = _SAME.get(said.removesuffix("Fast"), said.removesuffix("Fast"))
    if present(whole):
        tokenizer = _whole(whole, named)
    elif present(words) and named in ("", BERT):
        tokenizer = _of_words(words, lowercase)
    elif not words.is_file() and present(pieces) and named in ("", ROBERTA):
        tokenizer = _of_pieces(directory)
    elif words.is_file() or pieces.is_file():
        expected = BERT if words.is_file() else ROBERTA
        raise UserError(
            f"{path}: tokenizer_class is '{said}', expected {expected} (or a tokenizer.json, with any class)"
        )
    else:
        raise UserError(
            f"{path}: no tokenizer.json, vocab.txt or vocab.json with merges.txt in it, expected one of them"
        )
    tokenizer.encode_special_tokens = bool(_flag(directory / CONFIG, "split_special_tokens", False))
    return tokenizer


def _class_said(directory: Path) -> str:
    """The class that transformers would take: of tokenizer_config.json, of config.json, of its
    model_type; '' where nothing says."""
    for file in (directory / CONFIG, directory / "config.json"):
        if said := read_json(file).get("tokenizer_class"):
            if not isinstance(said, str):
                raise UserError(f"{file}: tokenizer_class is {said!r}, expected a name")
            return said
    return _OF_MODELS.get(str(read_json(directory / "config.json").get("model_type")), "")


def _is_plain(settings: dict[str, Any], named: str) -> bool:
    """Whether a tokenizer.json is what the class would build by itself."""
    kinds = {part: (settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    if named == BERT:
        return list(kinds.values()) == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
    return named == ROBERTA and list(kinds.values()) == [None, "ByteLevel", "BPE"]


def _whole(path: Path, named: str) -> "Tokenizer":
    """tokenizer.json as it is; of one that is its class's own, the vocabulary and the added tokens."""
    from tokenizers import Tokenizer

    wanted = "a tokenizer that 'tokenizers' reads"
    check_charsmaps(read_object(path, wanted).get("normalizer"), path)
    with refusing(path, wanted):
        tokenizer = Tokenizer.from_file(str(path))
    check_ids(tokenizer.get_vocab(with_added_tokens=True), path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.loads(tokenizer.to_str())
    if not _is_plain(settings, named):
        check_parts(settings, path)
        add(tokenizer, path.parent, {})
        return tokenizer
    own = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if named == BERT:
        return _bert(vocab, path, own=own)
    return _roberta(vocab, [(a, b) for a, b in settings["model"]["merges"]], path, own)


def _normalizer(where: Path, lowercase: bool) -> dict[str, Any]:
    usual = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    return {theirs: _flag(where, ours, usual[ours]) for ours, theirs in NORMALIZER.items()}


def _flag(where: Path, key: str, usual: bool | None) -> bool | None:
    found = read_json(where).get(key, usual)
    if found is not None and not isinstance(found, bool):
        raise UserError(f"{where}: {key} is {found!r}, expected true or false")
    return usual if found is None else found


# The two classes


def wordpiece(
    vocab: dict[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> "Tokenizer":
    """BERT's pipeline around a vocabulary that has BERT's special tokens."""
    from tokenizers import AddedToken

    tokenizer = _words(vocab, SPECIALS[1], lowercase, strip_accents, handle_chinese_chars)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    _frame(tokenizer, SPECIALS, Path())
    return tokenizer


def _words(
    vocab: dict[str, int], unk: str, lowercase: bool, strip_accents: bool | None, handle_chinese_chars: bool
) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=handle_chinese_chars
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _frame(tokenizer: "Tokenizer", names: tuple[str, ...], where: Path) -> None:
    """[CLS] a [SEP] b [SEP]"""
    from tokenizers import processors

    _, _, cls, sep, _ = names
    try:
        if "$" in (cls[0], sep[0]):  # the library's own sign for the text
            raise ValueError
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
        )
    except ValueError:
        raise UserError(f"{where}: special tokens {cls!r} and {sep!r}, expected plain names") from None


def _bert(vocab: dict[str, int], where: Path, lowercase: bool = True, own: Own | None = None) -> "Tokenizer":
    """BERT's tokenizer around a vocabulary, with what the files beside `where` say."""
    directory = where.parent
    names, settings = role_names(directory, SPECIALS), _normalizer(directory / CONFIG, lowercase)
    if names[1] not in vocab:
        raise UserError(f"{where}: no {names[1]} in the vocabulary, expected the token of what is unknown")
    tokenizer = _words(vocab, names[1], **settings)
    add(tokenizer, directory, dict(zip(KEYS, names, strict=True)), own)
    _frame(tokenizer, names, where)
    return tokenizer


def _roberta(
    vocab: dict[str, int], merges: list[tuple[str, str]], where: Path, own: Own | None = None
) -> "Tokenizer":
    """RoBERTa's byte-level BPE: <s> a </s></s> b </s>"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    directory = where.parent
    names, space = (
        role_names(directory, ROBERTAS),
        bool(_flag(directory / CONFIG, "add_prefix_space", False)),
    )
    with refusing(directory, "vocab.json and merges.txt of a BPE"):
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    around = {"bos_token": "<s>", "eos_token": "</s>"}
    usual = {key: token for key, token in around.items() if token in vocab}
    add(tokenizer, directory, usual | dict(zip(KEYS, names, strict=True)), own)
    ids, (_, _, cls, sep, _) = tokenizer.get_vocab(), names
    ends = (sep, ids[sep]), (cls, ids[cls])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=space)
    return tokenizer


def _of_words(path: Path, lowercase: bool) -> "Tokenizer":
    """BERT's tokenizer from a vocab.txt."""
    vocab, names = _read_words(path), role_names(path.parent, SPECIALS)
    numbers = [token for _, token, _ in numbered(path.parent, {})]
    if missing := [name for name in names if name not in vocab and name not in numbers]:
        raise UserError(
            f"{path}: no {' '.join(missing)} among its {len(vocab)} lines, expected BERT's special tokens"
        )
    return _bert(vocab, path, lowercase)


def _read_words(path: Path) -> dict[str, int]:
    try:
        data = path.read_bytes()
        refuse_pointer(path, data)
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}, expected a UTF-8 file with one token a line") from None
    while lines and not lines[-1].strip():
        lines.pop()
    tokens = [line.rstrip() for line in lines]
    twice = [token for token, count in Counter(tokens).items() if count > 1 and token]
    if twice:
        raise UserError(f"{path}: token '{twice[0]}' is there more than once, expected each token once")
    return {token: i for i, token in enumerate(tokens)}


def _of_pieces(directory: Path) -> "Tokenizer":
    """RoBERTa's tokenizer from a vocab.json and a merges.txt."""
    from tokenizers import models, pre_tokenizers

    where, merges = directory / "vocab.json", directory / "merges.txt"
    read_object(where, "JSON, an object")
    names = role_names(directory, ROBERTAS)
    if present(merges):
        with merges.open("rb") as file:
            refuse_pointer(merges, file.read(len(POINTER)))
    with refusing(directory, "vocab.json and merges.txt of a BPE"):
        vocab, pairs = models.BPE.read_file(str(where), str(merges))
    numbers = [token for _, token, _ in numbered(directory, {})]
    if missing := [name for name in names if name not in vocab and name not in numbers]:
        raise UserError(f"{where}: no {' '.join(missing)}, expected RoBERTa's special tokens")
    lacking = sum(letter not in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
    if lacking or any(len(token) > 4 and token.endswith("</w>") for token in vocab):
        found = f"lacks {lacking} of the 256 bytes" if lacking else "marks ends of words by </w>"
        raise UserError(f"{where}: {found}, expected byte-level BPE (or a tokenizer.json, with any model)")
    return _roberta(vocab, pairs, where)
