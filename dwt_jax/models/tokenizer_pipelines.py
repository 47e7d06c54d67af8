"""Tokenizer pipelines of the model families, as transformers' tokenizer classes build them.

Data and small builder functions. `data/hf_tokenizer.py` reads a tokenizer's files and calls these.
Imports neither jax nor, before a builder runs, `tokenizers`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import PostProcessor


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer by role."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: str


Merges = Sequence[tuple[str, str]]
Flags = Mapping[str, bool | None]  # keys of tokenizer_config.json and their values
BuildFn = Callable[[dict[str, int], Merges, SpecialTokens, Flags], "Tokenizer"]
PostProcessorFn = Callable[["Tokenizer", SpecialTokens, Flags], "PostProcessor"]
ComponentTypes = tuple[str | None, str | None, str | None]


@dataclass(frozen=True, eq=False)
class TokenizerPipeline:
    """How one kind of tokenizer is built around a vocabulary."""

    tokenizer_class: str  # of transformers
    vocab_files: str  # what the vocabulary is read from, for messages
    special_tokens: SpecialTokens  # where the tokenizer's files name no others
    optional_tokens: Mapping[str, str]  # further special tokens by key, for vocabularies that have them
    unk_in_vocab: bool  # the vocabulary itself must have the unknown token; added tokens do not count
    component_types: ComponentTypes  # `type` of normalizer, pre-tokenizer and model in tokenizer.json
    flags: Flags  # keys of tokenizer_config.json that change the pipeline, with their defaults
    build: BuildFn  # a tokenizer without added tokens and post-processor
    post_processor: PostProcessorFn  # after the special tokens have ids; ValueError for unusable names


def component_types(tokenizer_json: Mapping[str, Any]) -> ComponentTypes:
    """Return the types of the normalizer, the pre-tokenizer and the model of a tokenizer.json."""
    normalizer, pre_tokenizer, model = (
        (tokenizer_json[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")
    )
    return normalizer, pre_tokenizer, model


def _build_wordpiece(
    vocab: dict[str, int], merges: Merges, special_tokens: SpecialTokens, flags: Flags
) -> "Tokenizer":
    """merges: ignored, WordPiece has none."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocab, unk_token=special_tokens.unk, max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(flags["do_lower_case"]),
        strip_accents=flags["strip_accents"],
        handle_chinese_chars=bool(flags["tokenize_chinese_chars"]),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _wordpiece_post_processor(
    tokenizer: "Tokenizer", special_tokens: SpecialTokens, flags: Flags
) -> "PostProcessor":
    """[CLS] A [SEP] B [SEP]"""
    from tokenizers import processors

    cls, sep = special_tokens.cls, special_tokens.sep
    if cls.startswith("$") or sep.startswith("$"):
        raise ValueError("'$' marks the text in a template")
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def _build_byte_level_bpe(
    vocab: dict[str, int], merges: Merges, special_tokens: SpecialTokens, flags: Flags
) -> "Tokenizer":
    """special_tokens: ignored, every byte has a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(flags["add_prefix_space"]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_level_post_processor(
    tokenizer: "Tokenizer", special_tokens: SpecialTokens, flags: Flags
) -> "PostProcessor":
    """<s> A </s></s> B </s>"""
    from tokenizers import processors

    vocab, cls, sep = tokenizer.get_vocab(), special_tokens.cls, special_tokens.sep
    return processors.RobertaProcessing(
        (sep, vocab[sep]), (cls, vocab[cls]), add_prefix_space=bool(flags["add_prefix_space"])
    )


WORDPIECE = TokenizerPipeline(
    tokenizer_class="BertTokenizer",
    vocab_files="a vocab.txt",
    special_tokens=SpecialTokens("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    optional_tokens={},
    unk_in_vocab=True,
    component_types=("BertNormalizer", "BertPreTokenizer", "WordPiece"),
    flags={"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
    build=_build_wordpiece,
    post_processor=_wordpiece_post_processor,
)
BYTE_LEVEL_BPE = TokenizerPipeline(
    tokenizer_class="RobertaTokenizer",
    vocab_files="vocab.json and merges.txt of a BPE",
    special_tokens=SpecialTokens("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    optional_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    unk_in_vocab=False,
    component_types=(None, "ByteLevel", "BPE"),
    flags={"add_prefix_space": False},
    build=_build_byte_level_bpe,
    post_processor=_byte_level_post_processor,
)

PIPELINES: dict[str, TokenizerPipeline] = {
    **{
        f"{family}Tokenizer": WORDPIECE
        for family in ("Bert", "DistilBert", "Electra", "MobileBert", "SqueezeBert", "Lxmert")
    },
    **{f"{family}Tokenizer": BYTE_LEVEL_BPE for family in ("Roberta", "Bart", "Longformer")},
}
"""Tokenizer classes, without the suffix `Fast`, and their pipelines."""
TOKENIZER_CLASSES = {
    "bert": WORDPIECE.tokenizer_class,
    "distilbert": WORDPIECE.tokenizer_class,
    "roberta": BYTE_LEVEL_BPE.tokenizer_class,
    "camembert": "CamembertTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
"""The tokenizer class of each model_type, for directories that name none."""
