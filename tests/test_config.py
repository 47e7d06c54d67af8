import dataclasses
import importlib
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder, required_placeholder

from dwt_jax.config import Config, Schedule, Source
from dwt_jax.config_checks import check
from dwt_jax.config_loader import (
    build_config,
    build_dataclass,
    config_to_dict,
    flatten_dict,
    load_config,
    read_config_file,
    split_spec,
)
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.finetune.config import FinetuneConfig
from helpers.paths import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PRETRAINING = [path for path in CONFIGS if path.stem != "glue"]  # of fine-tuning: finetune/test_datasets.py
MINIMAL = {"train": {"steps": 1}, "teacher": {"path": "somewhere"}}


def complaint(raw, overrides=None):
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        build_config(raw, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def with_(dotted, value):
    """MINIMAL with one value put in, as a config file would have it."""
    tree = json.loads(json.dumps(MINIMAL))
    node = tree
    *parents, last = dotted.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return tree


def test_defaults_are_berts():
    model = build_config(MINIMAL).model
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig()
    for field in dataclasses.fields(model):
        if field.name not in ("vocab_size", "num_hidden_layers", "weighted_norm", "gated_layers"):
            assert getattr(model, field.name) == getattr(bert, field.name), field.name


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trian.steps", "train"),
        ("train.stpes", "train.steps"),
        ("model.hiden_size", "model.hidden_size"),
        ("distill.alpha_sotf.value", "distill.alpha_soft"),
        ("distill.alpha_soft.vlaue", "distill.alpha_soft.value"),
        ("optimizer.learning_rate.warmup_fractions", "optimizer.learning_rate.warmup_fraction"),
        ("data.tokenizer.vocabsize", "data.tokenizer.vocab_size"),
    ],
)
def test_a_typo_gets_a_suggestion_from_file_and_command_line(key, meant):
    wrong = next(part for part in key.split(".") if part not in flatten_names())
    for message in (complaint(with_(key, 1)), complaint(MINIMAL, {key: "1"})):
        assert "unknown key" in message
        assert wrong in message
        assert f"did you mean '{meant}'?" in message


def flatten_names():
    return {part for key in flatten_dict(config_to_dict(Config())) for part in key.split(".")}


def test_a_key_like_no_other_gets_the_list():
    message = complaint(MINIMAL, {"zzz": "1"})
    for field in dataclasses.fields(Config):
        assert field.name in message


def test_did_you_mean():
    assert did_you_mean("stpes", ["steps", "epochs"]) == "; did you mean 'steps'?"
    assert did_you_mean("qqq", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("qqq", []) == ""


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.steps", "many", "whole number"),
        ("train.steps", 1.5, "whole number"),
        ("train.steps", True, "whole number"),
        ("train.steps", None, "whole number"),
        ("train.steps", [3], "whole number"),
        ("train.steps", {"value": 3}, "whole number"),
        ("train.steps", float("nan"), "whole number"),
        ("train.steps", float("inf"), "whole number"),
        ("mlm.probability", "half", "number"),
        ("mlm.probability", False, "number"),
        ("optimizer.learning_rate.value", float("nan"), "number"),
        ("train.tensorboard", "yes", "true or false"),
        ("train.tensorboard", 1, "true or false"),
        ("teacher.path", 3, "text"),
        ("teacher.path", None, "text"),
        ("model.hidden_act", "gelu_nwe", "did you mean 'gelu_new'?"),
        ("model.hidden_act", 3, "known: gelu, gelu_10,"),
        ("distill.divergence", "forwardkl", "did you mean 'forward_kl'?"),
        ("distill.preset", "paper_nromal", "did you mean 'paper_normal'?"),
        ("distill.preset", ["paper_normal"], "distill.preset"),
        ("distill.alpha_soft.kind", "lineal", "did you mean 'linear'?"),
        ("data.row_mode", "pakced", "did you mean 'packed'?"),
        ("data.sources", "builtin", "list"),
        ("data.sources", {"kind": "text"}, "list"),
        ("data.sources", ["builtin"], "data.sources.0"),
        ("data.sources", [{"kind": "txet", "path": "x"}], "data.sources.0.kind"),
        ("optimizer.learning_rate", "fast", "a number or a group with the keys kind, value, end"),
        ("optimizer.learning_rate", None, "a number or a group"),
        ("distill.temperature", [2], "a number or a group"),
        ("distill.temperature", True, "a number or a group"),
        ("mlm.probability", float("nan"), "a number or a group"),
        ("mlm.probability.boundaries", 0.5, "list"),
        ("mlm.probability.boundary_values", ["x"], "mlm.probability.boundary_values.0"),
        ("optimizer.learning_rate.decay_type", "sqrt", "did you mean '1-sqrt'?"),
        ("train", 5, "train.steps"),
        ("model", None, "model.hidden_size"),
    ],
)
def test_a_wrong_type_in_a_file(key, value, expected):
    message = complaint(with_(key, value))
    assert key in message
    assert expected in message


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.steps", "1.5", "whole number"),
        ("train.steps", "", "whole number"),
        ("train.steps", "1e400", "whole number"),
        ("train.steps", "1e-400", "whole number"),
        ("optimizer.learning_rate", "1e400", "a number"),
        ("optimizer.learning_rate", "-1.0E-400", "a number"),
        ("train.steps", "nan", "whole number"),
        pytest.param("optimizer.learning_rate.value", "9" * 310, "a number", id="310 digits"),
        pytest.param("mlm.probability", "9" * 310, "a number", id="a schedule of 310 digits"),
        ("train.steps.value", "3", "train.steps"),
        ("train.steps.value.deep", "3", "train.steps"),
        ("train", "3", "train.steps"),
        ("mlm.probability", "0,15", "number"),
        ("mlm.whole_word", "yes", "true or false"),
        ("model.hidden_act", "maxout", "known: gelu, gelu_10,"),
        ("data.sources", "[{", "JSON"),
        ("data.sources", "3", "list"),
        ("data.sources.1.path", "x", "number below 1"),
        ("data.sources.first.path", "x", "number below 1"),
        ("data.sources.-1.path", "x", "number below 1"),
        ("data.sources.\u00b2.path", "x", "number below 1"),
        ("data.sources.0", "x", "data.sources.0"),
        ("data.sources.0.pth", "x", "did you mean 'data.sources.0.path'?"),
        ("data.sources.0.weight", "heavy", "data.sources.0.weight"),
        ("optimizer.learning_rate", "3e-3x", "a number or a group with the keys kind, value, end"),
        ("mlm.probability.boundaries", "0.5,x", "mlm.probability.boundaries.1 is 'x', expected a number"),
        ("mlm.probability.boundaries", "[0.5", "JSON"),
        ("mlm.probability.boundaries.0", "0.5", "the whole list: --config.mlm.probability.boundaries=[…]"),
    ],
)
def test_a_wrong_type_on_the_command_line(key, text, expected):
    message = complaint(MINIMAL, {key: text})
    assert key.rpartition(".")[0] in message
    assert expected in message


def test_an_index_into_a_source_that_is_no_group():
    message = complaint(with_("data.sources", ["corpus.txt"]), {"data.sources.0.path": "x"})
    assert "data.sources.0" in message


@pytest.mark.parametrize("overrides", [{"data.sources.0.path": "x"}, {"train.steps": "3"}])
def test_a_group_that_is_none_with_a_key_below_it(overrides):
    complaint({"data": None, "train": None}, overrides)


STAGES = {
    "mlm.probability": 0.4,
    "mlm.probability.kind": "piecewise",
    "mlm.probability.boundaries": [0.3, 0.6],
    "mlm.probability.boundary_values": [0.3, 0.2],
}
RAMP = {"train.batch_ramp": [4, 8], "train.batch_ramp_fraction": 0.3}
IMPOSSIBLE = [
    # (settings, the key that the message must name)
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"distill.preset": "paper_normal", "teacher.path": ""}, "teacher.path"),
    ({"distill.alpha_hard.value": 0, "teacher.path": ""}, "teacher.path"),
    ({"model.hidden_size": 0}, "model.hidden_size"),
    ({"model.num_hidden_layers": 0}, "model.num_hidden_layers"),
    ({"model.num_attention_heads": 0}, "model.num_attention_heads"),
    ({"model.intermediate_size": 0}, "model.intermediate_size"),
    ({"model.max_position_embeddings": 0}, "model.max_position_embeddings"),
    ({"model.type_vocab_size": 0}, "model.type_vocab_size"),
    ({"model.vocab_size": -1}, "model.vocab_size"),
    ({"model.pad_token_id": -1}, "model.pad_token_id"),
    ({"model.hidden_size": 770}, "num_attention_heads"),
    ({"train.watchdog": -1}, "train.watchdog"),
    ({"model.hidden_dropout_prob": 1}, "model.hidden_dropout_prob"),
    ({"model.hidden_dropout_prob": -0.1}, "model.hidden_dropout_prob"),
    ({"model.attention_probs_dropout_prob": 1}, "model.attention_probs_dropout_prob"),
    ({"model.layer_norm_eps": 0}, "model.layer_norm_eps"),
    ({"model.initializer_range": 0}, "model.initializer_range"),
    ({"data.sequence_length": 513}, "model.max_position_embeddings"),
    ({"data.sequence_length": 7}, "data.sequence_length"),
    ({"data.sentence_stride": 0}, "data.sentence_stride"),
    ({"data.prefetch": 0}, "data.prefetch"),
    ({"data.validation_fraction": 0}, "data.validation_fraction"),
    ({"data.validation_fraction": 1}, "data.validation_fraction"),
    ({"data.sources": "[]"}, "data.sources"),
    ({"data.sources.0.kind": "text"}, "data.sources.0.path"),
    ({"data.sources.0.weight": 0}, "data.sources.0.weight"),
    ({"data.sources.0.blank_lines": 0}, "data.sources.0.blank_lines"),
    ({"data.tokenizer.vocab_size": 99}, "data.tokenizer.vocab_size"),
    ({"data.tokenizer.sample_megabytes": 0}, "data.tokenizer.sample_megabytes"),
    ({"data.tokenizer.alphabet_size": -1}, "data.tokenizer.alphabet_size"),
    ({"data.max_lost_share": 1.1}, "data.max_lost_share"),
    ({"mlm.probability": 0}, "mlm.probability"),
    ({"mlm.probability": 1}, "mlm.probability"),
    ({"mlm.probability": 0.003}, "mlm.probability"),  # 0.4 of a token
    ({"mlm.probability": 0.4, "mlm.probability.kind": "linear"}, "mlm.probability goes to 0.0"),
    ({"mlm.probability": 0.4, "mlm.probability.warmup_fraction": 0.1}, "mlm.probability"),  # rises from 0
    ({"mlm.probability.kind": "linear", "mlm.probability.end": 0.4}, "mlm.probability goes to 1.0"),
    ({"mlm.probability": 0.4, "mlm.probability.kind": "until_matched"}, "mlm.probability.kind"),
    ({**STAGES, "mlm.probability.boundaries": [0.5]}, "mlm.probability.boundary_values"),
    ({**STAGES, "mlm.probability.boundaries": [0.5, 0.5]}, "mlm.probability.boundaries"),
    ({**STAGES, "mlm.probability.boundaries": [0, 0.5]}, "mlm.probability.boundaries"),
    ({**STAGES, "mlm.probability.boundaries": [0.5, 1]}, "mlm.probability.boundaries"),
    ({**STAGES, "mlm.probability.kind": "constant"}, "mlm.probability.kind"),
    ({**STAGES, "mlm.probability.end": 0.2}, "mlm.probability.end"),
    ({**STAGES, "mlm.probability.decay_start": 0.2}, "decay_start"),
    ({**STAGES, "mlm.probability.boundary_values": [0.3, 1]}, "mlm.probability goes to 1.0"),
    ({**STAGES, "mlm.probability.boundary_values": [0.3, -1]}, "mlm.probability.boundary_values"),
    ({"optimizer.learning_rate.decay_type": "1-sqrt"}, "optimizer.learning_rate.decay_type"),
    ({"mlm.mask_token_share": -0.1}, "mlm.mask_token_share"),
    ({"mlm.random_token_share": 1.1}, "mlm.random_token_share"),
    ({"mlm.mask_token_share": 0.8, "mlm.random_token_share": 0.3}, "mlm.random_token_share"),
    ({"init.method": "net2net", "teacher.path": ""}, "init.from"),
    ({"init.from": "x"}, "init.method"),
    ({"init.gate_warmup": 0.5}, "init.method"),
    ({"init.method": "aki", "init.noise": -1}, "init.noise"),
    ({"init.method": "aki", "init.gate_warmup": 1.1}, "init.gate_warmup"),
    ({"init.method": "stack+ligo", "teacher.path": "x"}, "init.method"),
    ({"init.method": "ligo", "teacher.path": "x", "init.step": 1}, "init.method"),
    ({"init.method": "ligo", "teacher.path": "x", "init.learning_steps": 0}, "init.learning_steps"),
    ({"init.method": "aki", "init.new_param_warmup": 1.1}, "init.new_param_warmup"),
    ({"init.method": "aki", "teacher.path": "x", "train.steps": 9, "init.step": 9}, "init.step"),
    ({"distill.alpha_hard.value": -1}, "distill.alpha_hard.value"),
    ({"distill.alpha_soft.end": -1}, "distill.alpha_soft.end"),
    ({"distill.alpha_soft.warmup_fraction": 1.5}, "distill.alpha_soft.warmup_fraction"),
    ({"distill.alpha_soft.decay_start": -0.5}, "distill.alpha_soft.decay_start"),
    (
        {"distill.alpha_soft.kind": "linear", "distill.alpha_soft.decay_end": 0},
        "distill.alpha_soft.decay_end",
    ),
    (
        {
            "distill.alpha_soft.kind": "cosine",
            "distill.alpha_soft.decay_start": 0.5,
            "distill.alpha_soft.decay_end": 0.5,
        },
        "distill.alpha_soft.decay_end",
    ),
    (
        {
            "optimizer.learning_rate.kind": "warmup_stable_decay",
            "optimizer.learning_rate.warmup_fraction": 0.5,
            "optimizer.learning_rate.decay_end": 0.4,
        },
        "optimizer.learning_rate.decay_end",
    ),
    ({"distill.alpha_hard.kind": "until_matched"}, "distill.alpha_hard.kind"),
    ({"distill.temperature.kind": "until_matched"}, "distill.temperature.kind"),
    ({"optimizer.learning_rate.kind": "until_matched"}, "optimizer.learning_rate.kind"),
    ({"distill.temperature.value": 0}, "distill.temperature"),
    ({"distill.temperature.kind": "linear"}, "distill.temperature"),  # falls to the default end, 0
    ({"distill.temperature.warmup_fraction": 0.1}, "distill.temperature"),  # rises from 0
    ({"distill.drop_fraction": 1.1}, "distill.drop_fraction"),
    ({"distill.loss_chunk_rows": -1}, "distill.loss_chunk_rows"),
    ({"distill.match_margin": 0}, "distill.match_margin"),
    ({"distill.gap_ema_decay": 1}, "distill.gap_ema_decay"),
    ({"train.steps": 0}, "train.steps"),
    ({"train.steps": -1}, "train.steps"),
    ({"train.steps": 10**12}, "train.steps"),
    ({"train.epochs": -1}, "train.epochs"),
    ({"train.eval_every": -1}, "train.eval_every"),
    ({"train.batch_size": 0}, "train.batch_size"),
    ({"train.gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps"),
    ({"train.gradient_accumulation_steps": 3}, "train.gradient_accumulation_steps"),
    ({"train.save_every": 0}, "train.save_every"),
    ({"train.keep_checkpoints": 0}, "train.keep_checkpoints"),
    ({"train.log_every": 0}, "train.log_every"),
    ({"train.max_consecutive_nonfinite": 0}, "train.max_consecutive_nonfinite"),
    ({"optimizer.weight_decay": -1}, "optimizer.weight_decay"),
    ({"optimizer.clip_norm": -1}, "optimizer.clip_norm"),
    ({"optimizer.eps": -1e-8}, "optimizer.eps"),
    ({"optimizer.eps": 0}, "optimizer.eps"),  # 0 / 0 in the rows of a table that no token asked for
    ({"optimizer.b1": 1}, "optimizer.b1"),
    ({"optimizer.b2": 1}, "optimizer.b2"),
    ({"optimizer.b2": 1 - 1e-9}, "optimizer.b2"),  # 1 in float32
    ({"optimizer.momentum": 1}, "optimizer.momentum"),
    ({"optimizer.ns_steps": 0}, "optimizer.ns_steps"),
    ({"optimizer.adam_lr_ratio": -1}, "optimizer.adam_lr_ratio"),
    ({"optimizer.kind": "muon", "optimizer.adam_lr_ratio": 1e10}, "optimizer.adam_lr_ratio"),
    ({"optimizer.kind": "muon", "optimizer.adam_lr_ratio": 1e6}, "optimizer.weight_decay is 0.01"),
    ({"optimizer.learning_rate.value": 2e6}, "optimizer.learning_rate"),
    ({"optimizer.weight_decay": 1e5}, "optimizer.weight_decay"),
    ({"optimizer.learning_rate.value": -1}, "optimizer.learning_rate.value"),
    ({"mesh.data": 0}, "mesh"),
    ({"mesh.fsdp": -2}, "mesh"),
    ({"mesh.fsdp": -1}, "mesh"),  # the second -1
    ({"mesh.data": 3}, "mesh"),
    (
        {"mesh.data": 8, "train.batch_size": 32, "train.gradient_accumulation_steps": 8},
        "train.gradient_accumulation_steps",
    ),
    ({"train.batch_ramp_fraction": 0.3}, "train.batch_ramp_fraction is 0.3, expected train.batch_ramp"),
    ({"train.batch_ramp": [4, 8]}, "train.batch_ramp_fraction is 0.0, expected a share above 0"),
    ({**RAMP, "train.batch_ramp_fraction": 1.1}, "train.batch_ramp_fraction is 1.1"),
    ({**RAMP, "train.batch_ramp_fraction": -0.3}, "train.batch_ramp_fraction is -0.3"),
    ({**RAMP, "train.batch_ramp": [8, 4]}, "train.batch_ramp is [8, 4], expected increasing"),
    ({**RAMP, "train.batch_ramp": [4, 4]}, "train.batch_ramp is [4, 4], expected increasing"),
    ({**RAMP, "train.batch_ramp": [0, 4]}, "train.batch_ramp is [0, 4], expected increasing"),
    ({**RAMP, "train.batch_size": 8}, "train.batch_ramp is [4, 8], expected increasing"),
    ({**RAMP, "train.gradient_accumulation_steps": 8}, "train.batch_ramp is [4, 8], expected multiples"),
    ({**RAMP, "mesh.data": 8}, "train.batch_ramp is [4, 8], expected multiples"),
    (
        {**RAMP, "mesh.fsdp": 2, "train.gradient_accumulation_steps": 4},
        "train.batch_ramp is [4, 8], expected multiples",
    ),
]


@pytest.mark.parametrize(("overrides", "key"), IMPOSSIBLE, ids=lambda x: str(x)[:60])
def test_impossible_settings(overrides, key):
    message = complaint(MINIMAL, {name: str(value) for name, value in overrides.items()})
    assert key in message
    assert "expected" in message


SCHEDULES = re.compile(
    r"^distill\.(alpha_hard|alpha_soft|temperature)|^optimizer\.learning_rate|^mlm\.probability"
)


def test_every_setting_is_checked_or_free():
    """Every number of Config has an impossible value above, or is listed here as having none."""
    free = set()
    numbers = {
        SCHEDULES.sub("schedule", key)
        for key, value in flatten_dict(config_to_dict(Config())).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    tried = {SCHEDULES.sub("schedule", key) for overrides, _ in IMPOSSIBLE for key in overrides}
    assert numbers - tried - free <= {"mesh.tensor"}


@pytest.mark.parametrize("text", ["1e3", "1000", "1000.0", " 1000 ", "+1000"])
def test_whole_numbers_may_be_written_in_any_way(text):
    steps = build_config(MINIMAL, {"train.steps": text}).train.steps
    assert steps == 1000
    assert type(steps) is int


def test_numbers_of_a_file_take_the_type_of_the_field():
    config = build_config(
        {"train": {"steps": 1e3}, "mlm": {"probability": 0.5}, "distill": {"alpha_hard": {"value": 4}}}
    )
    assert (config.train.steps, type(config.train.steps)) == (1000, int)
    assert (config.distill.alpha_hard.value, type(config.distill.alpha_hard.value)) == (4.0, float)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("1", True), ("0", False)])
def test_truth_on_the_command_line(text, value):
    assert build_config(MINIMAL, {"mlm.whole_word": text}).mlm.whole_word is value


@pytest.mark.parametrize(
    ("text", "seeds"), [("0,1", (0, 1)), (" 3 , 1e3 ", (3, 1000)), ("[0, 1]", (0, 1)), ("7", (7,)), ("", ())]
)
def test_a_list_of_plain_values_may_have_commas_alone(text, seeds):
    config = build_dataclass(FinetuneConfig, {}, {"recipe.seeds": text, "examples.labels": "no, may be"})
    assert config.recipe.seeds == seeds
    assert config.examples.labels == ("no", "may be")


def test_list_indices():
    config = build_config(MINIMAL, {"data.sources.0.weight": "2.5"})
    assert config.data.sources == (Source(weight=2.5),)
    sources = [{"kind": "text", "path": "a"}, {"kind": "jsonl", "path": "b"}]
    config = build_config(with_("data.sources", sources), {"data.sources.1.field": "body"})
    assert config.data.sources == (Source("text", "a"), Source("jsonl", "b", field="body"))
    config = build_config(MINIMAL, {"data.sources": '[{"kind": "text", "path": "c"}]'})
    assert config.data.sources == (Source("text", "c"),)


def test_list_and_its_entries_on_the_command_line():
    overrides = {
        "data.sources": '[{"kind": "text", "path": "a"}, {"kind": "text", "path": "b"}]',
        "data.sources.1.weight": "3",
    }
    assert build_config(MINIMAL, overrides).data.sources == (
        Source("text", "a"),
        Source("text", "b", weight=3),
    )
    message = complaint(MINIMAL, {**overrides, "data.sources.2.weight": "3"})
    assert "'2', expected a number below 2" in message
    for text, expected in {'{"kind": "text"}': "a list", "[": "JSON"}.items():
        message = complaint(MINIMAL, {**overrides, "data.sources": text})
        assert f"data.sources is {text!r}, expected {expected}" in message


def test_what_is_given_is_not_changed():
    raw = with_("data.sources", [{"kind": "text", "path": "a"}])
    raw["distill"] = {"preset": "paper_strong"}
    before = json.dumps(raw)
    build_config(raw, {"data.sources.0.path": "b", "distill.alpha_soft.value": "9"})
    assert json.dumps(raw) == before
    assert build_config({**MINIMAL, "distill": {"preset": "paper_strong"}}).distill.alpha_soft.value == 4


def test_precedence_defaults_preset_file_command_line():
    # Each level says one thing more; each must win over those before it and leave the rest.
    assert build_config(MINIMAL).distill.temperature.value == 1
    raw = with_("distill.preset", "knowledge_inheritance")
    preset = build_config(raw).distill
    assert preset.temperature.value == 2
    assert preset.scale_by_temperature_squared
    assert preset.alpha_hard == Schedule(kind="linear", value=0, end=1, decay_end=0.25)

    raw["distill"]["temperature"] = {"value": 3.0}
    raw["distill"]["alpha_soft"] = {"decay_end": 0.5}
    file = build_config(raw).distill
    assert file.temperature.value == 3
    assert file.alpha_soft == Schedule(kind="linear", value=1, end=0, decay_end=0.5)
    assert file.alpha_hard == preset.alpha_hard

    line = build_config(
        raw, {"distill.temperature.value": "4", "distill.scale_by_temperature_squared": "false"}
    ).distill
    assert line.temperature.value == 4
    assert not line.scale_by_temperature_squared
    assert line.alpha_soft == file.alpha_soft


def test_a_preset_on_the_command_line_is_below_the_file():
    raw = with_("distill.alpha_soft", {"value": 2.0})
    distill = build_config(raw, {"distill.preset": "paper_decay"}).distill
    assert distill.preset == "paper_decay"
    assert distill.alpha_soft == Schedule(kind="linear", value=2.0, end=1.0)
    raw["distill"]["preset"] = "paper_strong"
    assert build_config(raw, {"distill.preset": "custom"}).distill.alpha_soft == Schedule(value=2.0)


def test_the_papers_presets():
    def weights(name):
        distill = build_config(with_("distill.preset", name)).distill
        hard, soft = distill.alpha_hard, distill.alpha_soft
        return (hard.value, soft.value, soft.end if soft.kind == "linear" else soft.value), distill

    expected = {"paper_normal": (1, 1, 1), "paper_strong": (1, 4, 4), "paper_decay": (1, 4, 1)}
    for name, numbers in expected.items():
        found, distill = weights(name)
        assert found == numbers
        assert distill.temperature == Schedule(value=1.0)
        assert not distill.scale_by_temperature_squared  # the paper's formula has no t²


settings_of_a_run = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "train.batch_size": st.integers(1, 10**6),
        "model.layer_norm_eps": st.floats(1e-30, 1),
        "mlm.probability.value": st.floats(0.01, 0.99),
        "mlm.whole_word": st.booleans(),
        "teacher.path": st.text("ab /é\"'", min_size=1, max_size=5),
        "distill.preset": st.sampled_from(["custom", "paper_decay", "knowledge_inheritance"]),
        "distill.alpha_soft.value": st.floats(0, 100),
        "distill.divergence": st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon"]),
        "data.sources.0.weight": st.floats(0.001, 1e6),
        "platform": st.sampled_from(["any", "cpu", "gpu", "tpu"]),
    },
)


@pytest.mark.parametrize("number", [3e-3, 1, "3e-3"])
def test_a_number_in_place_of_a_schedule_is_a_constant(number):
    expected = Schedule(value=float(number))
    if not isinstance(number, str):
        assert build_config(with_("optimizer.learning_rate", number)).optimizer.learning_rate == expected
    for raw in (MINIMAL, with_("optimizer.learning_rate", {"kind": "linear", "warmup_fraction": 0.1})):
        config = build_config(raw, {"optimizer.learning_rate": str(number)})
        assert config.optimizer.learning_rate == expected  # nothing is left of a schedule below it
    preset = with_("distill", {"preset": "paper_decay", "alpha_soft": 2})
    assert build_config(preset).distill.alpha_soft == Schedule(value=2.0)


def test_fields_of_a_schedule_may_be_added_to_a_number():
    expected = Schedule("linear", value=0.4, end=0.15)
    fields = {"mlm.probability.kind": "linear", "mlm.probability.end": "0.15"}
    assert build_config(with_("mlm.probability", 0.4), fields).mlm.probability == expected
    assert build_config(MINIMAL, {"mlm.probability": "0.4", **fields}).mlm.probability == expected
    # The later of two wins.
    assert build_config(MINIMAL, {**fields, "mlm.probability": "0.3"}).mlm.probability == Schedule(value=0.3)


def test_config_json_has_the_fields_of_a_schedule_and_an_older_one_a_number():
    config = build_config(with_("mlm.probability", 0.4))
    written = json.loads(json.dumps(config_to_dict(config)))
    assert written["mlm"]["probability"]["value"] == 0.4
    assert written["mlm"]["probability"]["kind"] == "constant"
    older = {**written, "mlm": {**written["mlm"], "probability": 0.4}}
    older["optimizer"] = json.loads(json.dumps(written["optimizer"]))
    for key in ("decay_type", "boundaries", "boundary_values"):
        del older["optimizer"]["learning_rate"][key]
    assert build_config(older) == config


def test_stages_of_a_file_and_of_the_command_line():
    stages = {
        key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in STAGES.items()
    }
    line = build_config(MINIMAL, stages)
    assert line.mlm.probability == Schedule(
        "piecewise", value=0.4, boundaries=(0.3, 0.6), boundary_values=(0.3, 0.2)
    )
    assert build_config(json.loads(json.dumps(config_to_dict(line)))) == line
    assert line.mlm.probability.stage_values() == (0.4, 0.3, 0.2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(value=3.0, end=9.0), (3,)),
        (Schedule(value=3.0, warmup_fraction=0.1), (0, 3)),
        (Schedule("linear", 3.0, 1.0), (3, 1)),
        (Schedule("piecewise", 3.0, 1.0, decay_start=0.5), (3, 1)),
        (Schedule("until_matched", 3.0, 1.0), (3,)),
    ],
)
def test_stage_values(schedule, expected):
    assert schedule.stage_values() == expected


@given(settings_of_a_run)
@settings(max_examples=100)
def test_config_json_and_back_is_the_same(overrides):
    config = build_config(MINIMAL, {key: str(value) for key, value in overrides.items()})
    for key, value in overrides.items():
        node = config
        for part in key.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        assert node == value
    assert build_config(json.loads(json.dumps(config_to_dict(config)))) == config
    assert build_config(ConfigDict(config_to_dict(config))) == config
    assert (
        build_config({}, {key: _typed(value) for key, value in flatten_dict(config_to_dict(config)).items()})
        == config
    )


def _typed(value):
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("make", [placeholder, required_placeholder])
def test_a_placeholder_is_for_the_command_line(make):
    raw = ConfigDict(MINIMAL)
    raw.train.steps = make(int)
    assert build_config(raw, {"train.steps": "7"}).train.steps == 7
    with pytest.raises(UserError, match=r"config: train\.steps is None, expected a whole number"):
        build_config(raw)
    raw = ConfigDict({**MINIMAL, "data": {"sources": [ConfigDict({"path": make(str), "kind": "text"})]}})
    overrides = {"data.sources.0.path": "corpus.txt"}
    assert build_config(raw, overrides).data.sources[0].path == "corpus.txt"
    with pytest.raises(UserError, match=r"config: data\.sources\.0\.path is None, expected text"):
        build_config(raw)


def test_frozen_config_dict():
    """One with a list of groups cannot be made."""
    raw = FrozenConfigDict({**MINIMAL, "distill": {"alpha_hard": {"kind": "linear", "end": 0.5}}})
    assert build_config(raw) == build_config(raw.to_dict())


def test_flatten_counts_every_plain_value():
    flat = flatten_dict({"a": {"b": 1, "c": [{"d": 2}, {"d": 3}]}, "e": []})
    assert flat == {"a.b": 1, "a.c.0.d": 2, "a.c.1.d": 3}


def test_check_gives_the_config_itself():
    config = build_config(MINIMAL)
    assert check(config) is config
    assert hash(config) == hash(build_config(MINIMAL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def written(tmp_path, text):
    path = tmp_path / "run.py"
    path.write_text(text)
    return str(path)


BROKEN = [
    ("def get_config(:", "SyntaxError"),
    ("import no_such_module_at_all", "no_such_module_at_all"),
    ("x = 1", "get_config"),
    ("def get_config():\n    raise ValueError('first\\nsecond')", "ValueError"),
    ("raise ValueError('first\\nsecond')", "ValueError"),
    (
        "def get_config(arg):\n    return {}",
        "needs an argument (arg)",
    ),  # wants an argument that was not given
    ("def get_config():\n    return None", "get_config"),
    ("def get_config():\n    return [1]", "get_config"),
    (
        "from ml_collections import ConfigDict as C\ndef get_config():\n    c = C({'a': 1})\n    c.a = 'x'",
        "TypeError",
    ),
    (
        "from ml_collections import FrozenConfigDict as F\ndef get_config():\n    return F({'a': [{}]})",
        "Cannot contain a dict",
    ),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_one_line(tmp_path, text, expected):
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "run.py" in str(caught.value)
    assert expected in str(caught.value)


def test_no_such_file(tmp_path):
    for spec in (tmp_path / "no.py", f"{tmp_path / 'no.py'}:arg", tmp_path):
        with pytest.raises(UserError, match="--config: no file"):
            load_config(str(spec))
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(UserError, match="not a Python file"):
        load_config(str(tmp_path / "c.txt"))


def test_the_argument_of_a_file_reaches_it(tmp_path):
    path = written(tmp_path, "def get_config(arg='3'):\n    return {'train': {'steps': int(arg)}}")
    assert load_config(path).train.steps == 3
    assert load_config(f"{path}:7").train.steps == 7
    assert load_config(f"{path}:7", {"train.steps": "8"}).train.steps == 8
    assert isinstance(read_config_file(path), dict)


def write_config_folder(folder, steps):
    """A config that imports a module, a package with a module of its own, and one within get_config."""
    (folder / "parts").mkdir(parents=True)
    (folder / "shared_steps.py").write_text(f"STEPS = {steps}")
    (folder / "parts" / "__init__.py").write_text("from parts.seeds import SEED")
    (folder / "parts" / "seeds.py").write_text(f"SEED = {steps + 1}")
    (folder / "late.py").write_text(f"SIZE = {steps + 2}")
    (folder / "json.py").write_text("raise SystemExit")
    text = "import json, parts, shared_steps\n\ndef get_config():\n    import late\n"
    text += "    train = {'steps': shared_steps.STEPS, 'batch_size': late.SIZE}\n"
    (folder / "run.py").write_text(text + "    return {'seed': parts.SEED, 'train': train}\n")
    return str(folder / "run.py")


def test_config_imports_its_own_neighbors(tmp_path):
    paths_before, names_before = list(sys.path), set(sys.modules)
    for folder, steps in (("a", 10), ("b", 20), ("a", 10)):
        if not (tmp_path / folder).exists():
            write_config_folder(tmp_path / folder, steps)
        config = load_config(str(tmp_path / folder / "run.py"))
        assert (config.train.steps, config.seed, config.train.batch_size) == (steps, steps + 1, steps + 2)
    assert sys.path == paths_before
    assert not {"shared_steps", "parts", "parts.seeds", "late"} & (set(sys.modules) - names_before)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shared_steps")
    assert not list(tmp_path.rglob("__pycache__"))


def test_config_that_loads_another_config_keeps_its_own_neighbors(tmp_path):
    """A config of another folder, loaded between two imports, has neighbors of the same names."""
    write_config_folder(tmp_path / "inner", 20)
    outer = write_config_folder(tmp_path / "outer", 10)
    text = "from dwt_jax.config_loader import read_config_file, sibling_config\nimport shared_steps\n"
    text += "other = sibling_config(__file__, '../inner/run')\n"
    text += "assert other.shared_steps.STEPS == 20 and other.parts.SEED == 21\n"
    text += f"assert read_config_file({str(tmp_path / 'inner' / 'run.py')!r})['train']['steps'] == 20\n"
    (tmp_path / "outer" / "run.py").write_text(text + Path(outer).read_text())
    config = load_config(outer)
    assert (config.train.steps, config.seed, config.train.batch_size) == (10, 11, 12)


@pytest.mark.parametrize("name", ["my:configs", "a folder", "my:configs:2"])
@pytest.mark.parametrize("arg", ["", "7", "7:8"])
def test_the_path_of_a_config_may_have_colons_and_spaces(tmp_path, name, arg):
    path = tmp_path / name / "run.py"
    path.parent.mkdir()
    path.write_text("def get_config(arg=''): return {'seed': int(arg[:1] or 3), 'train': {'steps': 1}}")
    assert split_spec(f"{path}:{arg}" if arg else str(path)) == (str(path), arg)
    assert load_config(f"{path}:{arg}" if arg else str(path)).seed == (7 if arg else 3)
    path.unlink()
    with pytest.raises(UserError, match=rf"no file '{path}'"):
        load_config(f"{path}:{arg}")


@pytest.mark.parametrize(
    "code", ["sys.exit()", "sys.exit('no data')", "argparse.ArgumentParser().error('x')"]
)
@pytest.mark.parametrize("place", ["", "def get_config(): "])
def test_a_config_that_exits_is_an_error(tmp_path, code, place):
    (tmp_path / "run.py").write_text(f"import argparse, sys\n{place}{code}\n")
    with pytest.raises(UserError, match=r"run\.py.*: it calls sys\.exit\(.*\), expected it to return"):
        load_config(str(tmp_path / "run.py"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.path", Path("rows"), "rows"),
        ("train.steps", np.int64(7), 7),
        ("optimizer.learning_rate", np.float32(0.5), Schedule(value=0.5)),
        ("train.tensorboard", np.bool_(False), False),
        ("train.batch_ramp", np.array([2, 4]), (2, 4)),
    ],
)
def test_paths_and_numpy_values_in_a_config(key, value, expected):
    config = build_dataclass(Config, with_(key, value))
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == expected


def test_a_relative_import_is_named(tmp_path):
    (tmp_path / "steps.py").write_text("STEPS = 1")
    (tmp_path / "run.py").write_text("from .steps import STEPS")
    with pytest.raises(UserError, match=r"run\.py fails to load: .* by its name alone \(import NAME, not"):
        load_config(str(tmp_path / "run.py"))


def arguments(path):
    """The arguments that the file's docstring names, or one that any file takes."""
    return sorted(set(re.findall(rf"configs/{path.name}:([^\s'\"]+)", path.read_text()))) or [""]


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_the_configs_of_the_repository(path):
    for arg in arguments(path):
        config = load_config(f"{path}:{arg}" if arg else str(path))
        assert config.train.steps or config.train.epochs
        assert build_config(config_to_dict(config)) == config
    assert len(path.read_text().splitlines()) <= 60
    assert path.read_text().startswith('"""')
    with pytest.raises(UserError):
        load_config(str(path) + ":text", {"model.hiden_size": "1"})


@pytest.mark.parametrize("function", ["build_config", "load_model_config"])
def test_loading_a_config_does_not_import_jax(function, tmp_path):
    """jax reads its settings from the environment when it is imported; the commands make them later."""
    path = tmp_path / "config.py"
    path.write_text("def get_config(): return {'train': {'steps': 1}}")
    argument = repr({"train": {"steps": 1}}) if function == "build_config" else repr(str(path))
    code = f"import sys; from dwt_jax import config_loader; config_loader.{function}({argument}); "
    code += "sys.exit(bool({'jax', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        (
            {"steps": 9},
            {"train.epochs": "50"},
            r"train\.epochs is 50\.0, expected train\.steps 0 with it \(it is 9;",
        ),
        ({}, {"train.epochs": "50", "train.steps": "9"}, r"train\.epochs is 50\.0, expected train\.steps 0"),
        ({"steps": 9, "epochs": 2}, {}, r"train\.epochs is 2\.0, expected train\.steps 0"),
        ({"epochs": 2}, {"train.steps": "9"}, ""),  # the command line takes precedence
        ({"steps": 9}, {"train.steps": "0", "train.epochs": "50"}, ""),
        (
            {"steps": 9},
            {"distill.temperature": "2"},
            r"distill\.temperature is set, expected teacher\.path to name",
        ),
        (
            {"steps": 9},
            {"distill.divergence": "reverse_kl"},
            r"distill\.divergence is 'reverse_kl', expected teach",
        ),
        ({"steps": 9}, {"distill.token_selection": "entropy"}, "expected teacher.path to name a teacher"),
        ({"steps": 9}, {"distill.scale_by_temperature_squared": "true"}, "expected teacher.path to name"),
        (
            {"steps": 9},
            {"teacher.dtype": "bfloat16"},
            r"teacher\.dtype is 'bfloat16', expected teacher\.path",
        ),
        (
            {"steps": 9},
            {"teacher.path": "t", "distill.temperature": "2", "distill.divergence": "reverse_kl"},
            "",
        ),
        (
            {"steps": 9},
            {"teacher.path": "t", "distill.drop_fraction": "0.3"},
            "distill.token_selection 'entropy'",
        ),
        ({"steps": 9}, {"teacher.path": "t", "distill.match_margin": "0.3"}, "kind 'until_matched' with it"),
        (
            {"steps": 9},
            {"optimizer.momentum": "0.9"},
            r"optimizer\.momentum is 0\.9, expected optimizer\.kind 'muon'",
        ),
        ({"steps": 9}, {"optimizer.momentum": "0.9", "optimizer.kind": "muon"}, ""),
        *(
            (
                {"steps": 9},
                {"data.tokenizer.path": "bert", f"data.tokenizer.{key}": "777"},
                rf"data\.tokenizer\.{key} is 777(\.0)?, expected data\.tokenizer\.path empty with it",
            )
            for key in ("vocab_size", "alphabet_size", "sample_megabytes")
        ),
        (
            {"steps": 9},
            {"data.tokenizer.path": "bert/tokenizer.json", "data.tokenizer.lowercase": "false"},
            r"data\.tokenizer\.lowercase is False, expected data\.tokenizer\.path to be a vocab\.txt",
        ),
        ({"steps": 9}, {"data.tokenizer.path": "v.txt", "data.tokenizer.lowercase": "false"}, ""),
        ({"steps": 9}, {"distill.alpha_hard": "2", "distill.loss_chunk_rows": "4"}, ""),
    ],
)
def test_a_key_without_effect_is_refused(tmp_path, file, overrides, message):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {{'train': {file!r}}}\n")
    if message:
        with pytest.raises(UserError, match=message):
            load_config(str(path), overrides)
    else:
        load_config(str(path), overrides)


def test_a_resolved_config_has_steps_and_epochs():
    """As config.json of a run has them."""
    assert build_config({"train": {"steps": 9, "epochs": 2}}).train.epochs == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.txt": "a"}, ""),
        ({"vocab.txt": "a", "tokenizer_config.json": "{}"}, ""),
        (
            {"vocab.txt": "a", "tokenizer_config.json": '{"do_lower_case": true}'},
            "lowercase is False",
        ),
        ({"vocab.txt": "a", "tokenizer.json": "{}"}, "lowercase is False"),
    ],
    ids=str,
)
def test_lowercase_where_the_files_say_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    path = tmp_path / "config.py"
    tokenizer = {"path": str(tmp_path), "lowercase": False}
    values = {"train": {"steps": 9}, "data": {"tokenizer": tokenizer}}
    path.write_text(f"def get_config():\n    return {values}\n")
    with pytest.raises(UserError, match=message) if message else nullcontext():
        load_config(str(path), {})


def test_settings_of_a_trained_tokenizer_give_way_to_a_path_on_the_command_line(tmp_path):
    path = tmp_path / "config.py"
    tokenizer = {"vocab_size": 4096, "lowercase": False}
    values = {"train": {"steps": 9}, "data": {"tokenizer": tokenizer}}
    path.write_text(f"def get_config():\n    return {values}\n")
    overrides = {"data.tokenizer.path": "bert/tokenizer.json"}
    assert load_config(str(path), overrides).data.tokenizer.path == "bert/tokenizer.json"
    with pytest.raises(UserError, match=r"vocab_size is 8192, expected data\.tokenizer\.path"):
        load_config(str(path), {**overrides, "data.tokenizer.vocab_size": "8192"})
