import dataclasses
import json
import os

import fsspec
import pytest

from dwt_jax.config import Data, Source, Tokenizer
from dwt_jax.data.cache_key import data_cache_key
from dwt_jax.data.data_cache import get_prepared
from dwt_jax.data.prepare import prepare_data
from dwt_jax.data.shards import read_dataset_index
from dwt_jax.errors import UserError
from dwt_jax.models.tokenizer_defaults import WORDPIECE_TOKENS
from helpers.prepared_data import (
    data_config,
    file_hashes,
)


def test_cache_is_reused_until_config_or_files_change(
    tokenizer_dir, corpus, tmp_path, monkeypatch, log_lines
):
    monkeypatch.setenv("DWT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dwt_jax.data.prepare._cpu_count", lambda: 1)
    data = data_config(tokenizer_dir, corpus)
    path = get_prepared(data)
    assert path.parent == tmp_path / "cache"
    assert path.name.startswith("data-")
    assert log_lines
    log_lines.clear()
    assert get_prepared(dataclasses.replace(data, prefetch=7)) == path
    assert not log_lines
    assert get_prepared(dataclasses.replace(data, sentence_stride=2)) != path
    os.utime(corpus.path, ns=(1, 1))
    assert get_prepared(data) != path


def test_keys_of_the_first_version_stay_where_its_rows_do(corpus):
    """The keys are those of version 66c6c31."""
    builtin = Data(row_mode="wrapped", sequence_length=64, tokenizer=Tokenizer(vocab_size=2048))
    assert data_cache_key(builtin) == "178a9978c8b37070"
    packed = Data(row_mode="packed", sentence_stride=4)
    assert data_cache_key(packed) == "8c37a2817dfa4e4a"
    assert data_cache_key(dataclasses.replace(packed, max_lost_share=0.5)) == "8c37a2817dfa4e4a"
    tokenizer = Tokenizer(vocab_size=2048, alphabet_size=50)
    assert data_cache_key(dataclasses.replace(builtin, tokenizer=tokenizer)) != "178a9978c8b37070"


@pytest.mark.slow
def test_rows_of_the_builtin_corpus_stay(tmp_path):
    data = Data(row_mode="wrapped", sequence_length=64, tokenizer=Tokenizer(vocab_size=2048))
    index = prepare_data(data, tmp_path / "rows", workers=1)
    assert index["digest"].startswith("33b2549cc0754535")


def test_data_path_must_match_the_config(tokenizer_dir, corpus, tmp_path):
    data = data_config(tokenizer_dir, corpus)
    out = tmp_path / "out"
    prepare_data(data, out, workers=1)
    assert get_prepared(dataclasses.replace(data, path=str(out))) == out
    without_sources = dataclasses.replace(data, path=str(out), tokenizer=Tokenizer(), sources=(Source(),))
    assert get_prepared(without_sources) == out
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECE_TOKENS, "a"]))
    for change, message in [
        ({"sequence_length": 64}, "data.sequence_length is 64, expected 32"),
        ({"row_mode": "sentence"}, "data.row_mode is sentence, expected wrapped"),
        ({"tokenizer": Tokenizer(path=str(tmp_path / "vocab.txt"))}, "data.tokenizer.path is .*vocab.txt"),
        (
            {"path": str(tmp_path / "gone")},
            "does not exist, expected prepared rows; run dwt prepare --config",
        ),
        ({"path": str(tmp_path)}, "holds no index.json, expected prepared rows; run dwt prepare --config"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            get_prepared(dataclasses.replace(data, **{"path": str(out), **change}))
        assert "\n" not in str(error.value)
    (out / "index.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="format 0, expected 1"):
        get_prepared(dataclasses.replace(data, path=str(out)))


def test_settings_of_a_tokenizer_to_train_are_those_of_the_rows(corpus, tmp_path):
    """Another vocabulary on the command line would have no effect; one that is not named need not be."""
    data = data_config("", corpus)
    trained = Tokenizer(vocab_size=120, lowercase=False)
    data = dataclasses.replace(data, tokenizer=trained, path="")
    prepare_data(data, tmp_path / "out", workers=1)
    data = dataclasses.replace(data, path=str(tmp_path / "out"))
    for tokenizer in (trained, Tokenizer(), Tokenizer(vocab_size=120)):
        assert get_prepared(dataclasses.replace(data, tokenizer=tokenizer)) == tmp_path / "out"
    for name, value, prepared in (("vocab_size", 130, 120), ("alphabet_size", 30, 0)):
        other = dataclasses.replace(data, tokenizer=dataclasses.replace(trained, **{name: value}))
        with pytest.raises(UserError, match=rf"tokenizer\.{name} is {value}, expected {prepared} as in"):
            get_prepared(other)


def test_data_path_url_is_copied_once(tokenizer_dir, corpus, tmp_path, monkeypatch, log_lines):
    monkeypatch.setenv("DWT_CACHE", str(tmp_path / "cache"))
    data = data_config(tokenizer_dir, corpus)
    prepare_data(data, tmp_path / "out", workers=1)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/bucket/rows", recursive=True)
    remote = dataclasses.replace(data, path="memory://bucket/rows")
    path = get_prepared(remote)
    assert file_hashes(path) == file_hashes(tmp_path / "out")
    log_lines.clear()
    assert get_prepared(remote) == path
    assert not log_lines
    assert not [child for child in path.parent.iterdir() if "partial" in child.name]
    for url, message in (("memory://bucket/none", "FileNotFoundError"), ("nonesuch://x", "ValueError")):
        with pytest.raises(UserError, match=f"data.path is {url}: {message}"):
            get_prepared(dataclasses.replace(data, path=url))


def test_index_with_old_key_names_is_read(tokenizer_dir, corpus, tmp_path):
    """As versions wrote it in which the keys of the config had other names."""
    data = data_config(tokenizer_dir, corpus, sentence_stride=2)
    out = tmp_path / "out"
    index = prepare_data(data, out, workers=1)
    old = dict(index)
    old["mode"] = old.pop("row_mode")
    old["data"] = dict(index["data"])
    for name, old_name in {
        "row_mode": "mode",
        "validation_fraction": "held_out",
        "sentence_stride": "keep_every",
    }.items():
        old["data"][old_name] = old["data"].pop(name)
    (out / "index.json").write_text(json.dumps(old))
    assert read_dataset_index(out) == index
    assert prepare_data(data, out) == index
    assert get_prepared(dataclasses.replace(data, path=str(out))) == out
    with pytest.raises(UserError, match=r"data\.sentence_stride is 3, expected 2"):
        get_prepared(dataclasses.replace(data, path=str(out), sentence_stride=3))
