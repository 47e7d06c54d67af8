"""What Hugging Face calls things: one table a family, read in both directions.

A module's path here stands beside its name there; what becomes of an array on the way
(transposed, heads flattened, one tensor a layer) follows from its roles, see huggingface.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Family:
    """The names of one `model_type`. `{layer}` stands for the number of a layer."""

    name: str  # of its classes: Bert in BertForMaskedLM
    prefix: str  # of the encoder's tensors; a bare encoder is saved without it
    bare_prefixes: tuple[str, ...]  # how the encoder's tensors begin where the prefix is left out
    modules: Mapping[str, str]
    classifier_modules: Mapping[str, str]  # what is called otherwise in a ForSequenceClassification
    aliases: Mapping[str, str]  # older or second names → the names used above
    config_keys: Mapping[str, str]  # fields of Model ↔ keys of config.json
    defaults: Mapping[str, Any]  # what a key left out of config.json means, by fields of Model

    def tensor_name(self, path: str, is_classifier: bool = False) -> str:
        """'layers/mlp/input/kernel' → 'bert.encoder.layer.{layer}.intermediate.dense.weight'"""
        module, _, leaf = path.rpartition("/")
        classifier_name = self.classifier_modules.get(module) if is_classifier else None
        return f"{classifier_name or self.modules[module]}.{LEAF_NAMES[leaf]}"

    @property
    def has_pooler(self) -> bool:
        """Whether a pooler is part of the encoder. Elsewhere it is the classifier's."""
        return self.modules["pooler"].startswith(self.prefix)


def _encoder(prefix: str, layer: str, names: Mapping[str, str]) -> dict[str, str]:
    """Full names: what begins with layers/ lies below `layer`."""
    return {
        path: prefix + (f"{layer}.{{layer}}.{name}" if path.startswith("layers/") else name)
        for path, name in names.items()
    }


_BERT_ENCODER = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layers/attention/query": "attention.self.query",
    "layers/attention/key": "attention.self.key",
    "layers/attention/value": "attention.self.value",
    "layers/attention/output": "attention.output.dense",
    "layers/attention/norm": "attention.output.LayerNorm",
    "layers/mlp/input": "intermediate.dense",
    "layers/mlp/output": "output.dense",
    "layers/mlp/norm": "output.LayerNorm",
    "pooler": "pooler.dense",
}

_DISTILBERT_ENCODER = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layers/attention/query": "attention.q_lin",
    "layers/attention/key": "attention.k_lin",
    "layers/attention/value": "attention.v_lin",
    "layers/attention/output": "attention.out_lin",
    "layers/attention/norm": "sa_layer_norm",
    "layers/mlp/input": "ffn.lin1",
    "layers/mlp/output": "ffn.lin2",
    "layers/mlp/norm": "output_layer_norm",
}

_BERT_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "pad_token_id",
        "tie_word_embeddings",
    )
}

_BASE_DEFAULTS = {"vocab_size": 30522, "num_hidden_layers": 12}  # where the defaults of Model are others

FAMILIES = {
    "bert": Family(
        name="Bert",
        prefix="bert.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **_encoder("bert.", "encoder.layer", _BERT_ENCODER),
            "mlm/transform": "cls.predictions.transform.dense",
            "mlm/norm": "cls.predictions.transform.LayerNorm",
            "mlm/decoder": "cls.predictions.decoder",
            "mlm": "cls.predictions",
            "next_sentence": "cls.seq_relationship",
            "classifier": "classifier",
        },
        classifier_modules={},
        aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        config_keys=_BERT_FIELDS,
        defaults=_BASE_DEFAULTS,
    ),
    "roberta": Family(
        name="Roberta",
        prefix="roberta.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **_encoder("roberta.", "encoder.layer", _BERT_ENCODER),
            "mlm/transform": "lm_head.dense",
            "mlm/norm": "lm_head.layer_norm",
            "mlm/decoder": "lm_head.decoder",
            "mlm": "lm_head",
            "classifier": "classifier",
        },
        classifier_modules={"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
        aliases={"lm_head.decoder.bias": "lm_head.bias", "lm_head.weight": "lm_head.decoder.weight"},
        config_keys=_BERT_FIELDS,
        defaults={**_BASE_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1},
    ),
    "distilbert": Family(
        name="DistilBert",
        prefix="distilbert.",
        bare_prefixes=("embeddings.", "transformer."),
        modules={
            **_encoder("distilbert.", "transformer.layer", _DISTILBERT_ENCODER),
            "mlm/transform": "vocab_transform",
            "mlm/norm": "vocab_layer_norm",
            "mlm/decoder": "vocab_projector",
            "mlm": "vocab_projector",
            "pooler": "pre_classifier",
            "classifier": "classifier",
        },
        classifier_modules={},
        aliases={},
        config_keys={
            **{
                name: name
                for name in (
                    "vocab_size",
                    "max_position_embeddings",
                    "initializer_range",
                    "pad_token_id",
                    "tie_word_embeddings",
                )
            },
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={"vocab_size": 30522, "type_vocab_size": 0, "layer_norm_eps": 1e-12},
    ),
}

REQUIRED_VALUES = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({}, []),
    "quantization_config": (),
}
"""Keys of config.json and the values they may have (or null): others are models of another kind."""

BUFFERS = (".position_ids", ".token_type_ids")
"""Endings of tensors that older versions saved and that hold no weights."""


def canonical_tensor_name(name: str, family: Family) -> str:
    """The name that the table knows, of a tensor as some version of transformers saved it: with
    the prefix, `gamma` and `beta` of a norm as `weight` and `bias`."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    if name.startswith(family.bare_prefixes):
        name = family.prefix + name
    return name


def architecture_name(family: Family, heads: Iterable[str]) -> str:
    """The class of transformers that holds these heads, e.g. 'BertForMaskedLM'."""
    heads = set(heads)
    if "classifier" in heads:
        return f"{family.name}ForSequenceClassification"
    if {"mlm", "next_sentence"} <= heads:
        return f"{family.name}ForPreTraining"
    if "mlm" in heads:
        return f"{family.name}ForMaskedLM"
    return f"{family.name}ForNextSentencePrediction" if "next_sentence" in heads else f"{family.name}Model"
