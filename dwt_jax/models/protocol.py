"""The interface of every model family: the fields of its config and the names in its module."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

if TYPE_CHECKING:
    import jax

    from dwt_jax.models.common.hf_names import HFNames
    from dwt_jax.models.common.logical_axes import ParamAxes
    from dwt_jax.models.common.matmul import Policy

Params = dict[str, Any]
"""Nested dict of arrays. Those below `layers` have a leading layer axis."""

Activation = Literal[
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
]
"""Activations of transformers without parameters (its ACT2FN), see models/common/layers.py."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that every family has, under Hugging Face's names. A family's `Config` extends it."""

    model_type: str = ""
    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    hidden_act: Activation = "gelu"
    initializer_range: float = 0.02  # 0 in a model that is read: new parameters are drawn with the default
    pad_token_id: int = 0  # -1 in a model that is read: none
    tie_word_embeddings: bool = True  # the decoder of the LM head is the word table
    # Gates of a grown model (remap/gates.py), for families that have them. In a new model all of them
    # are 1: an ordinary model, only slower.
    weighted_norm: bool = False  # each channel has a weight in the mean and variance of the norms
    gated_layers: bool = False  # a layer is g·layer(x) + (1−g)·x

    @property
    def objective(self) -> str:
        """Name of the objective that the model is pre-trained with, a key of objectives.OBJECTIVES."""
        return "mlm"

    @property
    def max_length(self) -> int:
        """Maximum sequence length."""
        return self.max_position_embeddings

    @property
    def has_token_types(self) -> bool:
        """Whether token type embeddings distinguish the two texts of a pair."""
        return False

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_dropout_rate(self) -> float:
        """Share of the attention probabilities that training drops."""
        return 0.0

    @property
    def uses_dropout(self) -> bool:
        """Whether a training step draws dropout masks."""
        return False

    def with_dropout(self, rate: float) -> Self:
        """Return the config with this rate wherever the family has dropout, for fine-tuning."""
        return self

    def problems(self) -> Iterator[str]:
        """Yield one line for each invalid field, beginning with the field's name."""
        positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for minimum, keys in (
            (1, positive),
            (0, ("vocab_size", "initializer_range")),
            (-1, ("pad_token_id",)),
        ):
            for key in keys:
                if getattr(self, key) < minimum:
                    yield f"{key} is {getattr(self, key)}, expected at least {minimum}"
        if self.vocab_size and self.pad_token_id >= self.vocab_size:
            yield f"pad_token_id is {self.pad_token_id}, expected less than vocab_size ({self.vocab_size})"
        if self.num_attention_heads > 0:
            yield from self.head_problems()

    def head_problems(self) -> Iterator[str]:
        """Yield one line for each invalid number or size of heads."""
        if self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size is {self.hidden_size}, expected a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )


class Family(Protocol):
    """The names that the module of a family defines. tests/models/test_conformance.py holds each to it.

    Letters of shapes: B rows, L tokens a row, Q output positions, D hidden_size, V padded vocabulary.
    """

    Config: type[ModelConfig]
    ENCODER_PARTS: Sequence[str]  # the parts of the parameters that `encode` reads
    HEADS: Sequence[str]  # the parts that may stand beside them
    LM_HEADS: Sequence[str]  # those of pre-training: what `lm_features` and `output_embedding` read
    CLASSIFIER_HEADS: Sequence[str]  # those of fine-tuning: what `classifier_logits` reads
    TIED_TO: Mapping[str, str]  # leaf → the leaf that is used where it is absent
    HF_NAMES: Mapping[str, "HFNames"]  # model_type → names of tensors and config keys
    FUNCTION_FIELDS: Sequence[str]  # attributes of the config that change the function at equal sizes
    SIZE_KEYS: Mapping[str, str]  # logical axis that may grow → what the config calls its size

    def param_axes(self, config: ModelConfig) -> "ParamAxes":
        """Return the logical axes of every leaf, by its path."""

    def axis_sizes(self, config: ModelConfig) -> dict[str, int]:
        """Return the size of the arrays along each logical axis."""

    def fixed_axes(self, config: ModelConfig) -> Mapping[str, str]:
        """Return the axes whose size cannot grow, each with the reason."""

    def position_rows(self, config: ModelConfig) -> tuple[int, int]:
        """Return (rows before the first position, rows in all) of the position table."""

    def layer_period(self, config: ModelConfig) -> int:
        """Return the period of the layer types, in layers; 1 if all layers are alike."""

    def init_params(
        self, config: ModelConfig, key: "jax.Array", heads: Sequence[str] = ..., num_labels: int = 1
    ) -> Params:
        """Return fresh fp32 parameters with these heads."""

    def abstract_params(self, config: ModelConfig, heads: Sequence[str] = ..., num_labels: int = 1) -> Params:
        """Return shapes and dtypes of the parameters, without memory."""

    def encode(
        self,
        params: Params,
        config: ModelConfig,
        tokens: "jax.Array",
        segment_ids: "jax.Array",
        token_type_ids: "jax.Array | None" = None,
        *,
        positions: "jax.Array | None" = None,
        key: "jax.Array | None" = None,
        policy: "Policy" = ...,
    ) -> "jax.Array":
        """Return the last hidden states [B, L, D], or [B, Q, D] at `positions`."""

    def lm_features(
        self, params: Params, config: ModelConfig, hidden: "jax.Array", *, policy: "Policy" = ...
    ) -> "jax.Array":
        """Return the features that the LM head multiplies with the output embedding: [..., D] → [..., D]."""

    def output_embedding(self, params: Params) -> "tuple[jax.Array, jax.Array | None]":
        """Return the output embedding [V, D] and bias [V] of the LM head; None: it has no bias."""

    def pools_first_token(self, config: ModelConfig) -> bool:
        """Return whether a classifier reads the first token only."""

    def classifier_logits(
        self,
        params: Params,
        config: ModelConfig,
        hidden: "jax.Array",
        segment_ids: "jax.Array",
        *,
        key: "jax.Array | None" = None,
        policy: "Policy" = ...,
    ) -> "jax.Array":
        """Return fp32 logits [B, labels] from hidden states [B, L, D], L = 1 if it pools the first token."""

    def pretrained_classifier_parts(self, config: ModelConfig, parts: Sequence[str]) -> tuple[str, ...]:
        """Return which of a model's `parts` a new classifier keeps, as transformers does."""

    def forward_flops(self, config: ModelConfig, rows: int, length: int, predictions: int) -> float:
        """Return the FLOPs of a forward pass with the LM head at `predictions` positions a row."""

    def encoder_flops(self, config: ModelConfig, rows: int, length: int, output_positions: int) -> float:
        """Return the FLOPs up to the last hidden states at `output_positions` a row."""
