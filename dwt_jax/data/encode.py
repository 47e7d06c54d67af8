"""One chunk of documents into token ids: the part of `prepare` that runs on all cores.

Imports neither jax nor anything that does: a worker process starts in a fraction of a second.
"""

import functools
import itertools
import os
import signal
import threading
from typing import Literal, NamedTuple

import numpy as np

from dwt_jax.data import cached_wordpiece
from dwt_jax.data import tokenizer as tokenizers_
from dwt_jax.data.packing import Sentences
from dwt_jax.data.sentence_splitter import split_sentences
from dwt_jax.data.sources import fingerprint
from dwt_jax.data.tokenizer_checks import refusing


class Recipe(NamedTuple):
    """All that decides what becomes of a document."""

    tokenizer: str  # directory
    tokenizer_digest: str
    length: int
    mode: Literal["packed", "sentence"]
    keep_every: int
    held_out: float


class Encoded(NamedTuple):
    """What one chunk becomes. Documents are numbered from 0 in each split; those without a
    token have no number."""

    train: Sentences
    held_out: Sentences
    fingerprints: bytes  # 32 for each document of the chunk
    text_bytes: int  # of UTF-8


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def is_held_out(fingerprint_: bytes, share: float) -> bool:
    """By the document's text alone, so that neither order nor company moves it between splits,
    and duplicates stay together."""
    return int.from_bytes(fingerprint_[:8], "big") / 2**64 < share


def encode(texts: list[str], recipe: Recipe) -> Encoded:
    """Documents split into sentences, thinned out, tokenised without special tokens and cut.

    Raises UserError where the tokenizer fails on a text.
    """
    to_ids, dtype, space = _opened(recipe)
    prints = [fingerprint(text) for text in texts]
    sentences: list[str] = []
    owners: list[int] = []
    for number, (text, print_) in enumerate(zip(texts, prints, strict=True)):
        kept = split_sentences(text)
        if space:  # byte-level tokenizers see a word's beginning by the space before it
            kept[1:] = [space + sentence for sentence in kept[1:]]
        if recipe.keep_every > 1:
            phase = int.from_bytes(print_[8:16], "big")
            kept = [s for i, s in enumerate(kept) if (i + phase) % recipe.keep_every == 0]
        sentences += kept
        owners += [number] * len(kept)
    with refusing("data.tokenizer.path", "a tokenizer that encodes any text"):
        ids = to_ids(sentences)
    lengths = np.array([len(sentence) for sentence in ids], np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum()))
    whole = Sentences(tokens, lengths, np.array(owners, np.int64))
    pieces = (_cut if recipe.mode == "packed" else _shorten)(whole, recipe.length - 2)
    held_out = np.array([is_held_out(print_, recipe.held_out) for print_ in prints], bool)
    return Encoded(
        train=_only(pieces, ~held_out[pieces.documents]),
        held_out=_only(pieces, held_out[pieces.documents]),
        fingerprints=b"".join(prints),
        text_bytes=sum(len(text.encode()) for text in texts),
    )


@functools.lru_cache(maxsize=1)
def _opened(recipe: Recipe) -> tuple[cached_wordpiece.Encode, np.dtype, str]:
    tokenizer = tokenizers_.load(recipe.tokenizer)
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is five characters, not the end of a row
    words = tokenizers_.vocabulary(recipe.tokenizer)
    return (
        cached_wordpiece.encoder(tokenizer),
        token_dtype(len(words)),
        " " if words.starts_words == "Ġ" else "",
    )


def _cut(sentences: Sentences, room: int) -> Sentences:
    """Sentences of more than `room` tokens in pieces; those of none left out."""
    counts = -(-sentences.lengths // room)
    lengths = np.full(counts.sum(), room, np.int64)
    some = counts > 0
    lengths[np.cumsum(counts)[some] - 1] = (sentences.lengths - (counts - 1) * room)[some]
    return Sentences(sentences.tokens, lengths, np.repeat(sentences.documents, counts))


def _shorten(sentences: Sentences, room: int) -> Sentences:
    """The first `room` tokens of each sentence; those of none left out."""
    offsets = np.cumsum(sentences.lengths) - sentences.lengths
    position = np.arange(len(sentences.tokens)) - np.repeat(offsets, sentences.lengths)
    some = sentences.lengths > 0
    lengths = np.minimum(sentences.lengths, room)
    return Sentences(sentences.tokens[position < room], lengths[some], sentences.documents[some])


def _only(sentences: Sentences, chosen: np.ndarray) -> Sentences:
    """The chosen sentences, their documents numbered from 0 without gaps. chosen: bool [S]"""
    documents = sentences.documents[chosen]
    number = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)
    tokens = sentences.tokens[np.repeat(chosen, sentences.lengths)]
    return Sentences(tokens, sentences.lengths[chosen], number)


def start_worker() -> None:
    """What each worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent killed with -9 tells nobody; workers would wait for it for ever."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
