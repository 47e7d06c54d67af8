"""Encode one chunk of documents: the part of `dwt prepare` that runs in worker processes.

Imports neither jax nor any module that does, so that a worker starts in a fraction of a second.
"""

import functools
import os
import signal
import threading
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dwt_jax.config import RowMode
from dwt_jax.data.cached_wordpiece import EncodeFn, can_encode_parts, make_text_encoder
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.packing import Spans
from dwt_jax.data.sentence_splitter import cut_pieces, split_sentences
from dwt_jax.data.sources import document_fingerprint
from dwt_jax.data.splits import split_document
from dwt_jax.data.text_checks import TextCounts, count_text_bytes, count_visible
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.data.tokenizer_checks import wrap_tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The words at which wrapped rows are cut. A change of these numbers changes the rows: raise FORMAT_VERSION.
MIN_SEGMENT_TOKENS = 4  # of text, at the beginning and the end of a document
MAX_WORD_TOKENS = 8  # a longer word may be cut
# The tokenizer takes 100 bytes and more for each character: a longer sentence is cut, and no more are encoded
# at once.
MAX_SENTENCE_CHARS = 1 << 18


class EncodeConfig(NamedTuple):
    """Everything that the encoding of a document depends on, besides its text."""

    tokenizer: str  # directory
    tokenizer_digest: str
    length: int  # tokens of a row, with special tokens
    row_mode: RowMode
    sentence_stride: int
    validation_fraction: float
    by_parts: bool = False  # hold out the last part of each document


class EncodedChunk(NamedTuple):
    """One encoded chunk. Documents are numbered from 0 in each split; those without tokens have no number."""

    train: Spans
    held_out: Spans
    fingerprints: bytes  # 32 bytes for each document of the chunk
    text_bytes: int  # of UTF-8
    train_bytes: int  # `count_text_bytes` of the text in `train`
    held_out_bytes: int  # the same of `held_out`
    counts: TextCounts


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype in which token ids are stored."""
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def encode_chunk(texts: list[str], config: EncodeConfig) -> EncodedChunk:
    """Divide documents into splits and sentences, apply the stride, tokenize, and cut to spans.

    Args:
        texts: documents.
        config: its tokenizer is loaded once per process.

    Raises:
        UserError: if the tokenizer fails on a text.
    """
    encode_texts, dtype, spaced, continuation, by_words = _load_encode_fn(config)
    fingerprints = [document_fingerprint(text) for text in texts]
    parts = [
        part
        for text, fingerprint in zip(texts, fingerprints, strict=True)
        for part in split_document(text, fingerprint, config.validation_fraction, config.by_parts)
    ]
    sentences: list[str] = []
    document_ids: list[int] = []  # two for each document: its training text and its held-out text
    num_characters = num_long = 0
    for number, text in enumerate(parts):
        document_sentences = _split_text(text, config, by_words)
        if max(map(len, document_sentences), default=0) > MAX_SENTENCE_CHARS:
            document_sentences, num_long = _cut_sentences(document_sentences), num_long + 1
        needs_spaces = spaced or config.sentence_stride > 1
        with_spaces = _restore_spaces(text, document_sentences) if needs_spaces else document_sentences
        document_sentences = with_spaces if spaced else document_sentences
        num_characters += sum(map(len, document_sentences))
        if config.sentence_stride > 1:
            first = -int.from_bytes(fingerprints[number // 2][8:16], "big") % config.sentence_stride
            document_sentences = document_sentences[first :: config.sentence_stride]
            parts[number] = "".join(with_spaces[first :: config.sentence_stride])
        sentences += document_sentences
        document_ids += [number] * len(document_sentences)
    spans = _encode_sentences(sentences, document_ids, encode_texts, dtype)
    lengths, with_tokens = spans.lengths, np.unique(spans.documents[spans.lengths > 0]).tolist()
    if config.row_mode == "wrapped":
        spans = split_words(spans, continuation)
    long_spans = spans.lengths > config.length - 2
    counts = TextCounts(
        characters=num_characters,
        skipped=num_characters - sum(map(len, sentences)),
        without_tokens=sum(count_visible(sentences[i]) for i in np.flatnonzero(lengths == 0)),
        num_long=num_long,
        cut_tokens=int(spans.lengths[long_spans].sum()),
        longest=max(map(len, texts), default=0),
    )
    spans = _split_long_spans(spans, config.length - 2)
    return EncodedChunk(
        train=_select_spans(spans, spans.documents % 2 == 0),
        held_out=_select_spans(spans, spans.documents % 2 == 1),
        fingerprints=b"".join(fingerprints),
        text_bytes=sum(len(text.encode()) for text in texts),
        train_bytes=count_text_bytes([parts[i] for i in with_tokens if i % 2 == 0]),
        held_out_bytes=count_text_bytes([parts[i] for i in with_tokens if i % 2 == 1]),
        counts=counts,
    )


def _split_text(text: str, config: EncodeConfig, by_words: bool) -> list[str]:
    """Split a text into sentences, or where the rows are the same into lines, which takes less time.

    Args:
        text: of a document.
        config: of the encoding.
        by_words: whether the ids of a text are those of its words.
    """
    # Wrapped rows end between words, so that sentences without spaces between them stay together: a
    # tokenizer would begin a new word with each of them.
    at_spaces = config.row_mode == "wrapped" and config.sentence_stride == 1
    if at_spaces and by_words:
        lines = [line.strip() for line in text.splitlines()]
        if max(map(len, lines), default=0) <= MAX_SENTENCE_CHARS:
            return [line for line in lines if line]
    return split_sentences(text, at_spaces=at_spaces)


def _cut_sentences(sentences: list[str]) -> list[str]:
    pieces = chain.from_iterable(cut_pieces(sentence, MAX_SENTENCE_CHARS) for sentence in sentences)
    return [piece.strip() for piece in pieces if not piece.isspace()]


def _encode_sentences(
    sentences: list[str], document_ids: list[int], encode_texts: EncodeFn, dtype: np.dtype
) -> Spans:
    """Tokenize sentences to one span each; it is empty where the tokenizer makes nothing of a sentence."""
    with wrap_tokenizer_errors("data.tokenizer.path", "a tokenizer that encodes any text"):
        ids = [*chain.from_iterable(map(encode_texts, _batches(sentences)))]
    lengths = np.array([len(sentence_ids) for sentence_ids in ids], np.int64)
    tokens = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
    return Spans(tokens, lengths, np.array(document_ids, np.int64))


def _batches(sentences: list[str]) -> Iterator[list[str]]:
    """Divide sentences into batches of about MAX_SENTENCE_CHARS."""
    ends = np.cumsum([len(sentence) for sentence in sentences]) // MAX_SENTENCE_CHARS
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(sentences)]
    for start, end in pairwise(cuts):
        yield sentences[start:end]


def _restore_spaces(text: str, sentences: list[str]) -> list[str]:
    """Put a space before each sentence but the first that white space precedes in the text."""
    position = 0
    restored: list[str] = []
    for sentence in sentences:
        start = text.index(sentence, position)
        restored.append(" " + sentence if restored and start > position else sentence)
        position = start + len(sentence)
    return restored


@functools.lru_cache(maxsize=1)
def _load_encode_fn(config: EncodeConfig) -> tuple[EncodeFn, np.dtype, bool, np.ndarray, bool]:
    """What encoding needs of the tokenizer.

    Returns:
        (texts to ids, dtype of tokens, whether a space precedes each sentence but the first of a document,
        whether a token continues a word [vocab], whether the ids of a text are those of its words)
    """
    tokenizer = load_hf_tokenizer(config.tokenizer)
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is five characters, not the end of a segment
    vocab = load_vocabulary(config.tokenizer)
    return (
        make_text_encoder(tokenizer),
        token_dtype(len(vocab)),
        begins_words_by_space(tokenizer, vocab.word_prefix),
        vocab.continuation,
        can_encode_parts(tokenizer),
    )


def begins_words_by_space(tokenizer: "Tokenizer", word_prefix: str) -> bool:
    """Return whether words are recognised by the space before them, so a text's first word is not one.

    This holds for byte-level BPE and SentencePiece without a dummy prefix, if they add no space to a text.

    Args:
        tokenizer: of the data.
        word_prefix: first character of its tokens that begin a word; '' for none.
    """
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    return word_prefix != "" and not any(token.startswith(word_prefix) for token in first)


def split_words(sentences: Spans, continuation: np.ndarray) -> Spans:
    """Split sentences into words, so that a row can end after any word.

    A word is a token and the continuations that follow it in the sentence. Two rules limit the overhead:

    - The first `MIN_SEGMENT_TOKENS` tokens of a document stay together, and so do the last: no row begins or
      ends with less of a document, which would be two special tokens for three or fewer without context. (A
      document of less than twice as many tokens is one span.)
    - A word of more than `MAX_WORD_TOKENS` tokens may be cut anywhere. Otherwise text of a tokenizer that
      marks few beginnings of words, as SentencePiece in Chinese, would leave rows far from full.

    Args:
        sentences: whole documents; empty sentences are dropped.
        continuation: bool [vocab], whether a token continues a word.
    """
    num_tokens = len(sentences.tokens)
    documents = np.repeat(sentences.documents, sentences.lengths)
    starts_span = ~continuation[sentences.tokens]
    starts_span[(np.cumsum(sentences.lengths) - sentences.lengths)[sentences.lengths > 0]] = True
    word_lengths = np.diff(np.flatnonzero(starts_span), append=num_tokens)
    starts_span |= np.repeat(word_lengths > MAX_WORD_TOKENS, word_lengths)
    document_starts = np.flatnonzero(np.diff(documents, prepend=-1))
    document_lengths = np.diff(document_starts, append=num_tokens)
    position = np.arange(num_tokens) - np.repeat(document_starts, document_lengths)
    num_following = np.repeat(document_lengths, document_lengths) - position
    starts_span &= (position >= MIN_SEGMENT_TOKENS) & (num_following >= MIN_SEGMENT_TOKENS)
    starts_span[document_starts] = True
    starts = np.flatnonzero(starts_span)
    return Spans(sentences.tokens, np.diff(starts, append=num_tokens), documents[starts])


def _split_long_spans(spans: Spans, max_tokens: int) -> Spans:
    """Split spans of more than `max_tokens` tokens; drop empty ones."""
    counts = -(-spans.lengths // max_tokens)
    lengths = np.full(counts.sum(), max_tokens, np.int64)
    nonempty = counts > 0
    lengths[np.cumsum(counts)[nonempty] - 1] = (spans.lengths - (counts - 1) * max_tokens)[nonempty]
    return Spans(spans.tokens, lengths, np.repeat(spans.documents, counts))


def _select_spans(spans: Spans, mask: np.ndarray) -> Spans:
    """Select spans, and number their documents from 0 without gaps. mask: bool [S]."""
    documents = spans.documents[mask]
    document_ids = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0)
    tokens = spans.tokens[np.repeat(mask, spans.lengths)]
    return Spans(tokens, spans.lengths[mask], document_ids)


def init_worker() -> None:
    """Initialize a worker process: one thread, no Ctrl-C handling, exit with the parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Without this, workers would wait forever for a parent that was killed with SIGKILL."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
