"""ModernBERT-base and Llama 3.2 1B on rows of 8,192 tokens, one row a chip of eight chips:

    dwt compile --config=configs/long_rows.py:modernbert-base --topology=v5e:2x4
    dwt compile --config=configs/long_rows.py:llama-1b --topology=v5e:2x4

docs/scaling.md compares the memory that back ends of attention take in them.
"""

from ml_collections import ConfigDict

MODELS = {
    "modernbert-base": {
        "model_type": "modernbert",
        "vocab_size": 50368,
        "hidden_size": 768,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "intermediate_size": 1152,
    },
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "rope_theta": 500_000.0,
    },
}
CHIPS, LENGTH = 8, 8192


def get_config(model: str = "modernbert-base") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"no model {model!r}, expected one of {', '.join(MODELS)}")
    return ConfigDict(
        {
            "model": {**MODELS[model], "max_position_embeddings": LENGTH},
            "data": {
                "sources": [{"kind": "text", "path": "corpus/*.txt"}],
                "tokenizer": {"vocab_size": MODELS[model]["vocab_size"]},
                "sequence_length": LENGTH,
            },
            "mesh": {"data": 1, "fsdp": CHIPS},
            "train": {"steps": 100_000, "batch_size": CHIPS},
            "optimizer": {"learning_rate": {"kind": "cosine", "value": 8e-4, "warmup_fraction": 0.02}},
        }
    )
