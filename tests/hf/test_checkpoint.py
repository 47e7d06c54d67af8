"""Model directories: read back by transformers, and saved atomically."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.hf import checkpoint
from dwt_jax.models import bert as models_bert
from dwt_jax.models.bert import HF_NAMES
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The directory of a small WordPiece tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "weak", "teach", "##er", "##s", "help"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    (path / "vocab.txt").write_text(
        "\n".join([*words, *letters, *(f"##{c}" for c in letters if c != "s")]) + "\n"
    )
    transformers.BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tokenizer):
    size = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    return BertConfig(
        vocab_size=size,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=20,
        max_position_embeddings=16,
        type_vocab_size=3,
        hidden_act="gelu_new",
        layer_norm_eps=1e-4,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.15,
        initializer_range=0.03,
    )


@pytest.fixture(scope="module")
def params(model, randomised):
    return randomised(model, 3)


@pytest.fixture
def saved(tmp_path, model, params, tokenizer):
    checkpoint.save_checkpoint(params, model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def content(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_transformers_reads_saved_checkpoint(saved, model, params):
    bert, report = transformers.AutoModelForMaskedLM.from_pretrained(saved, output_loading_info=True)
    assert type(bert).__name__ == "BertForMaskedLM"
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report.get(kind), (kind, report[kind])
    assert bert.dtype == torch.float32
    fields = HF_NAMES["bert"].config_keys
    extra_fields = {"model_type", "weighted_norm", "gated_layers"}
    assert {field.name for field in dataclasses.fields(BertConfig)} == set(fields) | extra_fields
    for name in fields:
        assert getattr(bert.config, name) == getattr(model, name), name
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight

    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    encoded = hf_tokenizer(["the weak teachers help", "teach the [MASK]"], padding=True, return_tensors="pt")
    assert hf_tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])[1:5] == [
        "the",
        "weak",
        "teach",
        "##er",
    ]
    with torch.no_grad():
        torch_logits = bert.eval()(**encoded).logits.numpy()
    segments = encoded["attention_mask"].numpy()
    hidden = models_bert.encode(params, model, encoded["input_ids"].numpy(), segments)
    logits = np.asarray(lm_head_logits(params, model, hidden))[..., : model.vocab_size]
    np.testing.assert_allclose(logits[segments > 0], torch_logits[segments > 0], atol=5e-5)


def test_save_and_load_round_trip(saved, model, params):
    loaded, loaded_model, *_ = checkpoint.load_checkpoint(saved)
    assert loaded_model == model
    flat, loaded_flat = (jax.tree_util.tree_leaves_with_path(x) for x in (params, loaded))
    for (path, a), (loaded_path, b) in zip(flat, loaded_flat, strict=True):
        a, b = np.asarray(a).copy(), np.asarray(b)
        assert path == loaded_path
        assert b.dtype == np.float32
        if (path[-1].key == "embedding" and path[-2].key == "word") or (
            path[0].key == "mlm" and len(path) == 2
        ):
            a[model.vocab_size :] = 0  # the padding is not exported
        assert a.tobytes() == b.tobytes(), path


def test_load_checkpoint_saved_by_transformers(tmp_path, saved, model):
    bert = transformers.AutoModelForMaskedLM.from_pretrained(saved)
    bert.save_pretrained(tmp_path / "theirs")
    their_params, their_model, *_ = checkpoint.load_checkpoint(tmp_path / "theirs")
    expected_params = checkpoint.load_checkpoint(saved).params
    assert their_model == model
    jax.tree.map(np.testing.assert_array_equal, expected_params, their_params)


def test_save_loaded_checkpoint_gives_same_bytes(tmp_path, saved, model, tokenizer):
    loaded = checkpoint.load_checkpoint(saved).params
    checkpoint.save_checkpoint(loaded, model, tokenizer, tmp_path / "again")
    assert content(tmp_path / "again") == content(saved)


def test_error_names_every_wrong_tensor(saved):
    tensors = safetensors.load_file(saved / "model.safetensors")
    del tensors["cls.predictions.bias"]
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    tensors["bert.embeddings.position_embeddings.weight"] = np.zeros((15, 24), np.float32)
    tensors["bert.encoder.layer.2.attention.self.query.weight"] = np.zeros((24, 25), np.float32)
    tensors["bert.encoder.layer.3.output.dense.bias"] = np.zeros(24, np.float32)
    safetensors.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError) as error_info:
        checkpoint.load_checkpoint(saved)
    message = str(error_info.value)
    assert "\n" not in message
    for part in (
        "model.safetensors",
        "missing cls.predictions.bias [",
        "missing bert.encoder.layer.1.output.dense.weight [24, 20]",
        "bert.embeddings.position_embeddings.weight is [15, 24], expected [16, 24]",
        "bert.encoder.layer.2.attention.self.query.weight is [24, 25], expected [24, 24]",
        "unexpected bert.encoder.layer.3.output.dense.bias",
    ):
        assert part in message
    assert message.count("; ") == 4


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_raises(saved, fraction):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.load_checkpoint(saved)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_missing_file_raises(saved, file):
    (saved / file).unlink()
    with pytest.raises(UserError, match=file):
        checkpoint.load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "albert"}, "'albert', expected one of bert, distilbert, .* the names of bert"),
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"hidden_act": "prelu"}, "'prelu'"),
        ({"hidden_size": 25}, "hidden_size is 25, expected a multiple"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ("{", "config.json"),
        ("[]", "config.json"),
    ],
    ids=str,
)
def test_unsupported_config_raises(saved, change, expected):
    file = saved / "config.json"
    if isinstance(change, str):
        file.write_text(change)
    else:
        config = {**json.loads(file.read_text()), **change}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(UserError, match=expected) as error_info:
        checkpoint.load_checkpoint(saved)
    assert "\n" not in str(error_info.value)
    assert "config.json" in str(error_info.value)


class Interruption(BaseException):
    """As a signal or a full disk would."""


def test_interrupted_save_keeps_old_directory(monkeypatch, saved, model, params, tokenizer):
    """Interrupted at every call that touches the disk, one after the other."""
    import os
    import pathlib
    import shutil

    before = content(saved)
    changed = jax.tree.map(lambda x: x + 1, params)
    calls = 0
    stop_at = 0

    def counting(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Interruption
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (shutil, "copyfile"),
        (safetensors, "save_file"),
        (pathlib.Path, "write_text"),
        (pathlib.Path, "rename"),
        (pathlib.Path, "mkdir"),
        (os, "replace"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    finished = 0
    while not finished and stop_at < 50:
        stop_at += 1
        calls = 0
        try:
            checkpoint.save_checkpoint(changed, model, tokenizer, saved)
            finished = stop_at
        except Interruption:
            assert saved.is_dir(), f"nothing is left after an interruption at call {stop_at}"
            assert content(saved) == before
    assert finished > 4
    after = content(saved)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert {name for name in after if name != "model.safetensors"} == set(before) - {"model.safetensors"}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # no temporary files


def test_tensor_names_and_shapes_equal_transformers(params, model, torch_bert):
    bert = torch_bert(params, model)
    expected = {name: tuple(p.shape) for name, p in bert.named_parameters()}
    assert {name: array.shape for name, array in checkpoint.to_hf_tensors(params, model).items()} == expected
