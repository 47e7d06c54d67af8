"""Every registered objective defines what the protocol names, and each family names a registered one."""

import inspect

import jax
import numpy as np
import pytest

from dwt_jax.config import Config, Mlm, Schedule
from dwt_jax.data.batch import Batch
from dwt_jax.models import FAMILIES, model_config_type
from dwt_jax.objectives import OBJECTIVES, ObjectiveModule, objective_module
from dwt_jax.objectives.targets import row_keys


@pytest.mark.parametrize("name", OBJECTIVES)
def test_module_defines_protocol(name):
    module = objective_module(name)
    for method, signature in inspect.getmembers(ObjectiveModule, inspect.isfunction):
        if not method.startswith("_"):
            expected = [p for p in inspect.signature(signature).parameters if p != "self"]
            assert list(inspect.signature(getattr(module, method)).parameters) == expected, method


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_names_registered_objective(model_type):
    assert model_config_type(model_type)(model_type=model_type).objective in OBJECTIVES


@pytest.mark.parametrize("whole_word", [False, True])
def test_abstract_objective_has_targets_of_the_right_shapes(whole_word):
    config = Config(mlm=Mlm(probability=Schedule(value=0.3), whole_word=whole_word))
    module = objective_module(config.model.objective)
    objective = module.abstract_objective(config, 50)
    assert objective_module(objective) is module
    assert hash(objective) == hash(module.abstract_objective(config, 50))
    batch = Batch(np.full((4, 20), 9, np.uint16), np.ones((4, 20), np.uint8))
    targets = module.make_targets(batch, row_keys(0, 0, np.arange(4)), objective)
    predictions = module.predictions_per_row(objective, 20)
    assert predictions == 6
    shapes = jax.tree.map(np.shape, targets)
    assert shapes.inputs == (4, 20)
    assert shapes.positions == shapes.labels == shapes.weights == (4, predictions)
    assert targets.num_predictions() == 24
