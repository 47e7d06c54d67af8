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
from dwt_jax.data.encode import Encoded, Recipe, encode, is_held_out, start_worker, token_dtype
from dwt_jax.data.packing import Frame
from dwt_jax.data.progress import Progress
from dwt_jax.data.shards import FORMAT, SHARD_BYTES, SPLITS, Stream, read_index
from dwt_jax.data.sources import documents, files, fingerprint, stored_bytes
from dwt_jax.errors import UserError
from dwt_jax.files import building, publish

Log = Callable[[str], None]
Chunk = tuple[list[str], int]  # documents; how many bytes on disk were read for them
Results = Callable[[Iterable[Chunk]], Iterator[tuple[Encoded, int]]]

CHUNK_CHARACTERS = 1 << 20


def prepare(
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
    if (ready := _already(out, data)) is not None:
        log(f"prepare: {out} is ready: {describe(ready)}")
        return ready
    with building(out) as partial:
        index = _build(data, partial, workers or _cores(), log, shard_bytes)
        if not publish(partial, out):
            theirs = _already(out, data)  # another process was faster, or this raises
            assert theirs is not None, f"{out} cannot be replaced, and holds nothing"
            index = theirs
    log(f"prepare: {out}: {describe(index)}")
    return index


def describe(index: dict[str, Any]) -> str:
    parts = [
        f"{split} {found['rows']:,} rows of {index['sequence_length']} ({found['tokens']:,} tokens, "
        f"{found['documents']:,} documents, {found['padding']:.1%} padding)"
        for split, found in index["splits"].items()
    ]
    return "; ".join([*parts, f"{index['tokenizer']['vocab_size']:,} tokens in the vocabulary"])


def _already(out: Path, data: Data) -> dict[str, Any] | None:
    """The index in `out` if it is that of `data`, None if `out` is empty or absent."""
    index = read_index(out)
    if index is not None:
        if index["key"] == key(data):
            return index
        theirs, mine = index["data"], json.loads(json.dumps(dataclasses.asdict(data)))
        ours_only = ("path", "prefetch")
        different = [name for name in mine if name not in ours_only and mine[name] != theirs.get(name)]
        what = " and ".join(f"data.{name}" for name in different) or "input files"
        raise UserError(f"{out}: holds rows prepared with other {what}, expected a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something else than prepared rows, expected a new or empty directory")
    return None


def key(data: Data) -> str:
    """16 hex digits of everything in the config that decides the rows, with name, size and
    time of the input files, none of which is read (but the tokenizer's)."""
    wanted = {name: getattr(data, name) for name in ("sequence_length", "mode", "held_out", "keep_every")}
    words = data.tokenizer
    wanted["tokenizer"] = (
        tokenizers_.digest(words.path, words.lowercase) if words.path else dataclasses.asdict(words)
    )
    wanted["sources"] = [
        {**dataclasses.asdict(source), "weight": None, "files": _stamps(source)} for source in data.sources
    ]
    return hashlib.sha256(json.dumps([FORMAT, wanted], sort_keys=True).encode()).hexdigest()[:16]


def _stamps(source: Source) -> list[Any]:
    if source.kind == "builtin":  # the same in every installation
        return [path.name for path in files(source)]
    stats = [(str(path.absolute()), path.stat()) for path in files(source)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


# The work


def _build(data: Data, out: Path, workers: int, log: Log, shard_bytes: int) -> dict[str, Any]:
    """Everything into `out`, index.json last."""
    _bring_tokenizer(data, out / "tokenizer", log)
    words = tokenizers_.vocabulary(out / "tokenizer")
    frame = Frame(
        data.sequence_length, data.mode, words.pad_id, words.cls_id, words.sep_id, token_dtype(len(words))
    )
    tokenizer_digest = tokenizers_.digest(out / "tokenizer")
    recipe = Recipe(
        str(out / "tokenizer"),
        tokenizer_digest,
        data.sequence_length,
        data.mode,
        data.keep_every,
        data.held_out,
    )
    for split in SPLITS:
        (out / split).mkdir()
    sources = []
    with _encoder(recipe, workers) as results:
        for number, source in enumerate(data.sources):
            streams = {split: Stream(out / split, number, frame, shard_bytes) for split in SPLITS}
            sources.append(_run(source, f"prepare: source {number} ({source.kind})", streams, results, log))
    index = {
        "format": FORMAT,
        "digest": _digest(recipe, sources),
        "key": key(data),
        "sequence_length": data.sequence_length,
        "mode": data.mode,
        "dtype": frame.dtype.name,
        "data": dataclasses.asdict(data),
        "tokenizer": {
            "digest": tokenizer_digest,
            "vocab_size": len(words),
            **{f"{role}_id": getattr(words, f"{role}_id") for role in ("pad", "unk", "cls", "sep", "mask")},
        },
        "sources": [{"documents": source["documents"], "digest": source["digest"]} for source in sources],
        "splits": {split: _totals(split, sources, data) for split in SPLITS},
    }
    _require_both(index, data)
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return json.loads(json.dumps(index))  # as whoever reads the file sees it: lists for tuples


def _bring_tokenizer(data: Data, out: Path, log: Log) -> None:
    words = data.tokenizer
    if words.path:
        return tokenizers_.install(words.path, out, words.lowercase)

    def in_training(text: str) -> bool:
        return not is_held_out(fingerprint(text), data.held_out)

    log(f"prepare: training a WordPiece tokenizer on up to {words.sample_megabytes:g} MB of text")
    trained = tokenizers_.train(
        lambda: tokenizers_.sample_of(data.sources, in_training, words.sample_megabytes),
        words.vocab_size,
        words.lowercase,
    )
    return tokenizers_.save(trained, out, words.lowercase)


def _run(source: Source, name: str, streams: dict[str, Stream], results: Results, log: Log) -> dict[str, Any]:
    """All of one source through the encoder and into the streams of its splits."""
    whole = hashlib.sha256()
    count = 0
    progress = Progress(name, stored_bytes(source), log)
    for encoded, stored in results(_chunks(source)):
        streams["train"].add(encoded.train)
        streams["held_out"].add(encoded.held_out)
        whole.update(encoded.fingerprints)
        count += len(encoded.fingerprints) // len(fingerprint(""))
        progress.advance(stored, encoded.text_bytes)
    progress.close()
    found = {split: stream.finish() for split, stream in streams.items()}
    return {"documents": count, "digest": whole.hexdigest(), **found}


def _chunks(source: Source) -> Iterator[Chunk]:
    """Whole documents, about a megabyte of them at a time."""
    stored = 0

    def seen(count: int) -> None:
        nonlocal stored
        stored += count

    texts: list[str] = []
    size = 0
    for text in documents(source, seen):
        texts.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield texts, stored
            texts, size, stored = [], 0, 0
    yield texts, stored


@contextlib.contextmanager
def _encoder(recipe: Recipe, workers: int) -> Iterator[Results]:
    """A function that encodes chunks and yields the results in their order."""
    if workers == 1:
        yield lambda chunks: ((encode(texts, recipe), stored) for texts, stored in chunks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Spawned, not forked: jax may be loaded here, and its threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker)

    def results(chunks: Iterable[Chunk]) -> Iterator[tuple[Encoded, int]]:
        window: collections.deque[Any] = collections.deque()
        for texts, stored in chunks:
            window.append((pool.submit(encode, texts, recipe), stored))
            if len(window) > 2 * workers:  # bounds memory; keeps each worker one chunk ahead
                future, stored = window.popleft()
                yield future.result(), stored
        for future, stored in window:
            yield future.result(), stored

    try:
        yield results
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of {workers} worker processes was killed, perhaps for want of memory; "
            "expected all to live, try a smaller --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The index


def _digest(recipe: Recipe, sources: list[dict[str, Any]]) -> str:
    """Of everything that decides the rows, and of nothing else (where files lie, weights)."""
    decides = [FORMAT, recipe[1:], [source["digest"] for source in sources]]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _totals(split: str, sources: list[dict[str, Any]], data: Data) -> dict[str, Any]:
    """One split: sums over the sources, and each source by itself."""

    def padding(found: dict[str, Any]) -> float:
        return 1 - found["tokens"] / max(1, found["rows"] * data.sequence_length)

    found = [source[split] for source in sources]
    totals: dict[str, Any] = {
        name: sum(each[name] for each in found) for name in ("rows", "tokens", "documents")
    }
    totals["padding"] = padding(totals)
    totals["sources"] = [
        {**each, "padding": padding(each), "digest": source["digest"]}
        for each, source in zip(found, sources, strict=True)
    ]
    return totals


def _require_both(index: dict[str, Any], data: Data) -> None:
    count = sum(source["documents"] for source in index["sources"])
    if not count:
        raise UserError("data.sources: no document in any of the files read, expected text")
    for split in SPLITS:
        if not index["splits"][split]["rows"]:
            change = (
                "a larger share (or more documents)" if split == "held_out" else "a smaller one or more text"
            )
            raise UserError(
                f"data.held_out is {data.held_out:g}: none of the {count:,} documents read gave rows to the "
                f"split '{split}', expected {change}"
            )


# Finding prepared rows


def prepared(data: Data, log: Log = print) -> Path:
    """The directory with the rows of `data`.

    That is `data.path`, if set (a URL is copied into the cache first); else a directory of the
    cache, `$DWT_CACHE` or ~/.cache/dwt-jax, prepared now if need be. Raises UserError where
    `data.path` holds no rows, or others than the config wants, and as `prepare` does.
    """
    if data.path:
        directory = _fetched(data.path, log) if "://" in data.path else Path(data.path).expanduser()
        _require_match(directory, data)
        if _of_other_text(directory, data):
            log(f"data.path: rows of {directory} as they were prepared; data.sources here are not read")
        return directory
    out = runtime_env.cache() / f"data-{key(data)}"
    if read_index(out) is None:
        with _one_at_a_time(out, log):
            prepare(data, out, log=log)
    return out


def _require_match(directory: Path, data: Data) -> None:
    if (index := read_index(directory)) is None:
        found = "holds no index.json" if directory.exists() else "does not exist"
        raise UserError(
            f"data.path is {data.path}, which {found}, expected prepared rows; "
            f"run dwt prepare --config=... --workdir={data.path}"
        )
    for name in ("sequence_length", "mode"):
        if index[name] != getattr(data, name):
            raise UserError(f"data.{name} is {getattr(data, name)}, expected {index[name]} as in {directory}")
    for name in ("held_out", "keep_every"):
        if index["data"][name] != getattr(data, name):
            found = index["data"][name]
            raise UserError(f"data.{name} is {getattr(data, name)}, expected {found} as in {directory}")
    words = data.tokenizer
    if words.path and tokenizers_.digest(words.path, words.lowercase) != index["tokenizer"]["digest"]:
        raise UserError(
            f"data.tokenizer.path is {words.path}, a tokenizer unlike the one that {directory} was prepared "
            f"with, expected the same as {directory / 'tokenizer'}"
        )


def as_prepared(data: Data, directory: Path) -> Data:
    """`data` with the sources and the tokenizer that the rows in `directory` were really made
    from. Weights are the config's own where it has the same sources."""
    found = json.loads((directory / "index.json").read_text())["data"]
    sources = tuple(Source(**source) for source in found["sources"])
    if not _of_other_text(directory, data):
        sources = tuple(
            dataclasses.replace(theirs, weight=ours.weight)
            for theirs, ours in zip(sources, data.sources, strict=True)
        )
    return dataclasses.replace(data, sources=sources, tokenizer=Tokenizer(**found["tokenizer"]))


def _of_other_text(directory: Path, data: Data) -> bool:
    """Whether the config's sources are others than those of the rows, weights apart."""
    found = json.loads((directory / "index.json").read_text())["data"]["sources"]
    ours = [dataclasses.asdict(source) for source in data.sources]
    return [{**source, "weight": 0} for source in ours] != [{**source, "weight": 0} for source in found]


def _fetched(url: str, log: Log) -> Path:
    """A local copy of the prepared rows at a URL, one for each content."""
    import fsspec

    try:
        there, root = fsspec.core.url_to_fs(url)
        index = there.cat_file(f"{root.rstrip('/')}/index.json")
        out = runtime_env.cache() / f"copy-{hashlib.sha256(index).hexdigest()[:16]}"
        if read_index(out) is not None:
            return out
        with _one_at_a_time(out, log), building(out) as partial:
            log(f"prepare: copying {url} to {out}")
            for name in there.find(root):
                target = partial / there._strip_protocol(name).removeprefix(root).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                there.get_file(name, str(target))
            publish(partial, out)
        return out
    except UserError:
        raise
    except Exception as error:  # every file system has its own kinds
        raise UserError(
            f"data.path is {url}: {type(error).__name__}: {' '.join(str(error).split())[:200]}, expected "
            f"prepared rows; run dwt prepare --config=... --workdir=DIR and copy DIR there"
        ) from None


@contextlib.contextmanager
def _one_at_a_time(out: Path, log: Log) -> Iterator[None]:
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
