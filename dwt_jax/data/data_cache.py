"""Locate prepared rows: at `data.path`, at a URL, or in the cache, where they are prepared if needed."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from dwt_jax import runtime_env
from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data.cache_key import data_cache_key, role_tokens
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.shards import read_dataset_index
from dwt_jax.data.tokenizer import load_vocabulary, tokenizer_digest
from dwt_jax.errors import UserError
from dwt_jax.files import acquire_lock, atomic_dir, commit_dir, user_path
from dwt_jax.logs import logger


def get_prepared(data: Data) -> Path:
    """Return the directory with the rows of `data`.

    It is `data.path` if that is set; a URL is copied to the cache first. Otherwise it is a directory in the
    cache ($DWT_CACHE, or ~/.cache/dwt-jax), which is prepared if it does not exist.

    Args:
        data: the config section.

    Raises:
        UserError: if `data.path` holds no rows or rows for another config, and as `prepare_data` does.
    """
    if data.path:
        directory = _download(data.path) if "://" in data.path else user_path(data.path)
        _check_matches_config(directory, data)
        if _sources_differ(directory, data):
            logger.info(f"data.path: using the prepared rows of {directory}; data.sources is ignored")
        return directory
    out = runtime_env.make_cache_dir() / f"data-{data_cache_key(data)}"
    if read_dataset_index(out) is None:
        with _file_lock(out):
            prepare_data(data, out)
    return out


def recorded_config(data: Data, directory: Path) -> Data:
    """Return `data` with the sources and the tokenizer that the rows in a directory were prepared from.

    Args:
        data: the config section. The weights of its sources are kept if the sources are the same.
        directory: prepared rows.
    """
    record = json.loads((directory / "index.json").read_text(encoding="utf-8"))["data"]
    sources = tuple(Source(**source) for source in record["sources"])
    if not _sources_differ(directory, data):
        sources = tuple(
            dataclasses.replace(recorded_source, weight=config_source.weight)
            for recorded_source, config_source in zip(sources, data.sources, strict=True)
        )
    return dataclasses.replace(data, sources=sources, tokenizer=Tokenizer(**record["tokenizer"]))


def _check_matches_config(directory: Path, data: Data) -> None:
    index = read_dataset_index(directory)
    if index is None:
        problem = "holds no index.json" if directory.exists() else "does not exist"
        raise UserError(
            f"data.path is {data.path}, which {problem}, expected prepared rows; "
            f"run dwt prepare --config=... --workdir={data.path}"
        )
    for name in ("sequence_length", "row_mode", "end_token", "validation_fraction", "sentence_stride"):
        prepared_value = index["data"].get(name, getattr(Data, name))  # earlier versions have no end_token
        if getattr(data, name) != prepared_value:
            raise UserError(
                f"data.{name} is {getattr(data, name)}, expected {prepared_value} as in {directory}"
            )
    tokenizer, recorded = data.tokenizer, index["data"]["tokenizer"]
    if not tokenizer.path:
        if not recorded.get("path"):
            _check_tokenizer_settings(tokenizer, recorded, directory)
        return
    # Not the digest in the index, of which earlier versions left out added tokens and scores.
    if tokenizer_digest(tokenizer.path, tokenizer.lowercase) != tokenizer_digest(directory / "tokenizer"):
        raise UserError(
            f"data.tokenizer.path is {tokenizer.path}, another tokenizer than that of {directory}, expected "
            f"the same as {directory / 'tokenizer'}"
        )
    named = role_tokens(load_vocabulary(tokenizer.path, tokenizer.lowercase))
    prepared = role_tokens(load_vocabulary(directory / "tokenizer"))
    for role, token in prepared.items():
        if named[role] != token:
            raise UserError(
                f"data.tokenizer.path is {tokenizer.path}, where {role}_token is {named[role]!r}, expected "
                f"{token!r} as in {directory / 'tokenizer'}"
            )


def _check_tokenizer_settings(tokenizer: Tokenizer, recorded: dict[str, Any], directory: Path) -> None:
    """Raise UserError for a tokenizer training setting that differs from the rows'."""
    for name in ("vocab_size", "alphabet_size", "lowercase", "sample_megabytes"):
        value, default = getattr(tokenizer, name), getattr(Tokenizer, name)
        prepared_value = recorded.get(name, default)  # an earlier version may not have had the setting
        if value not in (default, prepared_value):
            raise UserError(f"data.tokenizer.{name} is {value}, expected {prepared_value} as in {directory}")


def _sources_differ(directory: Path, data: Data) -> bool:
    """Whether the sources in the config differ from those of the rows, weights aside."""
    recorded_sources = json.loads((directory / "index.json").read_text(encoding="utf-8"))["data"]["sources"]
    config_sources = [dataclasses.asdict(source) for source in data.sources]
    return [{**source, "weight": 0} for source in config_sources] != [
        {**source, "weight": 0} for source in recorded_sources
    ]


def _download(url: str) -> Path:
    """Copy the prepared rows at a URL to the cache, into a directory named after a hash of their index."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
        index = fs.cat_file(f"{root.rstrip('/')}/index.json")
        out = runtime_env.make_cache_dir() / f"copy-{hashlib.sha256(index).hexdigest()[:16]}"
        if read_dataset_index(out) is not None:
            return out
        with _file_lock(out), atomic_dir(out) as partial:
            logger.info(f"prepare: copying {url} to {out}")
            for name in fs.find(root):
                target = partial / fs._strip_protocol(name).removeprefix(root).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(name, str(target))
            commit_dir(partial, out)
        return out
    except UserError:
        raise
    except Exception as error:  # every file system raises its own types
        raise UserError(
            f"data.path is {url}: {type(error).__name__}: {' '.join(str(error).split())[:200]}, expected "
            f"prepared rows; run dwt prepare --config=... --workdir=DIR and copy DIR there"
        ) from None


@contextlib.contextmanager
def _file_lock(out: Path) -> Iterator[None]:
    """Hold a lock while `out` is written, so that the processes of one machine do the work once.

    The lock only saves work: without it, and on other machines, each process does the work and the first
    result is used.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            try:
                lock = acquire_lock(path)
            except Timeout:
                logger.info(f"prepare: waiting for another process that writes {out}")
                lock = acquire_lock(path, wait=True)
            if lock is not None:
                stack.callback(lock.release)
        except OSError:
            pass
        yield
