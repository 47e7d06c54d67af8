"""A BERT of DistilBERT's shape on your own text files:

    dwt prepare --config='configs/text.py:corpus/*.txt' --workdir=rows
    dwt train   --config='configs/text.py:corpus/*.txt' --config.data.path=rows --workdir=runs/student

Files may be compressed (.gz, .xz, .zst); empty lines separate documents. One document in a hundred is
held out. With fewer than a few hundred documents, set --config.data.validation_fraction=0.05.
"""

from ml_collections import ConfigDict


def get_config(glob: str) -> ConfigDict:
    return ConfigDict(
        {
            "model": {"num_hidden_layers": 6, "hidden_size": 768, "num_attention_heads": 12},
            "data": {
                "sources": [{"kind": "text", "path": glob}],
                "tokenizer": {"vocab_size": 30522},
                "sequence_length": 128,
            },
            "train": {"epochs": 1, "batch_size": 128},
        }
    )
