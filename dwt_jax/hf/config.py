"""Read and write the `config.json` of a model directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from dwt_jax.config_values import parse_scalar
from dwt_jax.errors import UserError
from dwt_jax.hf.tensor_names import matching_model_types
from dwt_jax.model_files import is_model_file, read_model_json
from dwt_jax.models import FAMILIES, MODEL_TYPE_ALIASES, family
from dwt_jax.models.protocol import ModelConfig

CLASSIFIER_KEYS = ("problem_type", "classifier_dropout", "seq_classif_dropout")
_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
PASSTHROUGH_KEYS = (*CLASSIFIER_KEYS, *_TOKEN_ID_KEYS, "tokenizer_class")
"""Keys without a meaning in dwt_jax that transformers reads. They are copied to an exported model."""


class HFConfig(NamedTuple):
    """The content of a `config.json`."""

    model: ModelConfig
    labels: tuple[str, ...]  # of a classifier, by its outputs
    architectures: tuple[str, ...]  # names of the model's classes; () if the file has none
    passthrough: dict[str, Any]  # PASSTHROUGH_KEYS


def to_hf_config(
    model: ModelConfig,
    heads: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    dtype: str = "float32",
) -> dict[str, Any]:
    """Return the content of `config.json` for a model.

    Args:
        model: config of the model.
        heads: heads that the parameters have. None: those of pre-training.
        labels: names of the classifier's outputs.
        dtype: dtype of the saved weights.
    """
    names = family(model).HF_NAMES[model.model_type]
    config: dict[str, Any] = {
        "architectures": [names.architecture_name(family(model).LM_HEADS if heads is None else heads)],
        "model_type": model.model_type,
        **{
            key: getattr(model, field)
            for field, key in names.config_keys.items()
            if key not in names.nested_keys
        },
        **names.nest_config(model),
        "dtype": dtype,
    }
    if labels:
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config


def load_hf_config(path: Path, tensor_names: Sequence[str] = ()) -> HFConfig:
    """Read the `config.json` of a model directory. Absent keys have the defaults of transformers.

    A `model_type` in MODEL_TYPE_ALIASES is read, and written back, as the type that it stands for.

    Args:
        path: model directory.
        tensor_names: names of its tensors, by which the family is detected if `model_type` is absent.

    Raises:
        UserError: a key is not supported; the message has the key and its value.
    """
    config_path = path / "config.json"
    old_name = next(
        (f"{kind}_config.json" for kind in FAMILIES if (path / f"{kind}_config.json").exists()), ""
    )
    if old_name and not is_model_file(config_path):
        raise UserError(f"{config_path}: no such file, expected {old_name} to be renamed to this")
    config = read_model_json(config_path, "a Hugging Face model config")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{config_path}: architectures is {architectures!r}, expected a list of names")
    kind = _model_type(config, config_path, tensor_names, architectures)
    _check_required_values(config, kind, config_path)
    fields = family(kind).HF_NAMES[kind].config_keys.values()
    passthrough = {
        key: config[key] for key in PASSTHROUGH_KEYS if config.get(key) is not None and key not in fields
    }
    for key in ("tokenizer_class", "problem_type"):
        if not isinstance(passthrough.get(key, ""), str):
            raise UserError(f"{config_path}: {key} is {passthrough[key]!r}, expected a name")
    return HFConfig(
        _parse_model(config, kind, config_path),
        _parse_labels(config, config_path),
        tuple(architectures),
        passthrough,
    )


def _check_required_values(config: Mapping[str, Any], kind: str, config_path: Path) -> None:
    for key, allowed in family(kind).HF_NAMES[kind].required_values.items():
        if config.get(key) is not None and config[key] not in allowed:
            expected = f"{allowed[0]!r}" if allowed else "none: quantised weights are not read"
            raise UserError(f"{config_path}: {key} is {config[key]!r}, expected {expected}")


def _parse_model(config: Mapping[str, Any], kind: str, config_path: Path) -> ModelConfig:
    config_type, names = family(kind).Config, family(kind).HF_NAMES[kind]
    hints = get_type_hints(config_type)
    try:
        config = names.flatten_config(config)
        values = {field: config[key] for field, key in names.config_keys.items() if key in config}
        if values.get("pad_token_id", 0) is None:
            del values["pad_token_id"]
        values = {
            field: parse_scalar(hints[field], value, names.config_keys[field])
            for field, value in values.items()
        }
    except UserError as error:
        raise UserError(f"{config_path}: {str(error).removeprefix('config: ')}") from None
    model = config_type(**{"model_type": kind, **names.defaults, **values})
    for problem in model.problems():
        raise UserError(f"{config_path}: {problem}")
    return model


def _model_type(
    config: Mapping[str, Any], config_path: Path, tensor_names: Sequence[str], architectures: Sequence[str]
) -> str:
    """The model type in the config, or else the one that matches the names of tensors and classes."""
    kind = config.get("model_type")
    if isinstance(kind, str) and (kind in FAMILIES or kind in MODEL_TYPE_ALIASES):
        return MODEL_TYPE_ALIASES.get(kind, kind)
    expected = f"expected one of {', '.join((*FAMILIES, *MODEL_TYPE_ALIASES))}"
    matches = matching_model_types(tensor_names)
    if kind:
        hint = f" (its tensors have the names of {' or '.join(matches)})" if matches else ""
        raise UserError(f"{config_path}: model_type is {kind!r}, {expected}{hint}")
    names = {kind: family(kind).HF_NAMES[kind] for kind in matches}
    by_class = [kind for kind in matches if any(map(names[kind].is_class_name, architectures))]
    candidates = by_class or matches
    if len({names[kind].prefix for kind in candidates}) != 1:  # none, or names without a prefix
        tensors = f"tensors of {' or '.join(candidates)}" if candidates else "tensors of no known family"
        raise UserError(f"{config_path}: no model_type, and {tensors}, {expected}")
    return candidates[0]


def _parse_labels(config: Mapping[str, Any], config_path: Path) -> tuple[str, ...]:
    id2label = config.get("id2label")
    if not id2label:
        return ()
    try:
        label_by_index = {int(key): str(label) for key, label in id2label.items()}
        return tuple(label_by_index[i] for i in range(len(id2label)))
    except (AttributeError, TypeError, ValueError, KeyError):
        text = str(id2label)[:200]
        raise UserError(
            f"{config_path}: id2label is {text}, expected an object of names by 0, 1, …"
        ) from None
