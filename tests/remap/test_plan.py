"""Growth plans: position maps, and pairs of models that a method does not support."""

import dataclasses

import pytest

from dwt_jax.errors import UserError
from dwt_jax.models import modernbert_config
from dwt_jax.remap import plan, width_maps
from dwt_jax.remap.apply import remap_params
from helpers.reference import parameters
from helpers.remapping import KEY, SMALL, small_with


def test_position_map_keeps_rows_before_first_position():
    roberta = small_with(model_type="roberta", pad_token_id=1)
    source, target = (dataclasses.replace(roberta, max_position_embeddings=n) for n in (6, 13))
    m = plan._position_map(source, target, "tiled")
    assert list(m.index) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4]
    assert list(m.kind) == [width_maps.COPIED] * 6 + [width_maps.DUPLICATE] * 7


def test_positions_of_a_source_without_a_table_are_new():
    """A roformer has no position table, so there is nothing to repeat."""
    bert = small_with(max_position_embeddings=6)
    m = plan._position_map(dataclasses.replace(bert, model_type="roformer"), bert, "tiled")
    assert list(m.kind) == [width_maps.NEW] * 6
    assert not m.split.any()


def test_table_that_the_target_lacks_is_named():
    target = small_with(model_type="roformer")
    reasons = remap_params(parameters(SMALL), SMALL, target, "net2net", KEY)[1].reasons_not_preserving
    assert any(": a roformer has no such table, expected a model_type" in reason for reason in reasons)
    assert not any("→ 0" in reason for reason in reasons)


def test_other_family_names_the_possible_model_types():
    target = modernbert_config.Config(vocab_size=SMALL.vocab_size)
    with pytest.raises(
        UserError, match=r"model_type bert → modernbert, expected bert or distilbert or .*rober"
    ):
        remap_params(parameters(SMALL), SMALL, target, "net2net", KEY)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("hyperclone", {"hidden_size": 12}, "hyperclone: hidden_size 8 → 12, expected a multiple of 8"),
        ("hyperclone", {"intermediate_size": 20}, "intermediate_size 12 → 20, expected a multiple of 12"),
        ("hyperclone", {"num_hidden_layers": 3}, "num_hidden_layers 2 → 3, expected 2 .*stack.hyperclone"),
        ("stack", {"intermediate_size": 20}, "stack: intermediate_size 12 → 20, expected 12 .*stack.net2net"),
        ("lemon", {"hidden_size": 12}, "hidden_size 8 → 12, expected a multiple of 8 or model.weighted_norm"),
        ("lemon", {"intermediate_size": 4}, "intermediate_size 12 → 4, expected at least 12"),
        ("masked", {"hidden_size": 16}, "masked: hidden_size 8 → 16, expected model.weighted_norm"),
        ("masked", {"num_hidden_layers": 3}, "num_hidden_layers 2 → 3, expected model.gated_layers"),
        ("net2net", {"num_attention_heads": 3}, "hidden_size is 8, expected a multiple of num_attention_he"),
        ("net2net", {"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ("netnet", {}, "method is 'netnet'; did you mean 'net2net'"),
        ("stak+net2net", {}, "did you mean 'stack'"),
        ("stack+middle", {}, "method is 'stack.middle'"),
    ],
)  # fmt: skip
def test_unsupported_pair_raises(method, change, message):
    with pytest.raises(UserError, match=message) as error_info:
        remap_params(parameters(SMALL), SMALL, small_with(**change), method, KEY)
    assert "\n" not in str(error_info.value)


def test_growth_that_drops_gates_raises():
    source = small_with(weighted_norm=True, gated_layers=True)
    with pytest.raises(UserError, match="weighted_norm true → false"):
        remap_params(parameters(source), source, SMALL, "net2net", KEY)
