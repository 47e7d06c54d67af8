"""What is special about ModernBERT: windows, two rotary bases, pooling, layers by kind, its config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.hf.checkpoint import to_hf_tensors
from dwt_jax.hf.config import load_hf_config, to_hf_config
from dwt_jax.models import modernbert
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.logical_axes import init_value, path_name
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.rope import apply_rope, rope_frequencies, rope_rotation
from dwt_jax.models.modernbert import Config
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.depth_maps import DEPTH_MAPS, source_layers
from dwt_jax.remap.methods import GrowthOptions

CONFIG = Config(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=5,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
    pad_token_id=1,
    local_attention=8,
    global_rope_theta=500.0,
    local_rope_theta=20.0,
)
KEY = jax.random.key(0)


def random_params(config, heads=modernbert.LM_HEADS, labels=1):
    random = np.random.default_rng(0)

    def leaf(path, like):
        x = 0.3 * random.normal(size=like.shape)
        return (1 + x if init_value(path_name(path)) else x).astype(np.float32)

    abstract = modernbert.abstract_params(config, heads, labels)
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def transformers_model(config, params, heads=modernbert.LM_HEADS, labels=()):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = to_hf_config(config, heads, labels)
    keys = ("architectures", "dtype", "model_type")
    hf_config = transformers.ModernBertConfig(**{key: x for key, x in values.items() if key not in keys})
    model = getattr(transformers, values["architectures"][0])(hf_config).eval()
    tensors = {name: torch.tensor(array) for name, array in to_hf_tensors(params, config).items()}
    model.load_state_dict(tensors, strict=False)
    return model


def random_rows(length=40, rows=2):
    tokens = np.random.default_rng(1).integers(5, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    return tokens, np.ones_like(tokens)


def lm_logits(params, config, tokens, segments, dtype=np.float32):
    policy = Policy(np.dtype(dtype), np.dtype(dtype))
    with jax.enable_x64(dtype == np.float64):
        params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
        hidden = modernbert.encode(params, config, tokens, segments, policy=policy)
        return np.asarray(lm_head_logits(params, config, hidden, policy=policy))[..., : config.vocab_size]


@pytest.mark.parametrize("period", [1, 2, 3, 9])
def test_local_layers_equal_transformers(period):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, global_attn_every_n_layers=period)
    params, (tokens, segments) = random_params(config), random_rows()
    with torch.no_grad():
        expected = transformers_model(config, params)(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm_logits(params, config, tokens, segments), expected, atol=1e-4)
    wide = dataclasses.replace(config, local_attention=100)
    if period > 1:  # the window matters at this length
        assert np.abs(lm_logits(params, wide, tokens, segments) - expected).max() > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "linear"])
def test_activations_equal_transformers(activation):
    """Of the gated MLP and of the prediction head."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, hidden_act=activation, classifier_activation=activation)
    params, (tokens, segments) = random_params(config), random_rows()
    with torch.no_grad():
        expected = transformers_model(config, params)(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm_logits(params, config, tokens, segments), expected, atol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_pooling_equals_transformers(pooling):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, classifier_pooling=pooling)
    heads, labels = modernbert.CLASSIFIER_HEADS, ("a", "b", "c")
    params, (tokens, segments) = random_params(config, heads, 3), random_rows()
    segments[1, 11:] = 0
    model = transformers_model(config, params, heads, labels)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(segments)).logits
    hidden = modernbert.encode(params, config, tokens, segments)
    found = modernbert.classifier_logits(params, config, hidden, segments)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_rope_keeps_scores_of_shifted_pairs():
    """Scores depend on the distance alone, and the angles are those of equation 34."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 1, 8)), jnp.float32)

    def score(query_position, key_position):
        places = [
            rope_rotation(jnp.array([[p]]), 13, rope_frequencies(8, 100.0))
            for p in (query_position, key_position)
        ]
        query, key = apply_rope(x[:, :, :1], places[0]), apply_rope(x[:, :, 1:], places[1])
        return float((query * key).sum())

    assert score(3, 5) == pytest.approx(score(10, 12), abs=1e-5)
    assert score(3, 5) != pytest.approx(score(3, 6), abs=1e-3)
    cos, sin = rope_rotation(jnp.array([[2, 13]]), 13, rope_frequencies(8, 100.0))
    angles = 2 * 100.0 ** (-2 * np.arange(4) / 8)
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)
    assert np.isnan(cos[0, 1]).all()  # a position that the table lacks


def test_the_norm_before_the_first_attention_is_unused():
    params, (tokens, segments) = random_params(CONFIG), random_rows(8)
    gradient = jax.grad(lambda p: modernbert.encode(p, CONFIG, tokens, segments).sum())(params)
    scale = np.asarray(gradient["layers"]["attention"]["norm"]["scale"])
    assert (scale[0] == 0).all()
    assert (scale[1:] != 0).any(axis=1).all()
    assert "model.layers.0.attn_norm.weight" not in to_hf_tensors(params, CONFIG)
    assert "model.layers.1.attn_norm.weight" in to_hf_tensors(params, CONFIG)


def test_dropout_needs_a_key_and_a_rate():
    params, (tokens, segments) = random_params(CONFIG), random_rows(8)
    config = CONFIG.with_dropout(0.3)
    assert config.uses_dropout
    assert not CONFIG.uses_dropout
    plain = modernbert.encode(params, CONFIG, tokens, segments)
    np.testing.assert_array_equal(modernbert.encode(params, config, tokens, segments), plain)
    np.testing.assert_array_equal(modernbert.encode(params, CONFIG, tokens, segments, key=KEY), plain)
    one, other = (
        modernbert.encode(params, config, tokens, segments, key=jax.random.key(seed)) for seed in (0, 1)
    )
    assert np.abs(one - other).max() > 1e-2


# config.json


def write(path, **values):
    config = {
        "model_type": "modernbert",
        "vocab_size": 300,
        "num_hidden_layers": 4,
        "pad_token_id": 1,
        **values,
    }
    (path / "config.json").write_text(json.dumps(config))
    return load_hf_config(path).model


def test_old_and_new_keys_mean_the_same(tmp_path):
    old = write(tmp_path, global_attn_every_n_layers=2, global_rope_theta=5000.0, local_rope_theta=70.0)
    new = write(
        tmp_path,
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    )
    assert old == new
    assert (old.global_attn_every_n_layers, old.global_rope_theta, old.local_rope_theta) == (2, 5000.0, 70.0)
    default = write(tmp_path)
    assert (default.global_attn_every_n_layers, default.global_rope_theta) == (3, 160000.0)


def test_transformers_reads_the_written_config_as_it_was():
    transformers = pytest.importorskip("transformers")
    values = to_hf_config(CONFIG)
    config = transformers.ModernBertConfig(**{k: x for k, x in values.items() if k != "model_type"})
    assert config.layer_types == [
        "full_attention",
        *(["sliding_attention"] * 2),
        "full_attention",
        "sliding_attention",
    ]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 500.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 20.0
    assert config.hidden_activation == "gelu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_bias": True}, "norm_bias is True, expected False"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"decoder_bias": False}, "decoder_bias is False, expected True"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types is .*, expected 'full_attention' in every"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}}},
            "rope_parameters.full_attention.rope_type is 'yarn', expected 'default'",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, expected 4"),
        ({"rope_parameters": {"full_attention": "x"}}, "rope_parameters is .*, expected an object with"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9}}, "rope_parameters is .*, expected"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max'; known: cls, mean"),
        (
            {"hidden_size": 9, "num_attention_heads": 3},
            "hidden_size / num_attention_heads is 3, expected an even",
        ),
    ],
)
def test_unsupported_models_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, **values)


def test_gates_are_refused():
    assert "gated_layers is True, expected False" in next(iter(Config(gated_layers=True).problems()))


# Growth


@pytest.mark.parametrize("depth", DEPTH_MAPS)
@pytest.mark.parametrize(("old", "new"), [(3, 6), (22, 28), (4, 7), (2, 9), (28, 22)])
def test_every_layer_comes_from_one_of_its_kind(depth, old, new):
    sources = source_layers(depth, old, new, 3)
    assert len(sources) == new
    is_global = [layer % 3 == 0 for layer in range(old)]
    for i, source in enumerate(sources):
        assert source < old
        assert source >= 0 or depth == "prefix"
        if source >= 0:
            assert is_global[source] == (i % 3 == 0)


@pytest.mark.parametrize(("old", "new"), [(3, 6), (4, 7), (5, 8), (4, 12), (4, 6)])
def test_growth_in_depth_and_width_keeps_the_function(old, new):
    source = dataclasses.replace(CONFIG, num_hidden_layers=old)
    target = dataclasses.replace(
        source, num_hidden_layers=new, hidden_size=32, num_attention_heads=4, intermediate_size=37
    )
    params, (tokens, segments) = random_params(source), random_rows()
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    for method in ("lemon", "net2net", "interleave+net2net"):
        options = GrowthOptions(new_layers="zero")
        grown, report = remap_params(params, source, target, method, KEY, options=options)
        assert report.function_preserving, report.reasons_not_preserving
        before = lm_logits(params, source, tokens, segments, np.float64)
        after = lm_logits(grown, target, tokens, segments, np.float64)
        np.testing.assert_allclose(after, before, atol=1e-9)


def test_a_copy_of_the_first_layer_has_a_norm_of_gain_one():
    source = dataclasses.replace(CONFIG, num_hidden_layers=3)
    params = modernbert.init_params(source, KEY)
    target = dataclasses.replace(source, num_hidden_layers=6)
    grown, _ = remap_params(jax.device_get(params), source, target, "stack", KEY)
    np.testing.assert_array_equal(grown["layers"]["attention"]["norm"]["scale"][3], 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, "hidden_size / num_attention_heads 8 → 4, expected 8: rotary positions"),
        ({"hidden_size": 24, "num_attention_heads": 3}, "hidden_size 16 → 24, expected a multiple of 16"),
    ],
)
def test_growth_that_changes_the_function_is_refused(changes, message):
    target = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match=message):
        remap_params(random_params(CONFIG), CONFIG, target, "lemon", KEY)


def test_growth_of_two_heads_that_share_a_part_is_refused():
    """The LM head needs its last norm scaled, the classifier does not. Growth in depth leaves both alone."""
    heads = (*modernbert.LM_HEADS, "classifier")
    params = random_params(CONFIG, heads, labels=3)
    wider = dataclasses.replace(CONFIG, hidden_size=32, num_attention_heads=4)
    with pytest.raises(UserError, match="that share head, expected one of them to grow hidden_size from 16"):
        remap_params(params, CONFIG, wider, "net2net", KEY)
    deeper = dataclasses.replace(CONFIG, num_hidden_layers=10)
    grown, _ = remap_params(params, CONFIG, deeper, "stack", KEY)
    assert set(grown) == set(params)


def test_a_local_theta_of_null_is_the_global_one(tmp_path):
    """As transformers 4 has it."""
    values = {
        **to_hf_config(CONFIG, modernbert.LM_HEADS),
        "global_rope_theta": 700.0,
        "local_rope_theta": None,
    }
    values = {key: x for key, x in values.items() if key not in ("rope_parameters", "layer_types")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_hf_config(tmp_path).model.local_rope_theta == 700
