"""The config of BERT, RoBERTa and DistilBERT. This module does not import jax."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from dwt_jax.models.protocol import ModelConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """Sizes of a BERT, RoBERTa or DistilBERT encoder, under Hugging Face's names."""

    model_type: Literal["bert", "distilbert", "roberta"] = "bert"
    type_vocab_size: int = 2  # distilbert: 0
    hidden_act: Literal["gelu", "gelu_new", "relu"] = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    @property
    def position_offset(self) -> int:
        """Rows of the position table before the first position: RoBERTa counts from its padding id."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Maximum sequence length."""
        return self.max_position_embeddings - self.position_offset

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
        """Yield one line for each field that cannot be so, beginning with the field's name."""
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
        if self.model_type == "distilbert" and self.layer_norm_eps != 1e-12:
            yield f"layer_norm_eps is {self.layer_norm_eps}, expected 1e-12: a DistilBERT has no other"
