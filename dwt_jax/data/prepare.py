"""`dwt prepare`: text into a tokenizer and rows of tokens that a training step can gather.

Whatever the corpus's size, memory holds a window of chunks and one shard for each split. The
result depends on the documents and the config alone, not on the number of processes.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dwt_jax import runtime_env
from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data import tokenizer as tokenizers_
from dwt_jax.data.encode import (
    EncodeConfig,
    EncodedChunk,
    encode_chunk,
    init_worker,
    is_held_out,
    token_dtype,
)
from dwt_jax.data.packing import RowFormat
from dwt_jax.data.progress import Progress
from dwt_jax.data.shards import FORMAT_VERSION, SHARD_BYTES, SPLITS, ShardWriter, read_dataset_index
from dwt_jax.data.sources import document_fingerprint, iter_documents, source_files, stored_bytes
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir, commit_dir

Log = Callable[[str], None]
Chunk = tuple[list[str], int]  # documents; how many bytes on disk were read for them
ChunkEncoder = Callable[[Iterable[Chunk]], Iterator[tuple[EncodedChunk, int]]]

CHUNK_CHARS = 1 << 20


def prepare_data(
    data: Data,
    out: Path,
    *,
    workers: int | None = None,
    log: Log = print,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the rows of `data` to the new directory `out` and return its index (see docs/data.md).

    workers: processes; None: one for each core. shard_bytes: of tokens in a shard file. A
    directory that holds the same rows already is left as it is. Raises UserError for a
    directory that holds anything else, for an empty split, and as the sources and the tokenizer do.
    """
    out = Path(out).expanduser().absolute()
    if (existing_index := _matching_index(out, data)) is not None:
        log(f"prepare: {out} is ready: {describe_index(existing_index)}")
        return existing_index
    with atomic_dir(out) as partial:
        index = _build_dataset(data, partial, workers or _cpu_count(), log, shard_bytes)
        if not commit_dir(partial, out):
            other_index = _matching_index(out, data)  # another process was faster, or this raises
            assert other_index is not None, f"{out} cannot be replaced, and holds nothing"
            index = other_index
    log(f"prepare: {out}: {describe_index(index)}")
    return index


def describe_index(index: dict[str, Any]) -> str:
    parts = [
        f"{split} {totals['rows']:,} rows of {index['sequence_length']} ({totals['tokens']:,} tokens, "
        f"{totals['documents']:,} documents, {totals['padding']:.1%} padding)"
        for split, totals in index["splits"].items()
    ]
    return "; ".join([*parts, f"{index['tokenizer']['vocab_size']:,} tokens in the vocabulary"])


def _matching_index(out: Path, data: Data) -> dict[str, Any] | None:
    """The index in `out` if it is that of `data`, None if `out` is empty or absent."""
    index = read_dataset_index(out)
    if index is not None:
        if index["key"] == data_cache_key(data):
            return index
        old_data, new_data = index["data"], json.loads(json.dumps(dataclasses.asdict(data)))
        ignored_keys = ("path", "prefetch")
        differing_keys = [
            name for name in new_data if name not in ignored_keys and new_data[name] != old_data.get(name)
        ]
        causes = " and ".join(f"data.{name}" for name in differing_keys) or "input files"
        raise UserError(f"{out}: holds rows prepared with other {causes}, expected a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something else than prepared rows, expected a new or empty directory")
    return None


def data_cache_key(data: Data) -> str:
    """16 hex digits of everything in the config that decides the rows, with name, size and
    time of the input files, none of which is read (but the tokenizer's)."""
    fields = {
        name: getattr(data, name)
        for name in ("sequence_length", "row_mode", "validation_fraction", "sentence_stride")
    }
    tokenizer = data.tokenizer
    fields["tokenizer"] = (
        tokenizers_.tokenizer_digest(tokenizer.path, tokenizer.lowercase)
        if tokenizer.path
        else dataclasses.asdict(tokenizer)
    )
    fields["sources"] = [
        {**dataclasses.asdict(source), "weight": None, "files": _file_stamps(source)}
        for source in data.sources
    ]
    return hashlib.sha256(json.dumps([FORMAT_VERSION, fields], sort_keys=True).encode()).hexdigest()[:16]


def _file_stamps(source: Source) -> list[Any]:
    if source.kind == "builtin":  # the same in every installation
        return [path.name for path in source_files(source)]
    stats = [(str(path.absolute()), path.stat()) for path in source_files(source)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


# The work


def _build_dataset(data: Data, out: Path, workers: int, log: Log, shard_bytes: int) -> dict[str, Any]:
    """Everything into `out`, index.json last."""
    _setup_tokenizer(data, out / "tokenizer", log)
    vocab = tokenizers_.load_vocabulary(out / "tokenizer")
    row_format = RowFormat(
        data.sequence_length, data.row_mode, vocab.pad_id, vocab.cls_id, vocab.sep_id, token_dtype(len(vocab))
    )
    tokenizer_digest = tokenizers_.tokenizer_digest(out / "tokenizer")
    encode_config = EncodeConfig(
        str(out / "tokenizer"),
        tokenizer_digest,
        data.sequence_length,
        data.row_mode,
        data.sentence_stride,
        data.validation_fraction,
    )
    for split in SPLITS:
        (out / split).mkdir()
    sources = []
    with _chunk_encoder(encode_config, workers) as encoder:
        for number, source in enumerate(data.sources):
            writers = {split: ShardWriter(out / split, number, row_format, shard_bytes) for split in SPLITS}
            sources.append(
                _encode_source(source, f"prepare: source {number} ({source.kind})", writers, encoder, log)
            )
    index = {
        "format": FORMAT_VERSION,
        "digest": _rows_digest(encode_config, sources),
        "key": data_cache_key(data),
        "sequence_length": data.sequence_length,
        "row_mode": data.row_mode,
        "dtype": row_format.dtype.name,
        "data": dataclasses.asdict(data),
        "tokenizer": {
            "digest": tokenizer_digest,
            "vocab_size": len(vocab),
            **{f"{role}_id": getattr(vocab, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")},
        },
        "sources": [{"documents": source["documents"], "digest": source["digest"]} for source in sources],
        "splits": {split: _split_totals(split, sources, data) for split in SPLITS},
    }
    _check_splits_nonempty(index, data)
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return json.loads(json.dumps(index))  # as whoever reads the file sees it: lists for tuples


def _setup_tokenizer(data: Data, out: Path, log: Log) -> None:
    tokenizer_config = data.tokenizer
    if tokenizer_config.path:
        return tokenizers_.copy_tokenizer(tokenizer_config.path, out, tokenizer_config.lowercase)

    def in_training(text: str) -> bool:
        return not is_held_out(document_fingerprint(text), data.validation_fraction)

    log(f"prepare: training a WordPiece tokenizer on up to {tokenizer_config.sample_megabytes:g} MB of text")
    tokenizer = tokenizers_.train_tokenizer(
        lambda: tokenizers_.sample_documents(data.sources, in_training, tokenizer_config.sample_megabytes),
        tokenizer_config.vocab_size,
        tokenizer_config.lowercase,
    )
    return tokenizers_.save_tokenizer(tokenizer, out, tokenizer_config.lowercase)


def _encode_source(
    source: Source, name: str, writers: dict[str, ShardWriter], encoder: ChunkEncoder, log: Log
) -> dict[str, Any]:
    """All of one source through the encoder and into the streams of its splits."""
    hasher = hashlib.sha256()
    count = 0
    progress = Progress(name, stored_bytes(source), log)
    for chunk, bytes_read in encoder(_read_chunks(source)):
        writers["train"].add(chunk.train)
        writers["held_out"].add(chunk.held_out)
        hasher.update(chunk.fingerprints)
        count += len(chunk.fingerprints) // len(document_fingerprint(""))
        progress.advance(bytes_read, chunk.text_bytes)
    progress.close()
    totals = {split: writer.finish() for split, writer in writers.items()}
    return {"documents": count, "digest": hasher.hexdigest(), **totals}


def _read_chunks(source: Source) -> Iterator[Chunk]:
    """Whole documents, about a megabyte of them at a time."""
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
    """A function that encodes chunks and yields the results in their order."""
    if workers == 1:
        yield lambda chunks: ((encode_chunk(texts, config), bytes_read) for texts, bytes_read in chunks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Spawned, not forked: jax may be loaded here, and its threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, init_worker)

    def encode_in_order(chunks: Iterable[Chunk]) -> Iterator[tuple[EncodedChunk, int]]:
        window: collections.deque[Any] = collections.deque()
        for texts, bytes_read in chunks:
            window.append((pool.submit(encode_chunk, texts, config), bytes_read))
            if len(window) > 2 * workers:  # bounds memory; keeps each worker one chunk ahead
                future, bytes_read = window.popleft()
                yield future.result(), bytes_read
        for future, bytes_read in window:
            yield future.result(), bytes_read

    try:
        yield encode_in_order
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of {workers} worker processes was killed, perhaps for want of memory; "
            "expected all to live, try a smaller --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The index


def _rows_digest(config: EncodeConfig, sources: list[dict[str, Any]]) -> str:
    """Of everything that decides the rows, and of nothing else (where files lie, weights)."""
    content = [FORMAT_VERSION, config[1:], [source["digest"] for source in sources]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _split_totals(split: str, sources: list[dict[str, Any]], data: Data) -> dict[str, Any]:
    """One split: sums over the sources, and each source by itself."""

    def padding(counts: dict[str, Any]) -> float:
        return 1 - counts["tokens"] / max(1, counts["rows"] * data.sequence_length)

    counts = [source[split] for source in sources]
    totals: dict[str, Any] = {
        name: sum(each[name] for each in counts) for name in ("rows", "tokens", "documents")
    }
    totals["padding"] = padding(totals)
    totals["sources"] = [
        {**each, "padding": padding(each), "digest": source["digest"]}
        for each, source in zip(counts, sources, strict=True)
    ]
    return totals


def _check_splits_nonempty(index: dict[str, Any], data: Data) -> None:
    count = sum(source["documents"] for source in index["sources"])
    if not count:
        raise UserError("data.sources: no document in any of the files read, expected text")
    for split in SPLITS:
        if not index["splits"][split]["rows"]:
            change = (
                "a larger share (or more documents)" if split == "held_out" else "a smaller one or more text"
            )
            raise UserError(
                f"data.validation_fraction is {data.validation_fraction:g}: none of the {count:,} documents read gave rows to the "
                f"split '{split}', expected {change}"
            )


# Finding prepared rows


def get_prepared(data: Data, log: Log = print) -> Path:
    """The directory with the rows of `data`.

    That is `data.path`, if set (a URL is copied into the cache first); else a directory of the
    cache, `$DWT_CACHE` or ~/.cache/dwt-jax, prepared now if need be. Raises UserError where
    `data.path` holds no rows, or others than the config wants, and as `prepare_data` does.
    """
    if data.path:
        directory = _download(data.path, log) if "://" in data.path else Path(data.path).expanduser()
        _check_matches_config(directory, data)
        if _sources_differ(directory, data):
            log(f"data.path: rows of {directory} as they were prepared; data.sources here are not read")
        return directory
    out = runtime_env.cache_dir() / f"data-{data_cache_key(data)}"
    if read_dataset_index(out) is None:
        with _file_lock(out, log):
            prepare_data(data, out, log=log)
    return out


def _check_matches_config(directory: Path, data: Data) -> None:
    if (index := read_dataset_index(directory)) is None:
        actual = "holds no index.json" if directory.exists() else "does not exist"
        raise UserError(
            f"data.path is {data.path}, which {actual}, expected prepared rows; "
            f"run dwt prepare --config=... --workdir={data.path}"
        )
    for name in ("sequence_length", "row_mode"):
        if index[name] != getattr(data, name):
            raise UserError(f"data.{name} is {getattr(data, name)}, expected {index[name]} as in {directory}")
    for name in ("validation_fraction", "sentence_stride"):
        if index["data"][name] != getattr(data, name):
            actual = index["data"][name]
            raise UserError(f"data.{name} is {getattr(data, name)}, expected {actual} as in {directory}")
    tokenizer = data.tokenizer
    if (
        tokenizer.path
        and tokenizers_.tokenizer_digest(tokenizer.path, tokenizer.lowercase) != index["tokenizer"]["digest"]
    ):
        raise UserError(
            f"data.tokenizer.path is {tokenizer.path}, a tokenizer unlike the one that {directory} was prepared "
            f"with, expected the same as {directory / 'tokenizer'}"
        )


def recorded_config(data: Data, directory: Path) -> Data:
    """`data` with the sources and the tokenizer that the rows in `directory` were really made
    from. Weights are the config's own where it has the same sources."""
    record = json.loads((directory / "index.json").read_text())["data"]
    sources = tuple(Source(**source) for source in record["sources"])
    if not _sources_differ(directory, data):
        sources = tuple(
            dataclasses.replace(recorded_source, weight=config_source.weight)
            for recorded_source, config_source in zip(sources, data.sources, strict=True)
        )
    return dataclasses.replace(data, sources=sources, tokenizer=Tokenizer(**record["tokenizer"]))


def _sources_differ(directory: Path, data: Data) -> bool:
    """Whether the config's sources are others than those of the rows, weights apart."""
    recorded_sources = json.loads((directory / "index.json").read_text())["data"]["sources"]
    config_sources = [dataclasses.asdict(source) for source in data.sources]
    return [{**source, "weight": 0} for source in config_sources] != [
        {**source, "weight": 0} for source in recorded_sources
    ]


def _download(url: str, log: Log) -> Path:
    """A local copy of the prepared rows at a URL, one for each content."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
        index = fs.cat_file(f"{root.rstrip('/')}/index.json")
        out = runtime_env.cache_dir() / f"copy-{hashlib.sha256(index).hexdigest()[:16]}"
        if read_dataset_index(out) is not None:
            return out
        with _file_lock(out, log), atomic_dir(out) as partial:
            log(f"prepare: copying {url} to {out}")
            for name in fs.find(root):
                target = partial / fs._strip_protocol(name).removeprefix(root).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(name, str(target))
            commit_dir(partial, out)
        return out
    except UserError:
        raise
    except Exception as error:  # every file system has its own kinds
        raise UserError(
            f"data.path is {url}: {type(error).__name__}: {' '.join(str(error).split())[:200]}, expected "
            f"prepared rows; run dwt prepare --config=... --workdir=DIR and copy DIR there"
        ) from None


@contextlib.contextmanager
def _file_lock(out: Path, log: Log) -> Iterator[None]:
    """Hold a lock while `out` is made, so that the processes of one machine do the work once.

    Only to save work: without locks, or on other machines, all of them work and one is published.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "w") as lock:
        try:
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"prepare: waiting for another process that makes {out}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield
