"""Defaults of the tokenizers of BERT and RoBERTa, and BERT's pipeline."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer by role."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: str


WORDPIECE_TOKENS = SpecialTokens("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BYTE_LEVEL_TOKENS = SpecialTokens("<pad>", "<unk>", "<s>", "</s>", "<mask>")

TOKEN_ROLES = SpecialTokens._fields
TOKEN_KEYS = tuple(f"{role}_token" for role in TOKEN_ROLES)
"""Their keys in tokenizer_config.json."""

BEGIN_KEY, END_KEY = "bos_token", "eos_token"
"""Keys of the tokens around a text of a decoder."""

VOCAB_TXT_CLASS, VOCAB_JSON_CLASS = "BertTokenizer", "RobertaTokenizer"
"""Classes of transformers for a vocab.txt and for a vocab.json without any settings."""

WORDPIECE_COMPONENTS = ("BertNormalizer", "BertPreTokenizer", "WordPiece")
"""`type` of normalizer, pre-tokenizer and model in BERT's tokenizer.json."""


def build_wordpiece_tokenizer(vocab: dict[str, int], *, lowercase: bool = True) -> "Tokenizer":
    """Build the WordPiece tokenizer of BERT.

    Args:
        vocab: token → id, with WORDPIECE_TOKENS.
        lowercase: lower-case texts and strip accents.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    unk, cls, sep = WORDPIECE_TOKENS.unk, WORDPIECE_TOKENS.cls, WORDPIECE_TOKENS.sep
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    added_tokens = [AddedToken(token, special=True, normalized=False) for token in WORDPIECE_TOKENS]
    tokenizer.add_special_tokens(added_tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, vocab[token]) for token in (cls, sep)],
    )
    return tokenizer
