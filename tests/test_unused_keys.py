"""Keys that have a value but no effect, in a config as the user wrote it."""

import pytest

from dwt_jax.config_loader import build_config, load_config, load_data_config
from dwt_jax.errors import UserError
from dwt_jax.finetune.config import load_finetune_config

TEXT = {"data.sources.0.kind": "text", "data.sources.0.path": "a.txt"}
GROWN = {"init.method": "net2net", "init.from": "m"}
RATE = "optimizer.learning_rate"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config():\n    return {'train': {'steps': 9}}\n")
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {RATE: "1e-3", f"{RATE}.end": "1e-5"},
            rf"{RATE}\.end is 1e-05, expected {RATE}\.kind 'linear' or 'cosine'",
        ),
        (
            {RATE: "1e-3", f"{RATE}.decay_start": "0.5"},
            r"decay_start is 0\.5, expected .*\(it is 'constant'\)",
        ),
        (
            {f"{RATE}.kind": "piecewise", f"{RATE}.decay_end": "0.5"},
            r"decay_end is 0\.5, .*it is 'piecewise'",
        ),
        (
            {"mlm.probability": "0.4", "mlm.probability.end": "0.2"},
            r"; for a constant, give a number .*: mlm\.probability=0\.4",
        ),
        (
            {f"{RATE}.kind": "piecewise", f"{RATE}.end": "1e-5"},
            r"learning_rate\.decay_start is 0, expected more than 0 with kind 'piecewise'",
        ),
        ({"teacher.path": "t", "distill.temperature.end": "2"}, r"distill\.temperature\.end is 2\.0"),
        ({"data.sources.0.path": "a.txt"}, r"data\.sources\.0\.path is 'a\.txt', expected .*it is 'builtin'"),
        (
            {**TEXT, "data.sources.0.field": "body"},
            r"0\.field is 'body', expected .*\.kind 'jsonl' or 'csv' or 'parquet' or 'tfds'",
        ),
        (
            {**TEXT, "data.sources.0.split": "test"},
            r"0\.split is 'test', expected data\.sources\.0\.kind 'tfds'",
        ),
        (
            {**TEXT, "data.sources.0.documents": "lines", "data.sources.0.blank_lines": "2"},
            r"blank_lines is 2, expected data\.sources\.0\.documents 'blank_lines' with it",
        ),
        (
            {"data.tokenizer.path": "t", "data.tokenizer.vocab_size": "500"},
            r"vocab_size is 500, expected data\.tokenizer\.path empty with it",
        ),
        (
            {**GROWN, "init.learning_steps": "7"},
            r"init\.learning_steps is 7, expected init\.method 'ligo' with",
        ),
        (
            {**GROWN, "init.gate_warmup": "0.5"},
            r"gate_warmup is 0\.5, expected model\.gated_layers or model\.w",
        ),
    ],
)
def test_a_key_of_another_kind_is_refused(config_file, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file, overrides)
    build_config({"train": {"steps": 9}}, overrides)  # the config of an older run remains readable


@pytest.mark.parametrize(
    "overrides",
    [
        {f"{RATE}.kind": "cosine", f"{RATE}.end": "1e-5", f"{RATE}.decay_end": "0.9"},
        {f"{RATE}.kind": "piecewise", f"{RATE}.end": "1e-5", f"{RATE}.decay_start": "0.9"},
        {**TEXT, "data.sources.0.documents": "blank_lines", "data.sources.0.blank_lines": "2"},
        {"data.sources.0.kind": "jsonl", "data.sources.0.path": "a", "data.sources.0.field": "body"},
        {**GROWN, "init.method": "ligo", "init.learning_steps": "7"},
        {**GROWN, "init.gate_warmup": "0.5", "model.gated_layers": "true"},
    ],
)
def test_a_key_of_the_kind_is_taken(config_file, overrides):
    load_config(config_file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer.kind": "adamw"},
        {f"{RATE}.kind": "constant"},
        {"data.sources.0.kind": "builtin"},
    ],
)
def test_a_kind_of_the_command_line_wins_over_the_file(tmp_path, overrides):
    """What the file has for another kind has no effect, and the user has said so."""
    path = tmp_path / "config.py"
    rate = {"kind": "cosine", "value": 1e-2, "end": 1e-5}
    source = {"kind": "text", "path": "a.txt", "documents": "lines"}
    optimizer = {"kind": "muon", "ns_steps": 3, "learning_rate": rate}
    config = {"train": {"steps": 9}, "optimizer": optimizer, "data": {"sources": [source]}}
    path.write_text(f"def get_config():\n    return {config}\n")
    load_config(str(path), overrides)
    (key,) = overrides
    group = {"optimizer.kind": "ns_steps", f"{RATE}.kind": "end", "data.sources.0.kind": "path"}[key]
    again = f"{key.removesuffix('kind')}{group}"
    with pytest.raises(UserError, match=rf"{again} is .*, expected {key} "):
        load_config(str(path), overrides | {again: "7" if group != "end" else "0.7"})


def test_preparing_refuses_keys_of_another_source_kind(config_file):
    with pytest.raises(UserError, match=r"data\.sources\.0\.path is 'a\.txt', expected"):
        load_data_config(config_file, {"data.sources.0.path": "a.txt"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"examples.train": "a.tsv"},
            r"examples\.train is 'a\.tsv', expected examples\.kind 'files' with it",
        ),
        ({"examples.labels": "a,b"}, r"examples\.labels is \['a', 'b'\], expected examples\.kind 'files'"),
        ({"examples.path": "GLUE"}, r"examples\.path is 'GLUE', expected examples\.kind 'glue' or 'tfds'"),
        ({"recipe.optimizer.momentum": "0.9"}, r"recipe\.optimizer\.momentum is 0\.9, expected .* 'muon'"),
    ],
)
def test_fine_tuning_refuses_keys_of_another_kind(tmp_path, overrides, message):
    path = tmp_path / "config.py"
    path.write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=message):
        load_finetune_config(str(path), overrides)
