"""Model families, one file each, and the registry that finds them by `model_type`.

Importing this package loads neither jax nor any family.
"""

import importlib
from typing import cast

from dwt_jax.models.protocol import Family, ModelConfig

FAMILIES = {
    "bert": "dwt_jax.models.bert",
    "distilbert": "dwt_jax.models.bert",
    "roberta": "dwt_jax.models.bert",
}
"""`model_type`, as in Hugging Face's config.json, and the module of its family."""

DEFAULT_MODEL_TYPE = "bert"


def family(model: ModelConfig | str) -> Family:
    """Return the module of a model's family.

    Args:
        model: a model config, or a `model_type`.

    Raises:
        KeyError: the `model_type` is not registered.
    """
    model_type = model if isinstance(model, str) else model.model_type
    return cast(Family, importlib.import_module(FAMILIES[model_type]))


def default_model_config() -> ModelConfig:
    """Return the config of DEFAULT_MODEL_TYPE with its default sizes."""
    return family(DEFAULT_MODEL_TYPE).Config()
