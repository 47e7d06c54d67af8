"""BERT's tokenisation with a memory: each distinct word is taken apart once.

Behind BERT's normaliser and pre-tokeniser a text's ids are those of its parts between spaces
and ASCII punctuation, one after the other. So a dictionary of the parts seen so far, filled by
the tokenizer itself, gives the same ids several times faster.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CACHED_PARTS = 1 << 19  # parts; some 120 MB in each process if they are ever so many
_PART_PATTERN = re.compile(
    r"[!-/:-@\[-`{-~]|[^ !-/:-@\[-`{-~]+"
)  # one ASCII punctuation mark, or all up to the next

EncodeFn = Callable[[Sequence[str]], list[list[int]]]


class _PartIdCache(dict[str, list[int]]):
    """Part → ids; what is not there yet is asked of the tokenizer."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer

    def __missing__(self, part: str) -> list[int]:
        ids = self._tokenizer.encode(part, add_special_tokens=False).ids
        if len(self) < MAX_CACHED_PARTS:
            self[part] = ids
        return ids


def make_text_encoder(tokenizer: "Tokenizer") -> EncodeFn:
    """A function from texts to their ids, without special tokens: the tokenizer's own, in the
    fastest way that gives exactly its ids."""
    if not _is_bert_pipeline(tokenizer):
        return lambda texts: [
            e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    cache = _PartIdCache(tokenizer)
    find_parts, lookup, flatten = _PART_PATTERN.findall, cache.__getitem__, itertools.chain.from_iterable
    return lambda texts: [list(flatten(map(lookup, find_parts(text)))) for text in texts]


def _is_bert_pipeline(tokenizer: "Tokenizer") -> bool:
    """Whether nothing in the pipeline looks across a space or a punctuation mark."""
    settings = json.loads(tokenizer.to_str())
    kinds = [(settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    all_special = tokenizer.encode_special_tokens and all(token.special for token in added_tokens)
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and all_special
