"""Hashes that identify rows: of the config and input files, or of everything that the rows depend on."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from dwt_jax.config import Data, Source
from dwt_jax.data.encode import EncodeConfig, begins_words_by_space
from dwt_jax.data.hf_tokenizer import load_hf_tokenizer
from dwt_jax.data.shards import FORMAT_VERSION
from dwt_jax.data.sources import source_files
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary, tokenizer_digest
from dwt_jax.models.tokenizer_defaults import BYTE_LEVEL_TOKENS, TOKEN_ROLES, WORDPIECE_TOKENS

ROW_RULES = 2
"""Version of the rules by which text becomes rows. Where they give the rows of version 1, no hash has it."""

_USUAL_TOKENS = WORDPIECE_TOKENS, BYTE_LEVEL_TOKENS
"""By role. Rows of tokenizers with these keep the hash that they had before roles belonged to it."""


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
        vocab = load_vocabulary(tokenizer.path, tokenizer.lowercase)
        if word_rule := _word_rule(tokenizer.path, vocab, tokenizer.lowercase):
            fields["words"] = word_rule
        roles = role_tokens(vocab)
        if tuple(roles.values()) not in _USUAL_TOKENS:
            fields["special_tokens"] = roles
    else:
        fields["tokenizer"] = dataclasses.asdict(tokenizer)
        if not tokenizer.alphabet_size:
            del fields["tokenizer"]["alphabet_size"]
    if data.end_token != Data.end_token:
        fields["end_token"] = _end_rule(data)
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


def _end_rule(data: Data) -> str:
    """What end tokens stand behind. Before, sentences lacked that of the last document of each chunk."""
    return "all documents" if data.row_mode == "sentence" else data.end_token


def _is_builtin(data: Data) -> bool:
    return all(source.kind == "builtin" for source in data.sources)


def _word_rule(path: str | Path, vocab: Vocabulary, lowercase: bool = True) -> dict[str, Any]:
    """How the tokenizer tells words apart, where the names of its parts suggest another rule.

    Versions before this one went by the names, so the rows of the other tokenizers keep their hash.

    Args:
        path: of a tokenizer, as for `load_hf_tokenizer`.
        vocab: its vocabulary.
        lowercase: as for `load_hf_tokenizer`.
    """
    tokenizer = load_hf_tokenizer(path, lowercase)
    settings = json.loads(tokenizer.to_str())
    if settings["model"].get("continuing_subword_prefix"):
        return {}
    prefix = vocab.word_prefix
    by_space = begins_words_by_space(tokenizer, prefix)
    parts = json.dumps([settings["normalizer"], settings["pre_tokenizer"]])
    suggested = "Ġ" if '"ByteLevel"' in parts else "▁" if '"Metaspace"' in parts else ""
    # Where a byte-level tokenizer adds the space itself, a text that begins with one has the same ids.
    is_suggested = prefix == suggested and (prefix == "Ġ" or not by_space)
    return {} if is_suggested else {"prefix": prefix, "by_space": by_space}


def role_tokens(vocab: Vocabulary) -> dict[str, str | None]:
    """Return the special token of each role, such as the begin token; None if there is none.

    A tokenizer's digest covers all tokens, but not their roles.
    """
    ids = {role: getattr(vocab, f"{role}_id") for role in TOKEN_ROLES}
    return {role: vocab.tokens[i] if i >= 0 else None for role, i in ids.items()}


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
        content.append(f"end token of {_end_rule(data)}")
    vocab = load_vocabulary(config.tokenizer)
    if word_rule := _word_rule(config.tokenizer, vocab):
        content.append(word_rule)
    roles = role_tokens(vocab)
    frame = roles["cls"], roles["sep"]
    if frame not in {(usual.cls, usual.sep) for usual in _USUAL_TOKENS}:
        content.append(frame)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
