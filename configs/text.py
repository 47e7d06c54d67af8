"""A ModernBERT of DistilBERT's depth and width on your own text files, with the recipe of docs/recipe.md:

    dwt prepare --config='configs/text.py:corpus/*.txt' --workdir=rows
    dwt train   --config='configs/text.py:corpus/*.txt' --config.data.path=rows --workdir=runs/student

Files may be compressed (.gz, .xz, .zst); empty lines separate documents. One document in a hundred is
held out. With fewer than a few hundred documents, set --config.data.validation_fraction=0.05.

The learning rate was not tuned at this size. configs/modernbert.py has sizes for two CPU cores.
"""

from ml_collections import ConfigDict


def get_config(glob: str) -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "model_type": "modernbert",
                "num_hidden_layers": 6,
                "hidden_size": 768,
                "num_attention_heads": 12,
                "intermediate_size": 2048,
                "max_position_embeddings": 512,
                "global_attn_every_n_layers": 1,  # rows are no longer than the window
                "global_rope_theta": 10_000.0,
                "classifier_activation": "linear",
            },
            "data": {
                "sources": [{"kind": "text", "path": glob}],
                "tokenizer": {"vocab_size": 30522},
                "sequence_length": 128,
            },
            "mlm": {"probability": 0.4},  # training only: the held-out loss is at 15 %
            "train": {"epochs": 1, "batch_size": 128},
            "optimizer": {
                "kind": "muon",
                "learning_rate": {"kind": "linear", "value": 2e-3, "warmup_fraction": 0.05},
            },
        }
    )
