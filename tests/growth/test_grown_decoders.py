"""Decoders, and an encoder of their kind, that transformers wrote, grown by the command and loaded again."""

import json

import pytest

from dwt_jax.cli import main
from helpers.decoders import TEXT, save_decoder_tokenizer
from helpers.masked_models import framed_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
LARGE = {
    "hidden_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 50,
    "max_position_embeddings": 32,
}
VARIANTS = {
    "llama": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    },
    "qwen3": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 6},
    "eurobert": {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
ROPE = {"llama": {"rope_type": "linear", "rope_factor": 2.0, "rope_theta": 1000.0}}


@pytest.fixture(params=VARIANTS)
def small(request, tmp_path):
    """(model_type, model, folder); the model is in folder/small with a tokenizer."""
    kind = request.param
    (tmp_path / "corpus.txt").write_text(f"{TEXT}\n" * 20)
    if kind == "eurobert":
        framed_tokenizer([TEXT] * 20).save_pretrained(tmp_path / "small")
    else:
        save_decoder_tokenizer(tmp_path / "small", "qwen2", tmp_path / "corpus.txt")
    size = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "small"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=size, **SMALL, **VARIANTS[kind])
    is_encoder = kind == "eurobert"
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():  # gains of 1 and biases of 0 would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "small")
    return kind, model, tmp_path


def grow(kind, folder, method, *options):
    changes = {"model_type": kind, "vocab_size": 0, **LARGE, **ROPE.get(kind, {})}
    if kind in ("llama", "eurobert"):
        changes["hidden_size"] = 36  # transformers demands a multiple of the heads there
    changes["tie_word_embeddings"] = VARIANTS[kind]["tie_word_embeddings"]
    changes["sliding_window"] = VARIANTS[kind].get("sliding_window", 0)
    config = folder / "large.py"
    config.write_text(f"def get_config():\n    return {{'model': {changes!r}, 'train': {{'steps': 1}}}}\n")
    command = ["remap", f"--model={folder / 'small'}", f"--config={config}", f"--method={method}"]
    return main([*command, f"--out={folder / 'large'}", "--json", *options])


@pytest.mark.parametrize("method", ["lemon", "interleave+net2net"])
def test_the_grown_model_has_the_logits_of_the_small_one(small, method, capsys):
    kind, model, folder = small
    assert grow(kind, folder, method, "--new-layers=zero") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["function_preserving"], report
    assert report["logit_drift"]["max"] < 1e-4
    large, info = type(model).from_pretrained(folder / "large", output_loading_info=True)
    assert not any(info.values()), info
    assert (large.config.num_hidden_layers, large.config.num_key_value_heads) == (4, 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "large")
    ids = tokenizer(TEXT, return_tensors="pt", truncation=True, max_length=20).input_ids
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("small", ["llama"], indirect=True)
def test_a_llama_grows_into_a_qwen2(small, capsys):
    """The new biases of queries, keys and values are 0."""
    kind, model, folder = small
    assert grow(kind, folder, "lemon", "--config.model.model_type=qwen2", "--new-layers=zero") == 0
    assert json.loads(capsys.readouterr().out)["function_preserving"]
    large = transformers.AutoModelForCausalLM.from_pretrained(folder / "large").eval()
    assert isinstance(large, transformers.Qwen2ForCausalLM)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("small", ["llama"], indirect=True)
def test_a_decoder_grows_into_an_encoder_without_a_claim(small, capsys):
    kind, _, folder = small
    assert grow(kind, folder, "lemon", "--config.model.model_type=eurobert") == 2
    assert "lemon: is_causal True → False, expected True" in capsys.readouterr().err
    assert grow(kind, folder, "stack+net2net", "--config.model.model_type=eurobert", "--new-layers=zero") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reasons_not_preserving"] == [
        "is_causal True → False, expected True",
        "pooling last → late, expected last",
    ]
    assert report["logit_drift"]["max"] > 1e-2
    large = transformers.AutoModelForMaskedLM.from_pretrained(folder / "large")
    assert isinstance(large, transformers.EuroBertForMaskedLM)


def test_tied_tables_are_untied_on_demand_and_untied_ones_stay(small, capsys):
    kind, model, folder = small
    assert grow(kind, folder, "lemon", "--config.model.tie_word_embeddings=false") == 0
    assert json.loads(capsys.readouterr().out)["function_preserving"]
    large = type(model).from_pretrained(folder / "large").eval()
    assert not large.config.tie_word_embeddings
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_exactness_is_not_claimed_where_layers_are_copied(small, capsys):
    kind, _, folder = small
    assert grow(kind, folder, "stack+net2net") == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["function_preserving"]
    assert report["logit_drift"]["max"] > 1e-2


def test_a_head_of_another_size_is_refused_in_one_line(small, capsys):
    kind, _, folder = small
    assert grow(kind, folder, "lemon", "--config.model.head_dim=16") == 2
    assert "head_dim 8 → 16, expected 8: rotary positions depend on it" in capsys.readouterr().err
