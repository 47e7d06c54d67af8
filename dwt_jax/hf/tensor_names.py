"""Detect a model's family, prefix and heads from the names of the tensors in a file."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.hf.tensor_files import Weights
from dwt_jax.hf.unpickler import short_repr
from dwt_jax.models import FAMILIES, family
from dwt_jax.models.common.hf_names import HFNames
from dwt_jax.models.common.logical_axes import is_gate
from dwt_jax.models.protocol import ModelConfig

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules of torch around another one: of data parallelism, torch.compile, FSDP and activation checkpointing.

No module of a family has such a name."""


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def require_plausible_sizes(tensors: Weights, model: ModelConfig, location: str) -> None:
    """Check the config's sizes against the file, since later checks take time proportional to them.

    Raises:
        UserError: sizes that the file cannot hold.
    """
    num_elements = sum(math.prod(tensors.shape(name)) for name in tensors)
    for field in dataclasses.fields(model):
        size = getattr(model, field.name)
        if type(size) is int and size > max(num_elements, 10**6):
            raise UserError(f"{location}: {num_elements} numbers, too few for a {field.name} of {size}")
    if model.num_hidden_layers > len(tensors):
        raise UserError(
            f"{location}: {len(tensors)} tensors, too few for num_hidden_layers of {model.num_hidden_layers}"
        )


def canonical_names(tensors: Weights, names: HFNames) -> tuple[dict[str, str], list[str]]:
    """Return {name in HF_NAMES: name in the file}, and the tensors that the file has twice.

    Names of modules that only wrap another one are left out (WRAPPERS).
    """
    file_names: dict[str, str] = {}
    problems = []
    for key in tensors:
        name = names.canonical_tensor_name(_without_wrappers(key))
        if name.endswith(names.buffers):
            continue
        if name in file_names:
            problems.append(f"{file_names[name]} and {key} are the same tensor")
        file_names[name] = key
    for alias, name in names.aliases.items():  # of two biases transformers uses the decoder's
        if alias in file_names:
            file_names[name] = file_names.pop(alias)
    return file_names, problems


def is_tied(tensors: Weights, file_names: dict[str, str], model: ModelConfig, names: HFNames) -> bool:
    """Return whether the decoder is tied to the input embedding, as transformers decides it.

    It is not if the file has both and they differ, independent of config.json. An equal copy is dropped from
    `file_names`.
    """
    ((tied_leaf, source_leaf),) = family(model).TIED_TO.items()
    word, decoder = names.tensor_name(source_leaf), names.tensor_name(tied_leaf)
    if decoder not in file_names or not model.tie_word_embeddings:
        return model.tie_word_embeddings
    if word not in file_names:
        file_names[word] = file_names.pop(decoder)
        return True
    a, b = (np.asarray(tensors[file_names[name]], np.float32) for name in (word, decoder))
    if not np.array_equal(a, b, equal_nan=True):
        return False
    del file_names[decoder]
    return True


def detect_heads(
    file_names: Mapping[str, str], model: ModelConfig, architectures: Sequence[str]
) -> tuple[str, ...]:
    """Return the heads that have a tensor in the file.

    Only sequence classifiers count: they have a pooler. Models for token classification and multiple
    choice use the same tensor names.
    """
    names = family(model).HF_NAMES[model.model_type]
    tied_leaves = family(model).TIED_TO if model.tie_word_embeddings else {}

    def has_head(head: str, is_classifier: bool) -> bool:
        leaves = [path for path in family(model).param_axes(model) if path.split("/")[0] == head]
        if all(path in tied_leaves for path in leaves):  # it has no tensor of its own
            return not is_classifier
        paths = [path for path in leaves if path.rpartition("/")[0] in names.modules and not is_gate(path)]
        return any(names.tensor_name(path, is_classifier) in file_names for path in paths)

    is_sequence_model = not any(
        name.endswith(("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering"))
        for name in architectures
    )
    is_classifier = is_sequence_model and all(has_head(head, True) for head in family(model).CLASSIFIER_HEADS)
    heads = []
    for head in family(model).HEADS:
        if head == "classifier" and not is_classifier:
            continue
        if head == "pooler" and not is_classifier and not names.has_pooler:
            continue
        if has_head(head, is_classifier):
            heads.append(head)
    lm_heads, classifier_heads = set(family(model).LM_HEADS), set(family(model).CLASSIFIER_HEADS)
    if not (lm_heads <= set(heads) or classifier_heads <= set(heads)):  # what both read is of no use alone
        heads = [head for head in heads if head not in lm_heads & classifier_heads]
    return tuple(heads)


# The family


def matching_model_types(tensor_names: Iterable[str]) -> list[str]:
    """Return the model types whose encoder has tensors of these names.

    They are several if the names are without the encoder's prefix, or if families share it.
    """
    plain_names = [_without_wrappers(name) for name in tensor_names]
    matches = []
    for kind in FAMILIES:
        names = family(kind).HF_NAMES[kind]
        paths = ("embeddings/word/embedding", "layers/mlp/input/kernel")
        expected = {names.tensor_name(path).format(layer=0) for path in paths}
        if expected <= set(map(names.canonical_tensor_name, plain_names)):
            matches.append(kind)
    return matches


def require_layers(file_names: Mapping[str, str], model: ModelConfig, location: str) -> None:
    """Check that the file has a tensor of some layer under the names of the model's family.

    Args:
        file_names: as from `canonical_names`.
        model: config of the model.
        location: path of the file, for messages.

    Raises:
        UserError: there is none. The message has the actual and the expected prefix of the names.
    """
    names = family(model).HF_NAMES[model.model_type]
    templates = [
        names.tensor_name(path)
        for path in family(model).param_axes(model)
        if path.startswith("layers/") and path.rpartition("/")[0] in names.modules and not is_gate(path)
    ]
    layers = range(model.num_hidden_layers)
    if any(template.format(layer=i) in file_names for template in templates for i in layers):
        return
    if not (tensor_names := list(file_names.values())):
        raise UserError(f"{location}: no tensors of weights, expected those of a {model.model_type}")
    prefix = _most_common_prefix(tensor_names, names)
    example = next(
        (name for name in tensor_names if name.startswith(prefix) and ".0." in name), tensor_names[0]
    )
    matches = [kind for kind in matching_model_types(tensor_names) if kind != model.model_type]
    raise UserError(
        f"{location}: its names begin with {short_repr(prefix)} ({short_repr(example)}), expected "
        f"'{names.prefix}' or none ('{templates[0].format(layer=0)}') for model_type '{model.model_type}'"
        + (f"; they are those of model_type {' or '.join(matches)}" if matches else "")
        + f"; known model types: {', '.join(FAMILIES)}"
    )


def _most_common_prefix(tensor_names: Sequence[str], names: HFNames) -> str:
    """What stands before the family's names, or else how most names begin."""
    bare_word = names.tensor_name("embeddings/word/embedding").removeprefix(names.prefix)
    prefixes = [name.removesuffix(bare_word) for name in tensor_names if name.endswith(f".{bare_word}")]
    prefixes = prefixes or [f"{name.split('.')[0]}." for name in tensor_names]
    return Counter(prefixes).most_common(1)[0][0]
