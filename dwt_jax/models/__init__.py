"""Model families, one file each, and the registry that finds them by `model_type`.

Importing this package loads neither jax nor any family.
"""

import importlib
from typing import cast

from dwt_jax.models.protocol import Family, ModelConfig

FAMILIES = {
    "bert": "dwt_jax.models.bert",
    "distilbert": "dwt_jax.models.bert",
    "llama": "dwt_jax.models.llama",
    "mistral": "dwt_jax.models.llama",
    "modernbert": "dwt_jax.models.modernbert",
    "qwen2": "dwt_jax.models.llama",
    "qwen3": "dwt_jax.models.llama",
    "eurobert": "dwt_jax.models.llama",
    "roformer": "dwt_jax.models.bert",
    "roberta": "dwt_jax.models.bert",
}
"""`model_type`, as in Hugging Face's config.json, and the module of its family.

Of those whose tensors have the same names the first is taken where neither key nor class tells which.

The family's `Config` is in a module of that name with `_config` at its end, which does not import jax.
"""

MODEL_TYPE_ALIASES = {"camembert": "roberta", "xlm-roberta": "roberta"}
"""Other names of a `model_type`, for models that differ in their tokenizers alone."""

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


def model_config_type(model_type: str) -> type[ModelConfig]:
    """Return the `Config` of the family of a `model_type`, without importing jax.

    jax reads its settings from the environment when it is imported. `runtime_env.set_xla_env` runs after
    the config is loaded and before that.

    Raises:
        KeyError: the `model_type` is not registered.
    """
    module = importlib.import_module(f"{FAMILIES[model_type]}_config")
    return cast(type[ModelConfig], module.Config)


def default_model_config() -> ModelConfig:
    """Return the config of DEFAULT_MODEL_TYPE with its default sizes."""
    return model_config_type(DEFAULT_MODEL_TYPE)()
