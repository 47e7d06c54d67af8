"""Models of train_step.py, in Hugging Face's keys: both sides read them. Needs neither jax nor torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

LENGTH = 128  # tokens a row
MASKED = 20  # predictions a row of a masked model


@dataclass(frozen=True)
class Shape:
    """A student, its teacher and the rows of a step."""

    model_type: str
    layers: int
    width: int
    teacher_layers: int
    rows: int
    head_size: int = 64
    intermediate_size: int = 0  # 0: 4 · width
    vocab_size: int = 30522
    key_value_heads: int = 0  # 0: as many as query heads

    def of_teacher(self) -> "Shape":
        """Return the shape of the teacher: the same width, fewer layers."""
        return dataclasses.replace(self, layers=self.teacher_layers)

    @property
    def predictions(self) -> int:
        """Predictions a row."""
        return LENGTH if self.model_type == "llama" else MASKED

    def keys(self) -> dict[str, Any]:
        """Return the keys of Hugging Face's config."""
        keys = {
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.width // self.head_size,
            "intermediate_size": self.intermediate_size or 4 * self.width,
        }
        if self.model_type == "bert":
            return {**keys, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if self.model_type == "llama":
            return {**keys, "num_key_value_heads": self.key_value_heads, "tie_word_embeddings": True}
        return keys

    def forward_flops(self) -> float:
        """Return the FLOPs of a forward pass as such: vocabulary not padded, the last layer whole."""
        width, inner = self.width, self.intermediate_size or 4 * self.width
        is_bert = self.model_type == "bert"
        key_value = (self.key_value_heads or width // self.head_size) * self.head_size
        token = 4 * width**2 + 4 * width * key_value + (4 if is_bert else 6) * width * inner
        token += 4 * LENGTH * width  # scores and context
        head = 2 * width * self.vocab_size
        head += 0 if self.model_type == "llama" else 2 * width**2
        return float(self.rows * (LENGTH * self.layers * token + self.predictions * head))

    def step_flops(self) -> float:
        """Return the FLOPs of a step: student forward and backward, teacher forward."""
        return 3 * self.forward_flops() + self.of_teacher().forward_flops()


_ETTIN = {"vocab_size": 50368}  # Ettin's 17M and 32M encoders have these layers, widths and MLPs

SHAPES = {
    "2x128": Shape("bert", 2, 128, 1, 32),
    "4x256": Shape("bert", 4, 256, 2, 32),
    "6x768": Shape("bert", 6, 768, 4, 16),
    "modernbert-7x256": Shape("modernbert", 7, 256, 3, 32, intermediate_size=384, **_ETTIN),
    "modernbert-10x384": Shape("modernbert", 10, 384, 5, 16, intermediate_size=576, **_ETTIN),
    "llama-4x256": Shape("llama", 4, 256, 2, 16, intermediate_size=688, vocab_size=32000, key_value_heads=2),
    "llama-8x512": Shape("llama", 8, 512, 4, 8, intermediate_size=1376, vocab_size=32000, key_value_heads=4),
}
