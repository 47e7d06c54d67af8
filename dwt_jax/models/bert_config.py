"""Config and Hugging Face names of BERT, RoBERTa, DistilBERT, RoFormer. It does not import jax."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.models.common.hf_names import HFNames, encoder_names
from dwt_jax.models.protocol import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """Sizes of a BERT, RoBERTa, DistilBERT or RoFormer encoder, under Hugging Face's names."""

    model_type: Literal["bert", "distilbert", "roberta", "roformer"] = "bert"
    type_vocab_size: int = 2  # distilbert: 0
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @property
    def position_offset(self) -> int:
        """Rows of the position table before the first position: RoBERTa counts from its padding id."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def is_rotary(self) -> bool:
        """Whether positions rotate queries and keys (RoFormer) instead of adding an embedding."""
        return self.model_type == "roformer"

    @property
    def max_length(self) -> int:
        """Maximum sequence length."""
        return self.max_position_embeddings - self.position_offset

    @property
    def has_token_types(self) -> bool:
        """Whether there is more than one token type: a DistilBERT has none, a RoBERTa usually one."""
        return self.type_vocab_size > 1

    @property
    def attention_dropout_rate(self) -> float:
        """Share of the attention probabilities that training drops."""
        return self.attention_probs_dropout_prob

    @property
    def uses_dropout(self) -> bool:
        """Whether a training step draws dropout masks."""
        return self.hidden_dropout_prob > 0 or self.attention_probs_dropout_prob > 0

    def with_dropout(self, rate: float) -> Self:
        """Return the config with this rate wherever the family has dropout, for fine-tuning."""
        return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)

    @property
    def head_act(self) -> str:
        """Activation of the masked-LM head: RoBERTa's is always the exact GELU."""
        return "gelu" if self.model_type == "roberta" else self.hidden_act

    def problems(self) -> Iterator[str]:
        """Yield one line for each invalid field, beginning with the field's name."""
        yield from super().problems()
        if self.type_vocab_size < 0:
            yield f"type_vocab_size is {self.type_vocab_size}, expected at least 0"
        if self.max_length < 1:
            yield (
                f"max_position_embeddings is {self.max_position_embeddings}, expected at least "
                f"{self.position_offset + 1}"
            )
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, key) <= 0.99:
                yield f"{key} is {getattr(self, key)}, expected from 0 to 0.99"
        if self.layer_norm_eps <= 0:
            yield f"layer_norm_eps is {self.layer_norm_eps}, expected more than 0"
        if (self.type_vocab_size == 0) != (self.model_type == "distilbert"):
            expected = "0, a DistilBERT has none" if self.type_vocab_size else "at least 1"
            yield f"type_vocab_size is {self.type_vocab_size}, expected {expected}"
        if self.is_rotary and self.hidden_size // self.num_attention_heads % 2:
            yield (
                f"hidden_size / num_attention_heads is {self.hidden_size // self.num_attention_heads}, "
                "expected an even number: rotary positions rotate pairs of channels"
            )
        if self.model_type == "distilbert" and self.layer_norm_eps != 1e-12:
            yield f"layer_norm_eps is {self.layer_norm_eps}, expected 1e-12: DistilBERT has a fixed value"


# Hugging Face's names of tensors and config keys.

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({}, []),
    "quantization_config": (),
}
_ARCHITECTURES = (
    (("classifier",), "ForSequenceClassification"),
    (("mlm", "next_sentence"), "ForPreTraining"),
    (("mlm",), "ForMaskedLM"),
    (("next_sentence",), "ForNextSentencePrediction"),
)
_BUFFERS = (".position_ids", ".token_type_ids")

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


def _sinusoidal_table(config: ModelConfig) -> dict[str, np.ndarray]:
    """The sinusoidal table, sines then cosines, which transformers stores and this project computes."""
    head_dim = config.hidden_size // config.num_attention_heads
    wavelengths = np.power(10000, np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(config.max_position_embeddings)[:, None] / wavelengths
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return {"roformer.encoder.embed_positions.weight": table}


def _embedding_size(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check that the tables are as wide as the layers."""
    hidden_size = config.get("hidden_size", 768)
    if config.get("embedding_size") not in (None, hidden_size):
        raise UserError(f"embedding_size is {config['embedding_size']}, expected hidden_size ({hidden_size})")
    return config


_BASE_DEFAULTS = {"vocab_size": 30522, "num_hidden_layers": 12}  # where the defaults of Config are others

HF_NAMES = {
    "roformer": HFNames(
        class_prefix="RoFormer",
        prefix="roformer.",
        bare_prefixes=("embeddings.", "encoder."),
        modules={
            **encoder_names("roformer.", "encoder.layer", _BERT_ENCODER),
            "mlm/transform": "cls.predictions.transform.dense",
            "mlm/norm": "cls.predictions.transform.LayerNorm",
            "mlm/decoder": "cls.predictions.decoder",
            "mlm": "cls.predictions",
            "pooler": "classifier.dense",
            "classifier": "classifier.out_proj",
        },
        classifier_modules={},
        aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        config_keys=_BERT_FIELDS,
        defaults={**_BASE_DEFAULTS, "vocab_size": 50000, "max_position_embeddings": 1536},
        required_values={**_REQUIRED_VALUES, "rotary_value": (False,)},
        architectures=_ARCHITECTURES,
        buffers=(*_BUFFERS, ".embed_positions.weight"),
        flatten_config=_embedding_size,
        nest_config=lambda config: {"embedding_size": config.hidden_size, "rotary_value": False},
        computed_tensors=_sinusoidal_table,
    ),
    "bert": HFNames(
        class_prefix="Bert",
        prefix="bert.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **encoder_names("bert.", "encoder.layer", _BERT_ENCODER),
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
        required_values=_REQUIRED_VALUES,
        architectures=_ARCHITECTURES,
        buffers=_BUFFERS,
    ),
    "roberta": HFNames(
        class_prefix="Roberta",
        prefix="roberta.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **encoder_names("roberta.", "encoder.layer", _BERT_ENCODER),
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
        required_values=_REQUIRED_VALUES,
        architectures=_ARCHITECTURES,
        buffers=_BUFFERS,
    ),
    "distilbert": HFNames(
        class_prefix="DistilBert",
        prefix="distilbert.",
        bare_prefixes=("embeddings.", "transformer."),
        modules={
            **encoder_names("distilbert.", "transformer.layer", _DISTILBERT_ENCODER),
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
        required_values=_REQUIRED_VALUES,
        architectures=_ARCHITECTURES,
        buffers=_BUFFERS,
    ),
}
