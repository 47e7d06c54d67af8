"""WordPiece tokenization with a cache: each distinct word is tokenized once.

With the components of WORDPIECE_COMPONENTS, the ids of a text are the concatenated ids of its
parts between spaces and ASCII punctuation. A dictionary from parts to ids, filled by the tokenizer itself,
therefore gives the same ids several times faster.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dwt_jax.models.tokenizer_defaults import WORDPIECE_COMPONENTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_CACHED_PARTS = 1 << 19  # about 120 MB in each process when full
_PART_PATTERN = re.compile(
    r"[!-/:-@\[-`{-~]|[^ !-/:-@\[-`{-~]+"
)  # one ASCII punctuation mark, or everything up to the next mark or space

EncodeFn = Callable[[Sequence[str]], list[list[int]]]


class _PartIdCache(dict[str, list[int]]):
    """Part → ids. Missing parts are tokenized, and stored until the cache is full."""

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer

    def __missing__(self, part: str) -> list[int]:
        ids = self._tokenizer.encode(part, add_special_tokens=False).ids
        if len(self) < MAX_CACHED_PARTS:
            self[part] = ids
        return ids


def make_text_encoder(tokenizer: "Tokenizer") -> EncodeFn:
    """Return a function from texts to their token ids, without special tokens.

    The ids are those of `tokenizer`; they are computed with a cache where that gives the same ids.
    """
    if not can_encode_parts(tokenizer):
        return lambda texts: [
            encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    cache = _PartIdCache(tokenizer)
    find_parts, lookup, flatten = _PART_PATTERN.findall, cache.__getitem__, itertools.chain.from_iterable
    return lambda texts: [list(flatten(map(lookup, find_parts(text)))) for text in texts]


def can_encode_parts(tokenizer: "Tokenizer") -> bool:
    """Return whether no component of the pipeline looks across a space or a punctuation mark."""
    settings = json.loads(tokenizer.to_str())
    types = tuple((settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model"))
    added_tokens = tokenizer.get_added_tokens_decoder().values()
    all_special = tokenizer.encode_special_tokens and all(token.special for token in added_tokens)
    return types == WORDPIECE_COMPONENTS and all_special
