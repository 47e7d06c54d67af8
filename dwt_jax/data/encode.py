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
from dwt_jax.data.sources import document_fingerprint
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors


class EncodeConfig(NamedTuple):
    """All that decides what becomes of a document."""

    tokenizer: str  # directory
    tokenizer_digest: str
    length: int
    row_mode: Literal["packed", "sentence"]
    sentence_stride: int
    validation_fraction: float


class EncodedChunk(NamedTuple):
    """What one chunk becomes. Documents are numbered from 0 in each split; those without a
    token have no number."""

    train: Sentences
    held_out: Sentences
    fingerprints: bytes  # 32 for each document of the chunk
    text_bytes: int  # of UTF-8


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def is_held_out(text_fingerprint: bytes, fraction: float) -> bool:
    """By the document's text alone, so that neither order nor company moves it between splits,
    and duplicates stay together."""
    return int.from_bytes(text_fingerprint[:8], "big") / 2**64 < fraction


def encode_chunk(texts: list[str], config: EncodeConfig) -> EncodedChunk:
    """Documents split into sentences, thinned out, tokenised without special tokens and cut.

    Raises UserError where the tokenizer fails on a text.
    """
    to_ids, dtype, space = _load_encode_fn(config)
    fingerprints = [document_fingerprint(text) for text in texts]
    sentences: list[str] = []
    document_ids: list[int] = []
    for number, (text, text_fingerprint) in enumerate(zip(texts, fingerprints, strict=True)):
        document_sentences = split_sentences(text)
        if space:  # byte-level tokenizers see a word's beginning by the space before it
            document_sentences[1:] = [space + sentence for sentence in document_sentences[1:]]
        if config.sentence_stride > 1:
            phase = int.from_bytes(text_fingerprint[8:16], "big")
            document_sentences = [
                s for i, s in enumerate(document_sentences) if (i + phase) % config.sentence_stride == 0
            ]
        sentences += document_sentences
        document_ids += [number] * len(document_sentences)
    with wrap_tokenizer_errors("data.tokenizer.path", "a tokenizer that encodes any text"):
        ids = to_ids(sentences)
    lengths = np.array([len(sentence) for sentence in ids], np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum()))
    all_sentences = Sentences(tokens, lengths, np.array(document_ids, np.int64))
    pieces = (_split_long_sentences if config.row_mode == "packed" else _truncate_sentences)(
        all_sentences, config.length - 2
    )
    held_out = np.array(
        [is_held_out(text_fingerprint, config.validation_fraction) for text_fingerprint in fingerprints], bool
    )
    return EncodedChunk(
        train=_select_sentences(pieces, ~held_out[pieces.documents]),
        held_out=_select_sentences(pieces, held_out[pieces.documents]),
        fingerprints=b"".join(fingerprints),
        text_bytes=sum(len(text.encode()) for text in texts),
    )


@functools.lru_cache(maxsize=1)
def _load_encode_fn(config: EncodeConfig) -> tuple[cached_wordpiece.EncodeFn, np.dtype, str]:
    tokenizer = tokenizers_.load_hf_tokenizer(config.tokenizer)
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is five characters, not the end of a row
    vocab = tokenizers_.load_vocabulary(config.tokenizer)
    return (
        cached_wordpiece.make_text_encoder(tokenizer),
        token_dtype(len(vocab)),
        " " if vocab.word_prefix == "Ġ" else "",
    )


def _split_long_sentences(sentences: Sentences, max_tokens: int) -> Sentences:
    """Sentences of more than `room` tokens in pieces; those of none left out."""
    counts = -(-sentences.lengths // max_tokens)
    lengths = np.full(counts.sum(), max_tokens, np.int64)
    nonempty = counts > 0
    lengths[np.cumsum(counts)[nonempty] - 1] = (sentences.lengths - (counts - 1) * max_tokens)[nonempty]
    return Sentences(sentences.tokens, lengths, np.repeat(sentences.documents, counts))


def _truncate_sentences(sentences: Sentences, max_tokens: int) -> Sentences:
    """The first `room` tokens of each sentence; those of none left out."""
    offsets = np.cumsum(sentences.lengths) - sentences.lengths
    position = np.arange(len(sentences.tokens)) - np.repeat(offsets, sentences.lengths)
    nonempty = sentences.lengths > 0
    lengths = np.minimum(sentences.lengths, max_tokens)
    return Sentences(
        sentences.tokens[position < max_tokens], lengths[nonempty], sentences.documents[nonempty]
    )


def _select_sentences(sentences: Sentences, mask: np.ndarray) -> Sentences:
    """The chosen sentences, their documents numbered from 0 without gaps. chosen: bool [S]"""
    documents = sentences.documents[mask]
    document_ids = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)
    tokens = sentences.tokens[np.repeat(mask, sentences.lengths)]
    return Sentences(tokens, sentences.lengths[mask], document_ids)


def init_worker() -> None:
    """What each worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent killed with -9 tells nobody; workers would wait for it for ever."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
