"""Overriding one key of a group leaves the defaults of its other keys."""

import dataclasses

import pytest

from dwt_jax.config import Config, Schedule
from dwt_jax.config_loader import build_dataclass, config_to_dict, flatten_dict
from dwt_jax.finetune.config import FinetuneConfig

LEAVES = [
    (kind, key, value)
    for kind in (Config, FinetuneConfig)
    for key, value in flatten_dict(config_to_dict(kind())).items()
    if not key.endswith(".kind") and not key[-1].isdigit() and not isinstance(value, list)
]


@pytest.mark.parametrize(
    ("kind", "key", "value"), LEAVES, ids=[f"{k.__name__}-{key}" for k, key, _ in LEAVES]
)
def test_a_key_set_to_its_default_changes_nothing(kind, key, value):
    """In a file and on the command line."""
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    if ".sources." not in key:  # an entry of a list has no default but that of its class
        assert build_dataclass(kind, tree) == kind()
    assert build_dataclass(kind, {}, {key: str(value)}) == kind()


@pytest.mark.parametrize("group", [{"value": 1e-3}, {"warmup_fraction": 0.2}])
def test_part_of_a_schedule_keeps_the_rest_of_the_default(group):
    default = Config().optimizer.learning_rate
    built = build_dataclass(Config, {"optimizer": {"learning_rate": group}}).optimizer.learning_rate
    assert built == dataclasses.replace(default, **group)
    assert built.kind == "linear"


@pytest.mark.parametrize("overrides", [{}, {"optimizer.learning_rate.warmup_fraction": "0"}])
def test_a_number_or_a_kind_is_a_new_schedule(overrides):
    for value in (1e-3, {"kind": "constant", "value": 1e-3}):
        built = build_dataclass(Config, {"optimizer": {"learning_rate": value}}, overrides)
        assert built.optimizer.learning_rate == Schedule(value=1e-3)


def test_one_key_of_the_recipes_optimizer_keeps_its_rate():
    recipe = build_dataclass(FinetuneConfig, {}, {"recipe.optimizer.weight_decay": "0.1"}).recipe
    assert (recipe.optimizer.learning_rate.value, recipe.optimizer.eps) == (2e-5, 1e-6)
