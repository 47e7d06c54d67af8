"""Small Llamas with a recipe that learns fast, on the built-in corpus or on text files:

    dwt train --config=configs/causal.py:2x128 --workdir=runs/small
    dwt train --config=configs/causal.py:4x192 --workdir=runs/text \\
        '--config.data.sources=[{"kind": "text", "path": "corpus/*.txt"}]'

The recipe is that of configs/modernbert.py, for next-token prediction.
"""

from ml_collections import ConfigDict

SIZES = {  # vocabulary, tokens a row, steps
    "1x128": (2048, 64, 900),
    "2x128": (2048, 64, 900),
    **dict.fromkeys(("2x192", "4x192", "2x256", "4x256"), (8192, 128, 2000)),
}


def get_config(size: str = "2x128") -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f"no size {size!r}, expected one of {', '.join(SIZES)}")
    num_layers, hidden_size = map(int, size.split("x"))
    vocab_size, length, steps = SIZES[size]
    return ConfigDict(
        {
            "model": {
                "model_type": "llama",
                "num_hidden_layers": num_layers,
                "hidden_size": hidden_size,
                "num_attention_heads": hidden_size // 32,
                # Two thirds of 4 x hidden_size, rounded to a multiple of 8, which is faster.
                "intermediate_size": 8 * round(hidden_size / 3),
                "max_position_embeddings": length,
                "initializer_range": 0.035,
            },
            "data": {
                "tokenizer": {"vocab_size": vocab_size},
                "sequence_length": length,
                "validation_fraction": 0.05,
                "end_token": "documents",
            },
            "train": {
                "steps": steps,
                "batch_size": 16,
                "log_every": steps // 15,
                "eval_every": steps // 5,
                "save_every": steps // 3,
            },
            "optimizer": {
                "kind": "muon",
                "ns_steps": 3,
                "learning_rate": {"kind": "linear", "value": 1e-2, "warmup_fraction": 0.05},
            },
        }
    )
