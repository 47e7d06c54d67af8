"""Config and Hugging Face names of Llama, Mistral, Qwen2, Qwen3 and EuroBERT.

This module does not import jax.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from dwt_jax.errors import UserError
from dwt_jax.models.common.hf_names import HFNames, encoder_names
from dwt_jax.models.protocol import Activation, ModelConfig

WINDOW_MODEL_TYPES = ("mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Config(ModelConfig):
    """Sizes of a Llama, Mistral, Qwen2, Qwen3 or EuroBERT, under Hugging Face's names."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "eurobert"] = "llama"
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    hidden_act: Activation = "silu"
    num_key_value_heads: int = 0  # heads of keys and values; 0: num_attention_heads
    head_dim: int = 0  # size of a head; 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    sliding_window: int = 0  # tokens that a token attends to, itself and those before it; 0: all before it
    attention_dropout: float = 0.0
    rope_theta: float = 10_000.0
    # How the rotary frequencies are scaled to longer texts, as `rope_parameters` of transformers has it.
    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_factor: float = 1.0  # linear, llama3
    rope_low_freq_factor: float = 1.0  # llama3
    rope_high_freq_factor: float = 4.0  # llama3
    rope_original_max_position_embeddings: int = 0  # llama3; 0: max_position_embeddings
    # What the classifier of an encoder reads: all tokens, for the mean of their logits (late); their mean; or
    # the first one. That of a decoder reads the last one.
    classifier_pooling: Literal["late", "mean", "bos"] = "late"

    @property
    def is_causal(self) -> bool:
        """Whether a token attends only to itself and to earlier tokens."""
        return self.model_type != "eurobert"

    @property
    def objective(self) -> str:
        """Name of the objective that the model is pre-trained with."""
        return "next_token" if self.is_causal else "mlm"

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_original_length(self) -> int:
        """Length of a text from which `llama3` counts wavelengths; 0 with other kinds, which have none."""
        if self.rope_type != "llama3":
            return 0
        return self.rope_original_max_position_embeddings or self.max_position_embeddings

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised in each head."""
        return self.model_type == "qwen3"

    @property
    def has_dense_classifier(self) -> bool:
        """Whether a classifier has a dense layer before its outputs, and biases."""
        return not self.is_causal

    @property
    def pooling(self) -> str:
        """What a classifier reads: `last` in decoders, else as `classifier_pooling` says."""
        return "last" if self.is_causal else self.classifier_pooling

    @property
    def attention_dropout_rate(self) -> float:
        """Share of the attention probabilities that training drops."""
        return self.attention_dropout

    @property
    def uses_dropout(self) -> bool:
        """Whether a training step draws dropout masks."""
        return self.attention_dropout > 0

    def with_dropout(self, rate: float) -> Self:
        """Return the config with this rate wherever the family has dropout, for fine-tuning."""
        return dataclasses.replace(self, attention_dropout=rate)

    def head_problems(self) -> Iterator[str]:
        """Yield one line for each invalid number or size of heads."""
        if not self.head_dim or self.model_type in ("llama", "eurobert"):  # as transformers demands
            yield from super().head_problems()
        for key in ("num_key_value_heads", "head_dim"):
            if getattr(self, key) < 0:
                yield f"{key} is {getattr(self, key)}, expected at least 0"
        if self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads:
            yield (
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_size % 2:
            yield f"head_dim is {self.head_size}, expected an even number: rotary positions turn pairs"

    def problems(self) -> Iterator[str]:
        """Yield one line for each invalid field, beginning with the field's name."""
        yield from super().problems()
        for key in ("sliding_window", "rope_original_max_position_embeddings"):
            if getattr(self, key) < 0:
                yield f"{key} is {getattr(self, key)}, expected at least 0"
        for key in ("rms_norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor"):
            if getattr(self, key) <= 0:
                yield f"{key} is {getattr(self, key)}, expected more than 0"
        if self.max_position_embeddings < 1:
            yield f"max_position_embeddings is {self.max_position_embeddings}, expected at least 1"
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            yield (
                f"rope_high_freq_factor is {self.rope_high_freq_factor}, expected more than "
                f"rope_low_freq_factor ({self.rope_low_freq_factor})"
            )
        if not 0 <= self.attention_dropout <= 0.99:
            yield f"attention_dropout is {self.attention_dropout}, expected from 0 to 0.99"
        if self.sliding_window and self.model_type not in WINDOW_MODEL_TYPES:
            expected = " or ".join(WINDOW_MODEL_TYPES)
            yield (
                f"sliding_window is {self.sliding_window}, expected 0 for model_type {self.model_type} "
                f"(or model_type {expected})"
            )
        if self.classifier_pooling != "late" and self.is_causal:
            yield (
                f"classifier_pooling is {self.classifier_pooling!r}, expected none for model_type "
                f"{self.model_type}: a decoder is read at its last token"
            )
        for key in ("weighted_norm", "gated_layers"):
            if getattr(self, key):
                yield f"{key} is True, expected False: a pre-norm model grows without gates"


# Hugging Face's names of tensors and config keys.

_DECODER = {
    "embeddings/word": "embed_tokens",
    "layers/attention/norm": "input_layernorm",
    "layers/attention/query": "self_attn.q_proj",
    "layers/attention/key": "self_attn.k_proj",
    "layers/attention/value": "self_attn.v_proj",
    "layers/attention/query_norm": "self_attn.q_norm",
    "layers/attention/key_norm": "self_attn.k_norm",
    "layers/attention/output": "self_attn.o_proj",
    "layers/mlp/norm": "post_attention_layernorm",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/input": "mlp.up_proj",
    "layers/mlp/output": "mlp.down_proj",
    "final_norm": "norm",
}
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "attention_dropout",
    "rope_theta",
    "initializer_range",
    "pad_token_id",
    "tie_word_embeddings",
)
_ROPE_KEYS = {  # of `rope_parameters`, by the kinds of scaling that read them
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _flatten(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Write nested and optional keys as fields of `Config`.

    Args:
        defaults: values of absent keys that would otherwise default to another size.
        config: the content of `config.json`.

    Raises:
        UserError: rotary positions or layers that the family does not have.
    """
    flat = {**defaults, **config}
    for key in ("num_key_value_heads", "head_dim", "sliding_window", "attention_dropout", "pad_token_id"):
        if flat.get(key, 0) is None:
            flat[key] = -1 if key == "pad_token_id" else 0
    if flat.get("num_key_value_heads") == flat.get("num_attention_heads"):
        flat["num_key_value_heads"] = 0
    if _is_default_head_dim(flat):
        flat["head_dim"] = 0
    if "use_sliding_window" not in defaults:  # such models read `layer_types` alone
        for key in ("use_sliding_window", "max_window_layers"):
            flat.pop(key, None)
    if not _has_window(flat):
        flat["sliding_window"] = 0
    return {**flat, **_flatten_rope(config)}


def _is_default_head_dim(flat: Mapping[str, Any]) -> bool:
    sizes = [flat.get(key, 0) for key in ("head_dim", "num_attention_heads", "hidden_size")]
    return all(isinstance(size, int) for size in sizes) and sizes[0] * sizes[1] == sizes[2]


def _has_window(flat: Mapping[str, Any]) -> bool:
    """Whether all layers attend within the window; False: none does.

    Raises:
        UserError: some layers do and some do not.
    """
    if not flat.get("use_sliding_window", True):
        return False
    kinds = flat.get("layer_types")
    first = flat.get("max_window_layers")
    if kinds is None and isinstance(first, int) and isinstance(flat.get("num_hidden_layers"), int):
        kinds = [_SLIDING if i >= first else _FULL for i in range(min(flat["num_hidden_layers"], 10**6))]
    if kinds and flat.get("sliding_window") and set(map(str, kinds)) not in ({_FULL}, {_SLIDING}):
        key = "layer_types" if flat.get("layer_types") else "max_window_layers"
        raise UserError(
            f"{key} is {str(flat[key])[:200]}, expected layers that all are '{_FULL}' or all '{_SLIDING}'"
        )
    return not kinds or str(kinds[0]) == _SLIDING


def _flatten_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_…` fields: of `rope_parameters` (transformers 5), or of `rope_scaling` (4)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} is {str(rope)[:200]}, expected an object with rope_type")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise UserError(f"{key}.rope_type is {kind!r}, expected one of {', '.join(_ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, expected 1")
    flat: dict[str, Any] = {"rope_type": kind}
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    for name in _ROPE_KEYS[kind]:
        if rope.get(name) is not None:
            flat[f"rope_{name}"] = rope[name]
        elif name != "original_max_position_embeddings":
            raise UserError(f"{key} has no {name}, expected a number for rope_type '{kind}'")
    return flat


def _nest(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that are not plain fields of `Config`."""
    assert isinstance(config, Config)
    scaling: dict[str, Any] = {"rope_type": config.rope_type}
    scaling |= {name: getattr(config, f"rope_{name}") for name in _ROPE_KEYS[config.rope_type]}
    if config.rope_type == "llama3":
        scaling["original_max_position_embeddings"] = config.rope_original_length
    values = {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "pad_token_id": config.pad_token_id if config.pad_token_id >= 0 else None,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        "rope_scaling": scaling if config.rope_type != "default" else None,  # transformers 4
        # transformers' own ids of special tokens may lie beyond a small vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.model_type not in WINDOW_MODEL_TYPES:
        return values
    window = config.sliding_window or None
    if config.model_type == "mistral":
        return {**values, "sliding_window": window}
    layers = config.num_hidden_layers
    return {
        **values,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0 if window else layers,
        "layer_types": [_SLIDING if window else _FULL] * layers,
    }


def _names(
    class_prefix: str, defaults: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> HFNames:
    has_window = class_prefix.lower() in WINDOW_MODEL_TYPES
    fields = [key for key in _SAME_NAME if key != "sliding_window" or has_window]
    rope_fields = [f"rope_{name}" for name in ("type", *_ROPE_KEYS["llama3"])]
    return HFNames(
        class_prefix=class_prefix,
        prefix="model.",
        bare_prefixes=("embed_tokens.", "layers.", "norm."),
        modules={
            **encoder_names("model.", "layers", _DECODER),
            "decoder": "lm_head",
            "classifier": "score",
        },
        classifier_modules={},
        aliases={},
        config_keys={key: key for key in (*fields, *rope_fields)},
        nested_keys=tuple(rope_fields),
        defaults={
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "pad_token_id": -1,
            "tie_word_embeddings": False,
            **defaults,
        },
        required_values={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "partial_rotary_factor": (1,),
            "quantization_config": (),
        },
        architectures=(
            (("classifier",), "ForSequenceClassification"),
            (("decoder",), "ForCausalLM"),
        ),
        buffers=("rotary_emb.inv_freq",),
        token_id_keys=(("bos_token_id", "cls"), ("eos_token_id", "sep")),
        flatten_config=functools.partial(_flatten, optional or {}),
        nest_config=_nest,
    )


_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_hidden_layers": 32,
}
_EUROBERT = _names(
    "EuroBert",
    {
        "vocab_size": 128256,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 128001,
    },
)
HF_NAMES = {
    "llama": _names("Llama", {"vocab_size": 32000, "intermediate_size": 11008}),
    "mistral": _names(
        "Mistral",
        {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072},
        {"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": _names("Qwen2", _QWEN, _QWEN_WINDOW),
    "qwen3": _names("Qwen3", _QWEN, {"head_dim": 128, **_QWEN_WINDOW}),
    "eurobert": dataclasses.replace(
        _EUROBERT,
        modules={**_EUROBERT.modules, "classifier": "classifier", "classifier/dense": "dense"},
        config_keys={**_EUROBERT.config_keys, "classifier_pooling": "classifier_pooling"},
        architectures=(
            (("classifier",), "ForSequenceClassification"),
            (("decoder",), "ForMaskedLM"),
        ),
        token_id_keys=(*_EUROBERT.token_id_keys, ("mask_token_id", "mask")),
    ),
}
