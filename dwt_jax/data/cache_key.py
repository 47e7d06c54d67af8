"""Hashes that identify rows: by the config and the input files, and by all that the rows depend on."""

import dataclasses
import hashlib
import json
from typing import Any

from dwt_jax.config import Data, Source
from dwt_jax.data.encode import EncodeConfig
from dwt_jax.data.shards import FORMAT_VERSION
from dwt_jax.data.sources import source_files
from dwt_jax.data.tokenizer import tokenizer_digest

ROW_RULES = 2
"""Version of the rules by which text becomes rows. Where they give the rows of version 1, no hash has it."""


def data_cache_key(data: Data) -> str:
    """Return 16 hex digits that identify the rows of `data` in the cache.

    They are a hash of everything in the config that the rows depend on, and of the name, size and
    modification time of each input file. Of these only the tokenizer's files are read.

    Raises:
        UserError: for sources without files, and as the tokenizer does.
    """
    fields: dict[str, Any] = {  # under the names of the first version, so that its cached rows stay valid
        "sequence_length": data.sequence_length,
        "mode": data.row_mode,
        "held_out": data.validation_fraction,
        "keep_every": data.sentence_stride,
    }
    tokenizer = data.tokenizer
    if tokenizer.path:
        fields["tokenizer"] = tokenizer_digest(tokenizer.path, tokenizer.lowercase)
    else:
        fields["tokenizer"] = dataclasses.asdict(tokenizer)
        if not tokenizer.alphabet_size:
            del fields["tokenizer"]["alphabet_size"]
    if data.end_token != Data.end_token:
        fields["end_token"] = data.end_token
    if not _has_rows_of_first_version(data):
        fields["rules"] = ROW_RULES
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


def _has_rows_of_first_version(data: Data) -> bool:
    """Whether the rules change nothing for this text, so that its cached rows stay valid.

    The built-in corpus has fewer than 100 characters, and ends of sentences in English only.
    """
    tokenizer = data.tokenizer
    is_same_tokenizer = tokenizer.path or (tokenizer.vocab_size >= 1000 and tokenizer.sample_megabytes >= 100)
    return _is_builtin(data) and data.row_mode != "sentence" and bool(is_same_tokenizer)


def _is_builtin(data: Data) -> bool:
    return all(source.kind == "builtin" for source in data.sources)


def rows_digest(config: EncodeConfig, data: Data, sources: list[dict[str, Any]]) -> str:
    """Return a hash of everything that the rows depend on, and nothing else: no file names, no weights.

    Args:
        config: of the encoding.
        data: the config section.
        sources: entries with the `digest` and the `counts` of each source.
    """
    settings = [config.tokenizer_digest, config.length, config.row_mode]
    settings += [config.sentence_stride, config.validation_fraction]
    content: list[Any] = [FORMAT_VERSION, settings, [source["digest"] for source in sources]]
    by_sentences = config.row_mode != "wrapped" or config.sentence_stride > 1
    is_cut = any(source["counts"].num_long for source in sources)
    if config.row_mode == "sentence" or (by_sentences and not _is_builtin(data)) or is_cut:
        content.append(ROW_RULES)
    if config.by_parts:
        content.append("by parts")
    if data.end_token != Data.end_token:
        content.append(f"end token of {data.end_token}")
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
