"""Prepare data: train or copy a tokenizer, encode documents, and write packed rows to disk.

Memory use does not depend on the size of the corpus: a window of chunks, and one shard for each split. The
result depends on the documents and the config only, not on the number of processes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.config import Data, Source
from dwt_jax.data.cache_key import data_cache_key, rows_digest
from dwt_jax.data.encode import (
    EncodeConfig,
    EncodedChunk,
    encode_chunk,
    init_worker,
    token_dtype,
)
from dwt_jax.data.packing import RowFormat
from dwt_jax.data.shards import FORMAT_VERSION, SHARD_BYTES, SPLITS, ShardWriter, read_dataset_index
from dwt_jax.data.sources import (
    FINGERPRINT_BYTES,
    document_fingerprint,
    iter_documents,
    stored_bytes,
)
from dwt_jax.data.splits import choose_split, split_document
from dwt_jax.data.text_checks import (
    SAMPLE_MEGABYTES,
    TextCounts,
    check_sample,
    check_unknown,
    describe_missing_frame,
    describe_text,
    text_shares,
    unknown_remedy,
)
from dwt_jax.data.text_format import recognise_format
from dwt_jax.data.tokenizer import copy_tokenizer, load_vocabulary, save_tokenizer, tokenizer_digest
from dwt_jax.data.tokenizer_training import sample_documents, take_megabytes, train_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir, commit_dir, is_empty_dir, user_path
from dwt_jax.logs import logger
from dwt_jax.models.tokenizer_defaults import TOKEN_ROLES
from dwt_jax.progress import Progress

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

Chunk = tuple[list[str], int]  # documents, and the number of bytes read from disk for them
ChunkEncoder = Callable[[Iterable[Chunk]], Iterator[tuple[EncodedChunk, int]]]

CHUNK_CHARS = 1 << 20


def prepare_data(
    data: Data,
    out: Path,
    *,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the rows of `data` to the new directory `out`.

    A directory that already holds these rows is not changed.

    Args:
        data: the config section.
        out: a new or empty directory.
        workers: number of processes; None: one for each CPU.
        shard_bytes: size of the tokens in one shard.

    Returns:
        The index (docs/data.md).

    Raises:
        UserError: the directory holds something else, a split is empty, or the sources or the tokenizer
            cannot be read.
    """
    out = user_path(out).absolute()
    if (existing_index := _matching_index(out, data)) is not None:
        logger.info(f"prepare: {out} is ready: {describe_index(existing_index)}")
        return existing_index
    with atomic_dir(out) as partial:
        index = _build_dataset(data, partial, workers or _cpu_count(), shard_bytes)
        if not commit_dir(partial, out):
            other_index = _matching_index(out, data)  # written by another process meanwhile
            if other_index is None:
                raise UserError(f"{out}: another process is writing to it, expected an empty directory")
            index = other_index
    logger.info(f"prepare: {out}: {describe_index(index)}")
    return index


def describe_index(index: dict[str, Any]) -> str:
    """Summarize an index in one line: rows, tokens, documents and padding of each split, unknown tokens."""
    parts = [
        f"{split} {totals['rows']:,} rows of {index['sequence_length']} ({totals['tokens']:,} tokens, "
        f"{totals['documents']:,} documents, {totals['padding']:.1%} padding)"
        for split, totals in index["splits"].items()
    ]
    vocab_size = index["tokenizer"]["vocab_size"]
    unknown = f"{_unknown_share(index):.2%} of the text unknown to them"
    return "; ".join([*parts, f"{vocab_size:,} tokens in the vocabulary, {unknown}"])


def _matching_index(out: Path, data: Data) -> dict[str, Any] | None:
    """The index in `out` if its rows are those of `data`; None if `out` is empty or absent."""
    index = read_dataset_index(out)
    if index is not None:
        if index["key"] == data_cache_key(data):
            return index
        old_data, new_data = index["data"], json.loads(json.dumps(dataclasses.asdict(data)))
        ignored_keys = ("path", "prefetch", "max_lost_share")
        old_data = {**new_data, **old_data, "tokenizer": {**new_data["tokenizer"], **old_data["tokenizer"]}}
        differing_keys = [
            name for name in new_data if name not in ignored_keys and new_data[name] != old_data[name]
        ]
        causes = " and ".join(f"data.{name}" for name in differing_keys)
        causes = causes or "input files, or by an earlier version of dwt"
        raise UserError(f"{out}: holds rows prepared with other {causes}, expected a new directory")
    if out.exists() and (not out.is_dir() or not is_empty_dir(out)):
        raise UserError(f"{out}: not empty and without prepared rows, expected a new or empty directory")
    return None


# Encoding


def _build_dataset(data: Data, out: Path, workers: int, shard_bytes: int) -> dict[str, Any]:
    """Write the tokenizer, the rows, and last index.json to `out`, and return the index."""
    fraction, by_parts = choose_split(data)
    _setup_tokenizer(data, out / "tokenizer", fraction, by_parts)
    for line in describe_missing_frame(out / "tokenizer"):
        logger.info(line)
    vocab = load_vocabulary(out / "tokenizer")
    row_format = RowFormat(
        length=data.sequence_length,
        row_mode=data.row_mode,
        pad_id=vocab.pad_id,
        cls_id=vocab.cls_id,
        sep_id=vocab.sep_id,
        dtype=token_dtype(len(vocab)),
        end_token=data.end_token,
    )
    encode_config = EncodeConfig(
        str(out / "tokenizer"),
        tokenizer_digest(out / "tokenizer"),
        data.sequence_length,
        data.row_mode,
        data.sentence_stride,
        fraction,
        by_parts,
    )
    for number, source in enumerate(data.sources):
        beginning = "\n".join(take_megabytes(iter_documents(source), SAMPLE_MEGABYTES))
        if description := recognise_format(beginning):
            logger.info(
                f"prepare: source {number} ({source.kind}): warning: {description}; it is read as plain text"
            )
    samples = [check_sample(number, data, out / "tokenizer") for number in range(len(data.sources))]
    for split in SPLITS:
        (out / split).mkdir()
    sources = []
    with _chunk_encoder(encode_config, workers) as encoder:
        for number, source in enumerate(data.sources):
            name = f"prepare: source {number} ({source.kind})"
            writers = {split: ShardWriter(out / split, number, row_format, shard_bytes) for split in SPLITS}
            entry = _encode_source(source, name, writers, encoder, vocab.unk_id)
            entry["text"] = text_shares(number, entry, samples[number], data.max_lost_share)
            for line in describe_text(name, entry, data.tokenizer, out / "tokenizer", out / "train"):
                logger.info(line)
            sources.append(entry)
    index = {
        "format": FORMAT_VERSION,
        "digest": rows_digest(encode_config, data, sources),
        "key": data_cache_key(data),
        "sequence_length": data.sequence_length,
        "row_mode": data.row_mode,
        "dtype": row_format.dtype.name,
        "data": dataclasses.asdict(data),
        "tokenizer": {
            "digest": encode_config.tokenizer_digest,
            "vocab_size": len(vocab),
            **{f"{role}_id": getattr(vocab, f"{role}_id") for role in TOKEN_ROLES},
        },
        "sources": [{key: source[key] for key in ("documents", "digest", "text")} for source in sources],
        "splits": {split: _split_totals(split, sources, data) for split in SPLITS},
    }
    _check_splits(index, data)
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return json.loads(json.dumps(index))  # as it reads from the file: lists instead of tuples


def _setup_tokenizer(data: Data, out: Path, fraction: float, by_parts: bool) -> None:
    config = data.tokenizer
    if config.path:
        copy_tokenizer(config.path, out, config.lowercase)
        return

    def training_text(text: str) -> str:
        return split_document(text, document_fingerprint(text), fraction, by_parts)[0]

    logger.info(f"prepare: training a WordPiece tokenizer on up to {config.sample_megabytes:g} MB of text")
    tokenizer = train_tokenizer(
        lambda: sample_documents(data.sources, training_text, config.sample_megabytes),
        config.vocab_size,
        config.lowercase,
        config.sample_megabytes,
        config.alphabet_size,
    )
    if (size := tokenizer.get_vocab_size()) < config.vocab_size:
        logger.info(
            f"prepare: the tokenizer has {size:,} of {config.vocab_size:,} tokens: "
            "the text does not have enough distinct words"
        )
    save_tokenizer(tokenizer, out, config.lowercase)


def _encode_source(
    source: Source,
    name: str,
    writers: dict[str, ShardWriter],
    encoder: ChunkEncoder,
    unk_id: int,
) -> dict[str, Any]:
    """Encode one source and write its rows.

    Returns:
        `documents`, `digest` and `counts` of the source, and for each split its entry of the index.
    """
    hasher = hashlib.sha256()
    num_documents, counts = 0, TextCounts()
    # Without [CLS] and [SEP].
    text_counts = {split: {"text_tokens": 0, "text_bytes": 0, "unknown": 0} for split in SPLITS}
    stored, text_bytes = stored_bytes(source), 0

    def speed() -> str:
        megabytes = text_bytes / 1e6
        return f"{megabytes:.1f} MB of text, {megabytes / progress.seconds:.1f} MB/s"

    with Progress(name, stored, "B") as progress:
        for chunk, bytes_read in encoder(_read_chunks(source)):
            for split, spans, num_bytes in (
                ("train", chunk.train, chunk.train_bytes),
                ("held_out", chunk.held_out, chunk.held_out_bytes),
            ):
                writers[split].add(spans)
                text_counts[split]["text_tokens"] += len(spans.tokens)
                text_counts[split]["text_bytes"] += num_bytes
                text_counts[split]["unknown"] += int(np.count_nonzero(spans.tokens == unk_id))
            hasher.update(chunk.fingerprints)
            num_documents += len(chunk.fingerprints) // FINGERPRINT_BYTES
            counts = counts.plus(chunk.counts)
            text_bytes += chunk.text_bytes
            progress.advance(bytes_read if stored else chunk.text_bytes, speed)
    logger.info(f"{name}: {speed()}, done")
    totals = {split: {**writer.finish(), **text_counts[split]} for split, writer in writers.items()}
    return {"documents": num_documents, "digest": hasher.hexdigest(), "counts": counts, **totals}


def _read_chunks(source: Source) -> Iterator[Chunk]:
    """Group documents into chunks of about a megabyte."""
    bytes_read = 0

    def on_bytes_read(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    texts: list[str] = []
    size = 0
    for text in iter_documents(source, on_bytes_read):
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARS:
            yield texts, bytes_read
            texts, size, bytes_read = [], 0, 0
    yield texts, bytes_read


@contextlib.contextmanager
def _chunk_encoder(config: EncodeConfig, workers: int) -> Iterator[ChunkEncoder]:
    """Start the worker processes; the encoder yields results in the order of the chunks."""
    pool = _start_pool(workers) if workers > 1 else None
    if pool is None:
        yield lambda chunks: ((encode_chunk(texts, config), bytes_read) for texts, bytes_read in chunks)
        return
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    can_start = True

    def submit(texts: list[str]) -> "Future[EncodedChunk]":
        nonlocal can_start
        if can_start:
            try:
                return pool.submit(encode_chunk, texts, config)  # which may start another process
            except OSError as error:
                can_start = False
                _log_start_failure(workers, error)
        future: Future[EncodedChunk] = Future()
        future.set_result(encode_chunk(texts, config))
        return future

    def encode_in_order(chunks: Iterable[Chunk]) -> Iterator[tuple[EncodedChunk, int]]:
        window: collections.deque[Any] = collections.deque()
        for texts, bytes_read in chunks:
            window.append((submit(texts), bytes_read))
            if len(window) > 2 * workers:  # bounds memory; keeps each worker one chunk ahead
                future, bytes_read = window.popleft()
                yield future.result(), bytes_read
        for future, bytes_read in window:
            yield future.result(), bytes_read

    try:
        yield encode_in_order
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of {workers} worker processes was killed, possibly for lack of memory; "
            "expected all to finish; try a smaller --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool(workers: int) -> "ProcessPoolExecutor | None":
    """Start the first worker process; None if the system has no process, thread or semaphore left for it."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    children_before = multiprocessing.active_children()
    try:
        # Spawned, not forked: jax may be loaded in this process, and its threads do not survive a fork.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), init_worker)
        pool.submit(os.getpid)
    except (OSError, RuntimeError) as error:  # BrokenPipeError: multiprocessing's own helper has ended
        for process in multiprocessing.active_children():
            if process not in children_before:
                process.terminate()
        _log_start_failure(workers, error)
        return None
    return pool


def _log_start_failure(workers: int, error: Exception) -> None:
    logger.info(f"prepare: {workers} worker processes cannot be started ({error}); encoding in this process")


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The index


def _split_totals(split: str, sources: list[dict[str, Any]], data: Data) -> dict[str, Any]:
    """The entry of one split: sums over the sources, and the entry of each source."""

    def padding(counts: dict[str, Any]) -> float:
        return 1 - counts["tokens"] / max(1, counts["rows"] * data.sequence_length)

    source_counts = [source[split] for source in sources]
    totals: dict[str, Any] = {
        name: sum(counts[name] for counts in source_counts)
        for name in ("rows", "tokens", "documents", "text_tokens", "text_bytes", "unknown")
    }
    totals["padding"] = padding(totals)
    totals["sources"] = [
        {**counts, "padding": padding(counts), "digest": source["digest"]}
        for counts, source in zip(source_counts, sources, strict=True)
    ]
    return totals


def _unknown_share(index: dict[str, Any]) -> float:
    """Return the share of unknown tokens; 0 for rows of an earlier version, which did not count them."""
    unknown, tokens = (
        sum(totals.get(key, 0) for totals in index["splits"].values()) for key in ("unknown", "text_tokens")
    )
    return unknown / max(1, tokens)


def _check_splits(index: dict[str, Any], data: Data) -> None:
    check_unknown(_unknown_share(index), "tokens", unknown_remedy(data.tokenizer, {}))
    num_documents = sum(source["documents"] for source in index["sources"])
    for split in SPLITS:
        if not index["splits"][split]["rows"]:
            change = (
                "larger fraction or more documents" if split == "held_out" else "smaller one or more text"
            )
            raise UserError(
                f"data.validation_fraction is {data.validation_fraction:g}: none of the {num_documents:,} "
                f"documents read gave rows to the split '{split}', expected a {change}"
            )
