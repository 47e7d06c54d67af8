"""Fields that change what a model of the same sizes computes: no growth claims to be exact across one."""

import dataclasses

import jax
import pytest

from dwt_jax.errors import UserError
from dwt_jax.remap.plan import plan_growth
from helpers.small_models import small

LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "rope_factor": 8.0}


@pytest.mark.parametrize(
    ("model_type", "settings", "field", "value"),
    [
        ("bert", {}, "hidden_act", "relu"),
        ("bert", {}, "layer_norm_eps", 1e-3),
        ("bert", {}, "model_type", "roberta"),
        ("modernbert", {}, "hidden_act", "relu"),
        ("modernbert", {}, "classifier_activation", "relu"),
        ("modernbert", {}, "norm_eps", 1e-3),
        ("modernbert", {}, "global_attn_every_n_layers", 2),
        ("modernbert", {}, "local_attention", 4),
        ("modernbert", {}, "global_rope_theta", 50.0),
        ("modernbert", {}, "local_rope_theta", 50.0),
        ("modernbert", {}, "classifier_pooling", "mean"),
        ("mistral", {}, "hidden_act", "relu"),
        ("mistral", {}, "rms_norm_eps", 1e-3),
        ("mistral", {}, "sliding_window", 3),
        ("mistral", {}, "rope_theta", 50.0),
        ("mistral", LLAMA3, "rope_type", "linear"),
        ("mistral", LLAMA3, "rope_factor", 4.0),
        ("mistral", LLAMA3, "rope_low_freq_factor", 2.0),
        ("mistral", LLAMA3, "rope_high_freq_factor", 8.0),
    ],
)
def test_another_value_is_another_function(model_type, settings, field, value):
    source = small(model_type, **settings)
    before = getattr(source, field)
    target = dataclasses.replace(source, **{field: value})
    change = f"{field} {before} → {value}, expected {before}"
    assert change in plan_growth("net2net", source, target, jax.random.key(0)).reasons_not_preserving
    with pytest.raises(UserError, match=r"^hyperclone: ") as error:
        plan_growth("hyperclone", source, target, jax.random.key(0))
    assert change in str(error.value)
    assert plan_growth("hyperclone", source, source, jax.random.key(0)).function_preserving
