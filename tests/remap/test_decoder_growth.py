"""Growth of models with RMSNorm and grouped heads, exact at any width. Computed in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwt_jax.errors import UserError
from dwt_jax.models import family
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.llama import Config
from dwt_jax.remap import apply
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.plan import plan_growth
from helpers.small_models import batch, leaves, logits, random_params

SOURCE = Config(
    model_type="qwen3",
    vocab_size=300,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=12,
    max_position_embeddings=20,
    pad_token_id=1,
)
KINDS = ("llama", "mistral", "qwen2", "qwen3", "eurobert")
METHODS = ("fna", "net2net", "lemon", "interleave+net2net", "stack+lemon", "prefix+net2net")


def float64_params(config):
    return jax.tree.map(lambda x: x.astype(np.float64), random_params(config))


def difference(source, target, method, options=GrowthOptions(), seed=0):
    """The largest difference of logits, and the report."""
    params, (tokens, segments) = float64_params(source), batch(source)
    grown, report = remap_params(params, source, target, method, jax.random.key(seed), options=options)
    expected = leaves(family(target).abstract_params(target))
    assert {name: x.shape for name, x in leaves(grown).items()} == {
        name: x.shape for name, x in expected.items()
    }
    before = logits(params, source, tokens, segments, np.float64)
    after = logits(grown, target, tokens, segments, np.float64)[..., : source.vocab_size]
    return np.abs(after - before).max(), report


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(METHODS),
    st.booleans(),
    st.sampled_from(["even", "uneven"]),
    st.integers(8, 27),
    st.sampled_from([(4, 2), (6, 2), (8, 2), (4, 4), (8, 4), (9, 3), (12, 6), (8, 8), (15, 5)]),
    st.integers(12, 30),
    st.integers(2, 5),
)
def test_any_pair_of_sizes_keeps_the_function(kind, method, tied, split, width, heads, inner, layers):
    source = dataclasses.replace(
        SOURCE,
        model_type=kind,
        tie_word_embeddings=tied,
        sliding_window=5 if kind == "mistral" else 0,
    )
    if kind in ("llama", "eurobert"):  # transformers demands a multiple of the heads there
        width = -(-width // heads[0]) * heads[0]
    target = dataclasses.replace(
        source,
        hidden_size=width,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=inner,
        num_hidden_layers=2 if method in ("net2net",) else layers,
    )
    options = GrowthOptions(split=split, new_layers="zero")
    largest, report = difference(source, target, method, options)
    assert report.function_preserving, report.reasons_not_preserving
    assert largest < 1e-9


@pytest.mark.parametrize(
    ("kind", "other", "reason"),
    [
        ("llama", "mistral", ""),
        ("llama", "qwen2", ""),  # its biases are 0 at first
        ("mistral", "llama", ""),
        ("qwen2", "llama", "attention/key/bias: a llama has no such parameter"),
        ("llama", "qwen3", "has_qk_norm False → True"),
        ("qwen3", "qwen2", "has_qk_norm True → False"),
        ("llama", "eurobert", "is_causal True → False, expected True"),
        ("eurobert", "llama", "is_causal False → True, expected False"),
    ],
)
def test_another_model_type_keeps_the_function_where_it_can_compute_it(kind, other, reason):
    source = dataclasses.replace(SOURCE, model_type=kind, head_dim=0)
    target = dataclasses.replace(source, model_type=other, hidden_size=16, intermediate_size=17, head_dim=0)
    target = dataclasses.replace(
        target, hidden_size=12, num_attention_heads=6, num_key_value_heads=3, head_dim=2
    )
    source = dataclasses.replace(source, head_dim=2)
    largest, report = difference(source, target, "net2net")
    assert report.function_preserving == (not reason), report.reasons_not_preserving
    assert (largest < 1e-9) == (not reason)
    assert reason in " ".join(report.reasons_not_preserving)
    assert all(", expected " in text for text in report.reasons_not_preserving)


def test_a_decoder_never_grows_exactly_into_an_encoder():
    source = dataclasses.replace(SOURCE, model_type="llama", head_dim=0)
    target = dataclasses.replace(source, model_type="eurobert", hidden_size=16, head_dim=2, pad_token_id=1)
    with pytest.raises(UserError, match="lemon: is_causal True → False, expected True"):
        plan_growth("lemon", dataclasses.replace(source, head_dim=2), target, jax.random.key(0))


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
@pytest.mark.parametrize("method", ["net2net", "lemon", "fna"])
def test_a_classifier_of_an_encoder_grows_exactly_at_any_width(pooling, method):
    source = dataclasses.replace(SOURCE, model_type="eurobert", classifier_pooling=pooling)
    target = dataclasses.replace(source, hidden_size=18, num_attention_heads=6, num_key_value_heads=3)
    params = jax.tree.map(lambda x: x.astype(np.float64), random_params(source, ("classifier",), labels=3))
    grown, report = remap_params(params, source, target, method, jax.random.key(0))
    assert report.function_preserving, report.reasons_not_preserving
    assert grown["classifier"]["dense"]["kernel"].shape == (18, 18)
    tokens, segments = batch(source)
    segments = np.minimum(segments, 1)
    policy, found = Policy(np.dtype(np.float64), np.dtype(np.float64)), []
    with jax.enable_x64(True):
        for tree, config in ((params, source), (grown, target)):
            hidden = family(config).encode(tree, config, tokens, segments, policy=policy)
            found.append(family(config).classifier_logits(tree, config, hidden, segments, policy=policy))
    np.testing.assert_allclose(found[1], found[0], atol=2e-6)  # logits are fp32


def test_tied_to_untied_and_more_tokens():
    target = dataclasses.replace(SOURCE, hidden_size=13, tie_word_embeddings=False, vocab_size=700)
    largest, report = difference(SOURCE, target, "net2net")
    assert report.function_preserving
    assert largest < 1e-9


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_groups_may_be_split(kind):
    """Fewer query heads for each head of keys and values, which is repeated: up to multi-head attention."""
    for heads, kv_heads in ((4, 4), (8, 8), (8, 4)):
        source = dataclasses.replace(SOURCE, model_type=kind)
        target = dataclasses.replace(source, num_attention_heads=heads, num_key_value_heads=kv_heads)
        largest, report = difference(source, target, "net2net")
        assert report.function_preserving
        assert largest < 1e-9


def test_the_length_that_llama3_counts_from_is_part_of_the_function():
    """It is `max_position_embeddings` where no other is set."""
    rope = {"rope_type": "llama3", "rope_theta": 50.0, "rope_factor": 8.0}
    source = dataclasses.replace(SOURCE, **rope)
    longer = dataclasses.replace(source, hidden_size=12, max_position_embeddings=80)
    with pytest.raises(UserError, match="lemon: rope_original_length 20 → 80, expected 20"):
        difference(source, longer, "lemon")
    drift, report = difference(source, longer, "net2net")
    assert not report.function_preserving
    assert drift > 1e-3
    same = dataclasses.replace(longer, rope_original_max_position_embeddings=20)
    drift, report = difference(source, same, "lemon")
    assert report.function_preserving
    assert drift < 1e-9


def test_a_group_that_cannot_be_split_is_not_exact():
    source = dataclasses.replace(SOURCE, num_attention_heads=6)  # 3 query heads each
    target = dataclasses.replace(source, num_attention_heads=8, num_key_value_heads=4)
    largest, report = difference(source, target, "net2net")
    assert report.reasons_not_preserving == (
        "query heads for each head of keys and values 3 → 2, expected a divisor or more of 3",
    )
    assert largest > 1e-3
    with pytest.raises(UserError, match="lemon: query heads for each head of keys and values 3 → 2"):
        plan_growth("lemon", source, target, jax.random.key(0))


def test_heads_tiled_across_groups_would_be_wrong(monkeypatch):
    """What the maps of groups are for: query head h reads head h // G."""
    target = dataclasses.replace(SOURCE, num_attention_heads=8)
    params, (tokens, segments) = float64_params(SOURCE), batch(SOURCE)
    plan = plan_growth("hyperclone", SOURCE, target, jax.random.key(0))
    assert plan.maps["head"].index.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    tiled = plan.maps["head"]._replace(index=np.arange(8) % 4)
    wrong = apply.grow_params(plan._replace(maps={**plan.maps, "head": tiled}), params)
    before = logits(params, SOURCE, tokens, segments, np.float64)
    assert np.abs(logits(wrong, target, tokens, segments, np.float64) - before).max() > 1e-2


def test_plain_copies_would_be_wrong():
    """What the scales are for: a width that is not a multiple changes the mean square of plain copies."""
    target = dataclasses.replace(SOURCE, hidden_size=13)
    params, (tokens, segments) = float64_params(SOURCE), batch(SOURCE)
    plan = plan_growth("net2net", SOURCE, target, jax.random.key(0))
    wrong = apply.grow_params(plan._replace(scales_residual=False), params)
    before = logits(params, SOURCE, tokens, segments, np.float64)
    assert np.abs(logits(wrong, target, tokens, segments, np.float64) - before).max() > 1e-2


def test_new_channels_that_are_not_0_are_refused_where_exactness_is_claimed():
    target = dataclasses.replace(SOURCE, hidden_size=13)
    with pytest.raises(UserError, match="masked: hidden_size 8 → 13, expected a method that copies channels"):
        plan_growth("masked", SOURCE, target, jax.random.key(0))


@pytest.mark.parametrize("method", ["net2net", "lemon"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_scale_as_first_moments_do(method, tied):
    """The gradient of the grown model, from the rule for moments and by autodiff."""
    source = dataclasses.replace(SOURCE, tie_word_embeddings=tied)
    target = dataclasses.replace(source, hidden_size=13, num_attention_heads=8, intermediate_size=20)
    params, (tokens, segments) = float64_params(source), batch(source)
    plan = plan_growth(method, source, target, jax.random.key(0))
    with jax.enable_x64(True):
        grown = apply.grow_params(plan, params)
        gradient = jax.grad(loss)(params, source, tokens, segments)
        expected = jax.grad(loss)(grown, target, tokens, segments)
        found = apply.grow_params(plan, jax.device_get(gradient), order=1)
    for name, leaf in leaves(expected).items():
        np.testing.assert_allclose(leaves(found)[name], leaf, atol=1e-9, err_msg=name)


def loss(params, config, tokens, segments):
    module, policy = family(config), Policy(np.dtype(np.float64), np.dtype(np.float64))
    hidden = module.encode(params, config, tokens, segments, policy=policy)
    table = module.output_embedding(params)[0][: config.vocab_size]
    return (jax.nn.log_softmax(hidden @ table.T)[..., 7] * (segments > 0)).sum()
