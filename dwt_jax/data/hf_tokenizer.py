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

from dwt_jax.data.added_tokens import (
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
from dwt_jax.files import LFS_POINTER_PREFIX, is_file_or_raise, read_json_object, reject_lfs_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's
ROBERTA_SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
BERT_TOKENIZER, ROBERTA_TOKENIZER, GENERIC_TOKENIZER = (
    "BertTokenizer",
    "RobertaTokenizer",
    "PreTrainedTokenizerFast",
)
NORMALIZER_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Keys of tokenizer_config.json → of tokenizers' BertNormalizer."""
_EQUIVALENT_CLASSES = {
    **{
        f"{name}Tokenizer": BERT_TOKENIZER
        for name in ("DistilBert", "Electra", "MobileBert", "SqueezeBert", "Lxmert")
    },
    **{f"{name}Tokenizer": ROBERTA_TOKENIZER for name in ("Bart", "Longformer")},
}
_CLASS_BY_MODEL_TYPE = {"bert": BERT_TOKENIZER, "distilbert": BERT_TOKENIZER, "roberta": ROBERTA_TOKENIZER}


def load_hf_tokenizer(path: str | Path, lowercase: bool = True) -> "Tokenizer":
    """The tokenizer of a Hugging Face directory (tokenizer.json, vocab.txt, or vocab.json with
    merges.txt), a tokenizer.json or a vocab.txt, without truncation or padding.

    `lowercase`: for a vocab.txt without a tokenizer_config.json that knows better. Raises
    UserError, naming the file, for anything else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a tokenizer directory or a vocab.txt")
    directory = path if path.is_dir() else path.parent
    tokenizer_json = path if path.is_file() and path.suffix == ".json" else path / "tokenizer.json"
    vocab_txt = path if path.is_file() else path / "vocab.txt"
    vocab_json = path / "vocab.json"
    declared = _declared_class(directory)
    tokenizer_class = _EQUIVALENT_CLASSES.get(declared.removesuffix("Fast"), declared.removesuffix("Fast"))
    if is_file_or_raise(tokenizer_json):
        tokenizer = _from_tokenizer_json(tokenizer_json, tokenizer_class)
    elif is_file_or_raise(vocab_txt) and tokenizer_class in ("", BERT_TOKENIZER):
        tokenizer = _from_vocab_txt(vocab_txt, lowercase)
    elif (
        not vocab_txt.is_file()
        and is_file_or_raise(vocab_json)
        and tokenizer_class in ("", ROBERTA_TOKENIZER)
    ):
        tokenizer = _from_bpe_files(directory)
    elif vocab_txt.is_file() or vocab_json.is_file():
        expected = BERT_TOKENIZER if vocab_txt.is_file() else ROBERTA_TOKENIZER
        raise UserError(
            f"{path}: tokenizer_class is '{declared}', expected {expected} (or a tokenizer.json, with any class)"
        )
    else:
        raise UserError(
            f"{path}: no tokenizer.json, vocab.txt or vocab.json with merges.txt in it, expected one of them"
        )
    tokenizer.encode_special_tokens = bool(
        _read_flag(directory / TOKENIZER_CONFIG, "split_special_tokens", False)
    )
    return tokenizer


def _declared_class(directory: Path) -> str:
    """The class that transformers would take: of tokenizer_config.json, of config.json, of its
    model_type; '' where nothing says."""
    for file in (directory / TOKENIZER_CONFIG, directory / "config.json"):
        if class_name := read_json_or_empty(file).get("tokenizer_class"):
            if not isinstance(class_name, str):
                raise UserError(f"{file}: tokenizer_class is {class_name!r}, expected a name")
            return class_name
    return _CLASS_BY_MODEL_TYPE.get(str(read_json_or_empty(directory / "config.json").get("model_type")), "")


def _is_standard_pipeline(settings: dict[str, Any], tokenizer_class: str) -> bool:
    """Whether a tokenizer.json is what the class would build by itself."""
    kinds = {part: (settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")}
    if tokenizer_class == BERT_TOKENIZER:
        return list(kinds.values()) == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
    return tokenizer_class == ROBERTA_TOKENIZER and list(kinds.values()) == [None, "ByteLevel", "BPE"]


def _from_tokenizer_json(path: Path, tokenizer_class: str) -> "Tokenizer":
    """tokenizer.json as it is; of one that is its class's own, the vocabulary and the added tokens."""
    from tokenizers import Tokenizer

    expected = "a tokenizer that 'tokenizers' reads"
    check_charsmaps(read_json_object(path, expected).get("normalizer"), path)
    with wrap_tokenizer_errors(path, expected):
        tokenizer = Tokenizer.from_file(str(path))
    check_token_ids(tokenizer.get_vocab(with_added_tokens=True), path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = json.loads(tokenizer.to_str())
    if not _is_standard_pipeline(settings, tokenizer_class):
        check_tokenizer_parts(settings, path)
        register_added_tokens(tokenizer, path.parent, {})
        return tokenizer
    added_tokens = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    if tokenizer_class == BERT_TOKENIZER:
        return _build_bert_tokenizer(vocab, path, added_tokens=added_tokens)
    return _build_roberta_tokenizer(
        vocab, [(a, b) for a, b in settings["model"]["merges"]], path, added_tokens
    )


def _normalizer_options(path: Path, lowercase: bool) -> dict[str, Any]:
    defaults = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
    return {option: _read_flag(path, key, defaults[key]) for key, option in NORMALIZER_KEYS.items()}


def _read_flag(path: Path, key: str, default: bool | None) -> bool | None:
    value = read_json_or_empty(path).get(key, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r}, expected true or false")
    return default if value is None else value


# The two classes


def build_wordpiece_tokenizer(
    vocab: dict[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> "Tokenizer":
    """BERT's pipeline around a vocabulary that has BERT's special tokens."""
    from tokenizers import AddedToken

    tokenizer = _wordpiece_pipeline(
        vocab, BERT_SPECIAL_TOKENS[1], lowercase, strip_accents, handle_chinese_chars
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in BERT_SPECIAL_TOKENS]
    )
    _set_template(tokenizer, BERT_SPECIAL_TOKENS, Path())
    return tokenizer


def _wordpiece_pipeline(
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


def _set_template(tokenizer: "Tokenizer", names: tuple[str, ...], path: Path) -> None:
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
        raise UserError(f"{path}: special tokens {cls!r} and {sep!r}, expected plain names") from None


def _build_bert_tokenizer(
    vocab: dict[str, int], path: Path, lowercase: bool = True, added_tokens: AddedTokensById | None = None
) -> "Tokenizer":
    """BERT's tokenizer around a vocabulary, with what the files beside `where` say."""
    directory = path.parent
    names, settings = (
        read_special_tokens(directory, BERT_SPECIAL_TOKENS),
        _normalizer_options(directory / TOKENIZER_CONFIG, lowercase),
    )
    if names[1] not in vocab:
        raise UserError(f"{path}: no {names[1]} in the vocabulary, expected the token of what is unknown")
    tokenizer = _wordpiece_pipeline(vocab, names[1], **settings)
    register_added_tokens(tokenizer, directory, dict(zip(TOKEN_KEYS, names, strict=True)), added_tokens)
    _set_template(tokenizer, names, path)
    return tokenizer


def _build_roberta_tokenizer(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    path: Path,
    added_tokens: AddedTokensById | None = None,
) -> "Tokenizer":
    """RoBERTa's byte-level BPE: <s> a </s></s> b </s>"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    directory = path.parent
    names, prefix_space = (
        read_special_tokens(directory, ROBERTA_SPECIAL_TOKENS),
        bool(_read_flag(directory / TOKENIZER_CONFIG, "add_prefix_space", False)),
    )
    with wrap_tokenizer_errors(directory, "vocab.json and merges.txt of a BPE"):
        tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    bos_eos = {"bos_token": "<s>", "eos_token": "</s>"}
    defaults = {key: token for key, token in bos_eos.items() if token in vocab}
    register_added_tokens(
        tokenizer, directory, defaults | dict(zip(TOKEN_KEYS, names, strict=True)), added_tokens
    )
    ids, (_, _, cls, sep, _) = tokenizer.get_vocab(), names
    ends = (sep, ids[sep]), (cls, ids[cls])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=prefix_space)
    return tokenizer


def _from_vocab_txt(path: Path, lowercase: bool) -> "Tokenizer":
    """BERT's tokenizer from a vocab.txt."""
    vocab, names = _read_vocab_txt(path), read_special_tokens(path.parent, BERT_SPECIAL_TOKENS)
    added_tokens = [token for _, token, _ in list_added_tokens(path.parent, {})]
    if missing := [name for name in names if name not in vocab and name not in added_tokens]:
        raise UserError(
            f"{path}: no {' '.join(missing)} among its {len(vocab)} lines, expected BERT's special tokens"
        )
    return _build_bert_tokenizer(vocab, path, lowercase)


def _read_vocab_txt(path: Path) -> dict[str, int]:
    try:
        data = path.read_bytes()
        reject_lfs_pointer(path, data)
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}, expected a UTF-8 file with one token a line") from None
    while lines and not lines[-1].strip():
        lines.pop()
    tokens = [line.rstrip() for line in lines]
    duplicates = [token for token, count in Counter(tokens).items() if count > 1 and token]
    if duplicates:
        raise UserError(f"{path}: token '{duplicates[0]}' is there more than once, expected each token once")
    return {token: i for i, token in enumerate(tokens)}


def _from_bpe_files(directory: Path) -> "Tokenizer":
    """RoBERTa's tokenizer from a vocab.json and a merges.txt."""
    from tokenizers import models, pre_tokenizers

    vocab_path, merges_path = directory / "vocab.json", directory / "merges.txt"
    read_json_object(vocab_path, "JSON, an object")
    names = read_special_tokens(directory, ROBERTA_SPECIAL_TOKENS)
    if is_file_or_raise(merges_path):
        with merges_path.open("rb") as file:
            reject_lfs_pointer(merges_path, file.read(len(LFS_POINTER_PREFIX)))
    with wrap_tokenizer_errors(directory, "vocab.json and merges.txt of a BPE"):
        vocab, pairs = models.BPE.read_file(str(vocab_path), str(merges_path))
    added_tokens = [token for _, token, _ in list_added_tokens(directory, {})]
    if missing := [name for name in names if name not in vocab and name not in added_tokens]:
        raise UserError(f"{vocab_path}: no {' '.join(missing)}, expected RoBERTa's special tokens")
    num_missing = sum(letter not in vocab for letter in pre_tokenizers.ByteLevel.alphabet())
    if num_missing or any(len(token) > 4 and token.endswith("</w>") for token in vocab):
        problem = f"lacks {num_missing} of the 256 bytes" if num_missing else "marks ends of words by </w>"
        raise UserError(
            f"{vocab_path}: {problem}, expected byte-level BPE (or a tokenizer.json, with any model)"
        )
    return _build_roberta_tokenizer(vocab, pairs, vocab_path)
