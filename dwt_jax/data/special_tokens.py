"""The special tokens of a tokenizer by role, and their usual names."""

from typing import NamedTuple


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer by role."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: str


BERT_TOKENS = SpecialTokens("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = SpecialTokens("<pad>", "<unk>", "<s>", "</s>", "<mask>")

TOKEN_ROLES = SpecialTokens._fields
TOKEN_KEYS = tuple(f"{role}_token" for role in TOKEN_ROLES)
"""Their keys in tokenizer_config.json."""
