"""Config and Hugging Face names of ModernBERT. This module does not import jax."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from dwt_jax.errors import UserError
from dwt_jax.models.common.hf_names import HFNames, encoder_names
from dwt_jax.models.protocol import Activation, ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """Sizes of a ModernBERT encoder, under Hugging Face's names."""

    model_type: Literal["modernbert"] = "modernbert"
    intermediate_size: int = 1152  # of each half of the gated MLP
    max_position_embeddings: int = 8192
    classifier_activation: Activation = "gelu"  # of the prediction head; linear: none
    norm_eps: float = 1e-5
    # Layer i attends to the whole row if i is a multiple of this, else within a window.
    global_attn_every_n_layers: int = 3
    local_attention: int = 128  # size of the window: half of it on either side
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    classifier_pooling: Literal["cls", "mean"] = "cls"  # first token, or the mean of all

    @property
    def attention_dropout_rate(self) -> float:
        """Share of the attention probabilities that training drops."""
        return self.attention_dropout

    @property
    def uses_dropout(self) -> bool:
        """Whether a training step draws dropout masks."""
        return any(getattr(self, key) > 0 for key in _DROPOUT_RATES if key != "classifier_dropout")

    def with_dropout(self, rate: float) -> Self:
        """Return the config with this rate wherever the family has dropout, for fine-tuning."""
        rates: dict[str, Any] = dict.fromkeys(_DROPOUT_RATES, rate)
        return dataclasses.replace(self, **rates)

    def problems(self) -> Iterator[str]:
        """Yield one line for each invalid field, beginning with the field's name."""
        yield from super().problems()
        for key in ("max_position_embeddings", "global_attn_every_n_layers", "local_attention"):
            if getattr(self, key) < 1:
                yield f"{key} is {getattr(self, key)}, expected at least 1"
        for key in ("norm_eps", "global_rope_theta", "local_rope_theta"):
            if getattr(self, key) <= 0:
                yield f"{key} is {getattr(self, key)}, expected more than 0"
        for key in _DROPOUT_RATES:
            if not 0 <= getattr(self, key) <= 0.99:
                yield f"{key} is {getattr(self, key)}, expected from 0 to 0.99"
        if self.hidden_size // self.num_attention_heads % 2:
            yield (
                f"hidden_size / num_attention_heads is {self.hidden_size // self.num_attention_heads}, "
                "expected an even number: rotary positions turn pairs of channels"
            )
        for key in ("weighted_norm", "gated_layers"):
            if getattr(self, key):
                yield f"{key} is True, expected False: a pre-norm model grows without gates"


_DROPOUT_RATES = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")


# Hugging Face's names of tensors and config keys.

_ENCODER = {
    "embeddings/word": "embeddings.tok_embeddings",
    "embeddings/norm": "embeddings.norm",
    "layers/attention/norm": "attn_norm",
    "layers/attention/qkv": "attn.Wqkv",
    "layers/attention/output": "attn.Wo",
    "layers/mlp/norm": "mlp_norm",
    "layers/mlp/input": "mlp.Wi",
    "layers/mlp/output": "mlp.Wo",
    "final_norm": "final_norm",
}
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "classifier_activation",
    "norm_eps",
    "global_attn_every_n_layers",
    "local_attention",
    "global_rope_theta",
    "local_rope_theta",
    "embedding_dropout",
    "attention_dropout",
    "mlp_dropout",
    "classifier_dropout",
    "classifier_pooling",
    "initializer_range",
    "pad_token_id",
    "tie_word_embeddings",
)
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_THETA_KEYS = {_GLOBAL: "global_rope_theta", _LOCAL: "local_rope_theta"}


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write `layer_types` and `rope_parameters` of transformers 5 as the keys of version 4.

    Raises:
        UserError: layers or rotary positions that the family does not have.
    """
    flat = dict(config)
    if (layer_types := config.get("layer_types")) is not None:
        flat["global_attn_every_n_layers"] = _global_layer_period(
            layer_types, config.get("global_attn_every_n_layers")
        )
        num_layers = config.get("num_hidden_layers", 22)
        if len(layer_types) != num_layers:
            raise UserError(
                f"layer_types has {len(layer_types)} entries, expected {num_layers}, one per layer"
            )
    rope = config.get("rope_parameters") or {}
    is_by_type = isinstance(rope, dict) and set(rope) <= set(_THETA_KEYS)
    if not is_by_type or not all(isinstance(x or {}, dict) for x in rope.values()):
        raise UserError(
            f"rope_parameters is {str(rope)[:200]}, expected an object with {' and '.join(_THETA_KEYS)}"
        )
    for layer_type, key in _THETA_KEYS.items():
        parameters = rope.get(layer_type) or {}
        if parameters.get("rope_type", "default") != "default":
            raise UserError(
                f"rope_parameters.{layer_type}.rope_type is {parameters['rope_type']!r}, expected 'default'"
            )
        if "rope_theta" in parameters:
            flat[key] = parameters["rope_theta"]
    if "local_rope_theta" in flat and flat["local_rope_theta"] is None:  # version 4: that of global layers
        flat["local_rope_theta"] = flat.get("global_rope_theta", Config.global_rope_theta)
    return flat


def _layer_types(num_layers: int, period: int) -> list[str]:
    return [_LOCAL if i % period else _GLOBAL for i in range(num_layers)]


def _global_layer_period(layer_types: Any, period: Any) -> int:
    """n if layer i attends to the whole row exactly where i is a multiple of n: `period`, if that is so."""
    if isinstance(layer_types, list) and layer_types and layer_types[0] == _GLOBAL:
        first_period = (*layer_types[1:], _GLOBAL).index(_GLOBAL) + 1
        for candidate in (period, first_period):  # of a few layers several periods are true
            is_period = isinstance(candidate, int) and candidate > 0
            if is_period and layer_types == _layer_types(len(layer_types), candidate):
                return int(candidate)
    raise UserError(
        f"layer_types is {str(layer_types)[:200]}, expected '{_GLOBAL}' in every n-th layer from the first "
        f"on and '{_LOCAL}' in all others"
    )


def _nest(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that transformers 5 reads; those of version 4 are written as well."""
    assert isinstance(config, Config)
    layer_types = _layer_types(config.num_hidden_layers, config.global_attn_every_n_layers)
    rope = {
        kind: {"rope_type": "default", "rope_theta": getattr(config, _THETA_KEYS[kind])}
        for kind in _THETA_KEYS
    }
    # transformers' own ids of special tokens lie beyond a small vocabulary.
    token_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    return {"layer_types": layer_types, "rope_parameters": rope, **token_ids}


HF_NAMES = {
    "modernbert": HFNames(
        class_prefix="ModernBert",
        prefix="model.",
        bare_prefixes=("embeddings.", "layers.", "final_norm."),
        modules={
            **encoder_names("model.", "layers", _ENCODER),
            "head/dense": "head.dense",
            "head/norm": "head.norm",
            "decoder": "decoder",
            "classifier": "classifier",
        },
        classifier_modules={},
        aliases={},
        config_keys={**{key: key for key in _SAME_NAME}, "hidden_act": "hidden_activation"},
        defaults={
            "vocab_size": 50368,
            "num_hidden_layers": 22,
            "pad_token_id": 50283,
        },
        required_values={
            "norm_bias": (False,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "classifier_bias": (False,),
            "decoder_bias": (True,),
            "rope_scaling": (),
            "quantization_config": (),
        },
        architectures=(
            (("classifier",), "ForSequenceClassification"),
            (("decoder",), "ForMaskedLM"),
        ),
        absent_tensors=("model.layers.0.attn_norm.weight",),
        flatten_config=_flatten,
        nest_config=_nest,
    ),
}
