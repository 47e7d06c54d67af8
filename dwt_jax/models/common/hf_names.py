"""Hugging Face's names of a model's tensors and config keys, read in both directions.

Each table pairs the path of a module in dwt_jax with its name in transformers. The conversion of an array
(transposed, heads flattened, one tensor per layer) follows from its logical axes, see hf/checkpoint.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwt_jax.models.protocol import ModelConfig

LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


@dataclass(frozen=True)
class HFNames:
    """The names of one `model_type`. `{layer}` stands for the number of a layer."""

    class_prefix: str  # what the names of its classes begin with: Xyz in XyzForMaskedLM
    prefix: str  # of the encoder's tensors; a bare encoder is saved without it
    bare_prefixes: tuple[str, ...]  # how the encoder's tensors begin where the prefix is left out
    modules: Mapping[str, str]
    classifier_modules: Mapping[str, str]  # modules with another name in a ForSequenceClassification
    aliases: Mapping[str, str]  # older or second names → the names used above
    config_keys: Mapping[str, str]  # fields of the family's Config ↔ keys of config.json
    defaults: Mapping[str, Any]  # what a key left out of config.json means, by fields of Config
    required_values: Mapping[
        str, tuple[Any, ...]
    ]  # keys of config.json and the values they may have (or null)
    # (heads, ending of the class's name), the first that a model has all heads of; none: 'Model'
    architectures: Sequence[tuple[tuple[str, ...], str]]
    buffers: tuple[str, ...] = ()  # endings of tensors that older versions saved and that hold no weights
    absent_tensors: tuple[str, ...] = ()  # of layers without a leaf that others have; it counts as new
    # Of keys of config.json that are no plain values, to and from what `config_keys` names. The first may
    # raise a UserError; the second's keys are written beside the others.
    flatten_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    nest_config: Callable[["ModelConfig"], Mapping[str, Any]] = lambda config: {}
    nested_keys: tuple[str, ...] = ()  # those of `config_keys` that only `flatten_config` makes
    # Keys of config.json with the ids of tokens, and the tokens' roles: written if a tokenizer is.
    token_id_keys: tuple[tuple[str, str], ...] = ()
    # Tensors that are computed here and stored by transformers, by name.
    computed_tensors: Callable[["ModelConfig"], Mapping[str, Any]] = lambda config: {}

    def tensor_name(self, path: str, is_classifier: bool = False) -> str:
        """Return the tensor's name of a leaf: 'layers/mlp/input/kernel' → '….layer.{layer}.….weight'."""
        module, _, leaf = path.rpartition("/")
        classifier_name = self.classifier_modules.get(module) if is_classifier else None
        return f"{classifier_name or self.modules[module]}.{LEAF_NAMES[leaf]}"

    @property
    def has_pooler(self) -> bool:
        """Whether a pooler is part of the encoder. Otherwise it is part of the classifier."""
        return self.modules.get("pooler", "").startswith(self.prefix)

    def canonical_tensor_name(self, name: str) -> str:
        """Return the table's name of a tensor as some version of transformers saved it.

        It has the prefix, and `gamma` and `beta` of a norm are `weight` and `bias`.
        """
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return self.prefix + name if name.startswith(self.bare_prefixes) else name

    def is_class_name(self, name: str) -> bool:
        """Return whether `name` is that of one of its classes."""
        return name.startswith((f"{self.class_prefix}For", f"{self.class_prefix}Model"))

    def architecture_name(self, heads: Iterable[str]) -> str:
        """Return the class of transformers that holds these heads, e.g. 'XyzForMaskedLM'."""
        heads = set(heads)
        endings = (ending for needed, ending in self.architectures if heads.issuperset(needed))
        return f"{self.class_prefix}{next(endings, 'Model')}"


def encoder_names(prefix: str, layer: str, names: Mapping[str, str]) -> dict[str, str]:
    """Return full names: those of paths that begin with layers/ lie below `layer`."""
    return {
        path: prefix + (f"{layer}.{{layer}}.{name}" if path.startswith("layers/") else name)
        for path, name in names.items()
    }
