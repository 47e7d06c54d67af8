"""Old teacher, new student: models of different types that share a tokenizer and an objective.

    dwt train --config=configs/generations.py:encoder --workdir=runs/new \\
        --config.teacher.path=old-bert --config.data.tokenizer.path=old-bert

encoder: a ModernBERT with a BERT, or any other masked model, as its teacher. decoder: a Qwen3 with a
Llama, or any other model of next tokens. The teacher leaves after a quarter of the steps (default: ./old).
"""

from ml_collections import ConfigDict

MODELS = {
    "encoder": {
        "model_type": "modernbert",
        "num_attention_heads": 6,
        "global_attn_every_n_layers": 1,  # rows are shorter than the window
        "global_rope_theta": 10_000.0,
        "classifier_activation": "linear",
    },
    "decoder": {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32},
}


def get_config(kind: str) -> ConfigDict:
    if kind not in MODELS:
        raise ValueError(f"no kind {kind!r}, expected one of {', '.join(MODELS)}")
    return ConfigDict(
        {
            "model": {
                **MODELS[kind],
                "num_hidden_layers": 4,
                "hidden_size": 192,
                "intermediate_size": 512,
                "max_position_embeddings": 128,
                "initializer_range": 0.035,
            },
            "data": {
                "sequence_length": 128,
                "validation_fraction": 0.05,
                "end_token": "segments" if kind == "encoder" else "documents",
            },
            **({"mlm": {"probability": 0.4}} if kind == "encoder" else {}),
            "teacher": {"path": "old"},
            "distill": {
                "alpha_soft": {"kind": "linear", "value": 4.0, "end": 0.0, "decay_end": 0.25},
            },
            "train": {
                "steps": 2000,
                "batch_size": 16,
                "log_every": 100,
                "eval_every": 500,
                "save_every": 500,
            },
            "optimizer": {
                "kind": "muon",
                "ns_steps": 3,
                "learning_rate": {"kind": "linear", "value": 1e-2, "warmup_fraction": 0.05},
            },
        }
    )
