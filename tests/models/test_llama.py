"""Llama, Mistral, Qwen2, Qwen3 and EuroBERT: what test_conformance.py does not know of.

The oracle is transformers.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.hf.checkpoint import from_hf_tensors, load_checkpoint, save_checkpoint, to_hf_tensors
from dwt_jax.hf.config import load_hf_config, to_hf_config
from dwt_jax.models import flops, llama
from dwt_jax.models.common.layers import mean_over_tokens
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.llama import Config, rotary_frequencies
from helpers.jaxprs import count_flops
from helpers.small_models import Tensors, batch, leaves, logits, random_params

SIZES = {
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": -1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "rope_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 3.0,
    "rope_original_max_position_embeddings": 16,
}
VARIANTS = {
    "multi_head": {},
    "untied": {"tie_word_embeddings": False},
    "grouped": {"num_key_value_heads": 2},
    "one_key_value_head": {"num_key_value_heads": 1, "head_dim": 10},
    "linear_rope": {"rope_type": "linear", "rope_factor": 2.0},
    "llama3_rope": LLAMA3,
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "mistral_without_window": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2_window": {"model_type": "qwen2", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "qwen3_window": {"model_type": "qwen3", "sliding_window": 3, "tie_word_embeddings": False},
    "encoder": {"model_type": "eurobert"},
    "encoder_grouped": {"model_type": "eurobert", "num_key_value_heads": 2, "head_dim": 8},
    "encoder_untied": {"model_type": "eurobert", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "encoder_llama3_rope": {"model_type": "eurobert", "num_key_value_heads": 2, **LLAMA3},
}


@pytest.fixture(params=VARIANTS)
def config(request) -> Config:
    return Config(**{**SIZES, **VARIANTS[request.param]})


def torch_model(config, tmp_path):
    """A random model of transformers with these sizes, and its directory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = {key: x for key, x in to_hf_config(config).items() if key not in ("architectures", "dtype")}
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if config.is_causal else transformers.AutoModelForMaskedLM
    twin = auto.from_config(transformers.AutoConfig.for_model(**values)).eval()
    for parameter in twin.parameters():  # norms of 1 and biases of 0 would hide a swap
        parameter.data += 0.1 * torch.randn_like(parameter)
    twin.save_pretrained(tmp_path / "hf")
    return twin, tmp_path / "hf"


def test_a_directory_of_transformers_gives_its_logits(config, tmp_path):
    torch = pytest.importorskip("torch")
    twin, path = torch_model(config, tmp_path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.model == config
    tokens = batch(config)[0]
    with torch.no_grad():
        expected = twin(input_ids=torch.tensor(tokens)).logits.numpy()
    found = logits(checkpoint.params, config, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_is_written_is_what_transformers_wrote(config, tmp_path):
    twin, path = torch_model(config, tmp_path)
    written = to_hf_tensors(load_checkpoint(path).params, config)
    expected = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_packed_rows_equal_single_documents(config):
    params, (tokens, segments) = random_params(config), batch(config)
    packed = logits(params, config, tokens, segments)
    for row, start, end in ((0, 0, 12), (1, 0, 5), (1, 5, 9)):
        alone = logits(params, config, tokens[row : row + 1, start:end], np.ones((1, end - start), np.int32))
        np.testing.assert_allclose(packed[row, start:end], alone[0], atol=2e-5)


def test_no_token_sees_a_later_one_but_in_an_encoder(config):
    params, (tokens, _) = random_params(config), batch(config)
    ones = np.ones_like(tokens)
    changed = tokens.copy()
    changed[:, 7:] = 9
    before, after = logits(params, config, tokens, ones), logits(params, config, changed, ones)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3
    if config.is_causal:
        np.testing.assert_array_equal(before[:, :7], after[:, :7])
    else:
        assert (np.abs(before - after).max(-1) > 1e-4).all()


def test_a_token_of_an_encoder_sees_all_of_its_segment_and_nothing_else():
    config = Config(**{**SIZES, "model_type": "eurobert", "num_key_value_heads": 2})
    params, (tokens, segments) = random_params(config), batch(config)
    before = logits(params, config, tokens, segments)
    for position in (5, 8):  # the first and the last of a segment
        changed = tokens.copy()
        changed[1, position] = 9
        difference = np.abs(logits(params, config, changed, segments) - before)[1].max(-1)
        assert (difference[5:9] > 1e-4).all()
        assert (difference[:5] == 0).all()


def test_output_positions_equal_all_positions(config):
    params, (tokens, segments) = random_params(config), batch(config)
    positions = np.array([[0, 3, 7], [1, 5, 8]], np.int32)
    hidden = np.asarray(llama.encode(params, config, tokens, segments))
    some = llama.encode(params, config, tokens, segments, positions=positions)
    np.testing.assert_allclose(some, np.take_along_axis(hidden, positions[..., None], axis=1), atol=1e-5)


def test_flops_equal_a_count_of_the_program(config):
    tokens = np.ones((2, 12), np.int32)
    for positions in (np.zeros((2, 3), np.int32), None):

        def read(params, positions=positions):
            hidden = llama.encode(params, config, tokens, tokens, positions=positions)
            return lm_head_logits(params, config, hidden)

        program = jax.make_jaxpr(read)(llama.abstract_params(config))
        predictions = 12 if positions is None else 3
        assert flops.forward_flops(config, 2, 12, predictions) == count_flops(program.jaxpr)


def test_the_config_round_trip(config, tmp_path):
    written = to_hf_config(config)
    assert not any(key.startswith("rope_low") for key in written)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert load_hf_config(tmp_path).model == config


def test_a_config_of_transformers_4(tmp_path):
    """`rope_theta` and `rope_scaling` in place of `rope_parameters`; absent keys have Llama's defaults."""
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load_hf_config(tmp_path).model
    assert (model.num_kv_heads, model.head_size, model.pad_token_id) == (8, 64, -1)
    assert (model.rope_type, model.rope_factor, model.rope_original_max_position_embeddings) == (
        "llama3",
        32.0,
        8192,
    )
    assert model.rope_theta == 500000.0
    frequencies = rotary_frequencies(model)
    plain = rotary_frequencies(dataclasses.replace(model, rope_type="default"))
    assert frequencies[0] == plain[0] == 1
    assert frequencies[-1] == pytest.approx(plain[-1] / 32)


def test_absent_keys_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    written_otherwise = ("architectures", "dtype", "head_dim", "rope_parameters", "rope_scaling")
    for kind in ("llama", "mistral", "qwen2", "qwen3", "eurobert"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        written = to_hf_config(load_hf_config(tmp_path).model)
        expected = transformers.AutoConfig.for_model(kind)
        head_dim = getattr(expected, "head_dim", None)
        assert written["head_dim"] == (head_dim or expected.hidden_size // expected.num_attention_heads)
        for key, value in written.items():
            if key in written_otherwise or key.endswith("token_id") or key == "max_window_layers":
                continue
            if hasattr(expected, key):
                assert value == getattr(expected, key), (kind, key)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type is 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type is 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
        ("llama", {"attention_bias": True}, "attention_bias is True, expected False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, expected False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
        ("llama", {"num_key_value_heads": 5}, "num_attention_heads is 32, expected a multiple of"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, expected none"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 3},
            "max_window_layers is 3, expected layers that all are",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding_attention'], expected layers that all are",
        ),
        ("eurobert", {"attention_bias": True}, "attention_bias is True, expected False"),
        ("eurobert", {"mlp_bias": True}, "mlp_bias is True, expected False"),
        ("eurobert", {"classifier_pooling": "max"}, "classifier_pooling is 'max'; known: bos, late, mean"),
        ("eurobert", {"hidden_size": 770}, "hidden_size is 770, expected a multiple of"),
        ("mixtral", {}, "model_type is 'mixtral', expected one of"),
        ("gemma2", {}, "model_type is 'gemma2', expected one of"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, kind, values, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **values}))
    with pytest.raises(UserError) as error:
        load_hf_config(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


def test_keys_of_other_model_types_do_not_switch_the_window_of_a_mistral_off(tmp_path):
    transformers = pytest.importorskip("transformers")
    keys = {"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 28}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **keys}))
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 5
    assert load_hf_config(tmp_path).model.sliding_window == 5


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        ([], "llama"),
        (["LlamaForCausalLM"], "llama"),
        (["Qwen2ForCausalLM"], "qwen2"),
        (["EuroBertForMaskedLM"], "eurobert"),
    ],
)
def test_without_a_model_type_the_class_tells(tmp_path, classes, kind):
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": classes}))
    assert load_hf_config(tmp_path, names).model.model_type == kind


@pytest.mark.parametrize("kind", ["llama", "eurobert"])
def test_these_have_no_window(kind):
    assert [*Config(**SIZES, model_type=kind, sliding_window=4).problems()] == [
        f"sliding_window is 4, expected 0 for model_type {kind} (or model_type mistral or qwen2 or qwen3)"
    ]


def test_a_decoder_has_no_choice_of_pooling():
    (problem,) = Config(**SIZES, classifier_pooling="mean").problems()
    assert problem.startswith(
        "classifier_pooling is 'mean', expected none for model_type llama: a decoder is"
    )


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_a_classifier_of_an_encoder_has_the_logits_of_transformers(pooling, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None}
    sizes = {**SIZES, "num_key_value_heads": 2, "classifier_pooling": pooling, "num_labels": 3, **ids}
    torch.manual_seed(0)
    twin = transformers.EuroBertForSequenceClassification(transformers.EuroBertConfig(**sizes)).eval()
    for parameter in twin.parameters():
        parameter.data.normal_(0, 0.3)
    twin.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config, params = checkpoint.model, checkpoint.params
    assert (config.pooling, llama.pools_first_token(config)) == (pooling, pooling == "bos")
    tokens = np.random.default_rng(0).integers(2, 300, (3, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([[9], [4], [1]])
    with torch.no_grad():
        expected = twin(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    segments = mask.astype(np.int32)
    first = np.zeros((3, 1), np.int32) if pooling == "bos" else None
    hidden = llama.encode(params, config, tokens, segments, positions=first)
    found = llama.classifier_logits(params, config, hidden, segments)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    empty = llama.classifier_logits(params, config, hidden, 0 * segments)  # rows that fill up a batch
    assert np.isfinite(empty).all()
    assert to_hf_config(config, ("classifier",))["classifier_pooling"] == pooling
    written, state = to_hf_tensors(params, config), twin.state_dict()
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor.numpy(), err_msg=name)


def test_a_token_classifier_is_no_classifier_of_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.EuroBertConfig(**SIZES, bos_token_id=None, eos_token_id=None)
    transformers.EuroBertForTokenClassification(config).save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert set(checkpoint.params) == set(llama.ENCODER_PARTS)
    assert set(checkpoint.ignored) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("number", [7, 300])
def test_the_mean_over_tokens_counts_in_fp32(number):
    segments = (np.arange(512) < number).astype(np.int32)[None]
    x = np.where(segments[..., None] > 0, 3.0, 100.0)
    assert mean_over_tokens(jnp.asarray(x, jnp.bfloat16), segments).tolist() == [[3.0]]


def test_the_id_of_the_mask_is_that_of_the_tokenizer(tmp_path):
    from helpers.masked_models import framed_tokenizer

    tokenizer = framed_tokenizer(["the cab faded"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for kind in ("eurobert", "llama"):
        config = Config(**{**SIZES, "model_type": kind, "vocab_size": len(tokenizer)})
        save_checkpoint(random_params(config), config, tmp_path / "tokenizer", tmp_path / kind)
        written = json.loads((tmp_path / kind / "config.json").read_text())
        assert written["bos_token_id"] == tokenizer.bos_token_id
        assert written["eos_token_id"] == tokenizer.eos_token_id
        assert written.get("mask_token_id") == (tokenizer.mask_token_id if kind == "eurobert" else None)


def test_a_bare_decoder_has_no_lm_head_unless_it_is_tied():
    """transformers' LlamaModel and EuroBertModel, saved without the prefix."""
    for kind, tied in itertools.product(("llama", "eurobert"), (True, False)):
        config = Config(**SIZES, model_type=kind, tie_word_embeddings=tied)
        tensors = to_hf_tensors(random_params(config), config)
        tensors.pop("lm_head.weight", None)
        bare = Tensors({name.removeprefix("model."): array for name, array in tensors.items()})
        params = from_hf_tensors(bare, config, "memory", architectures=(f"{kind}Model",)).params
        assert ("decoder" in params) == tied


def test_dropout_of_the_probabilities_keeps_their_mean():
    config = Config(**SIZES, num_key_value_heads=2, attention_dropout=0.5)
    params, (tokens, segments) = random_params(config), batch(config)
    one = np.asarray(llama.encode(params, config, tokens, segments, key=jax.random.key(0)))
    two = np.asarray(llama.encode(params, config, tokens, segments, key=jax.random.key(1)))
    without = np.asarray(llama.encode(params, config, tokens, segments))
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - without).max() > 1e-3
    assert leaves(params).keys() == leaves(llama.abstract_params(config)).keys()
