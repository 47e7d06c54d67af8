"""The paper's setting (Lee et al. 2023, section 4).

A 6-layer student of hidden size 768 and teachers of 4, 2 and 1 layers, one sentence per row, every fourth
sentence, 20 epochs.

    dwt train --config=configs/paper.py:teacher4 --workdir=runs/teacher4
    dwt train --config=configs/paper.py:student --workdir=runs/student \\
        --config.teacher.path=runs/teacher4 --config.distill.preset=paper_normal

Sources are TFDS's Wikipedia and files of books in books/; set others with
--config.data.sources.0.path=…. Settings that the paper does not give (length, decay, betas) are BERT's.
"""

from ml_collections import ConfigDict

LAYERS = {"student": 6, "teacher4": 4, "teacher2": 2, "teacher1": 1}


def get_config(run: str = "student") -> ConfigDict:
    if run not in LAYERS:
        raise ValueError(f"no run {run!r}, expected one of {', '.join(LAYERS)}")
    return ConfigDict(
        {
            "model": {"num_hidden_layers": LAYERS[run], "hidden_size": 768, "num_attention_heads": 12},
            "data": {
                "sources": [
                    {"kind": "tfds", "path": "wikipedia/20230601.en"},
                    {"kind": "text", "path": "books/**/*.txt", "documents": "file"},
                ],
                "tokenizer": {"vocab_size": 30522},
                "sequence_length": 128,
                "row_mode": "sentence",
                "sentence_stride": 4,
                "validation_fraction": 0.001,
            },
            "train": {"epochs": 20, "batch_size": 128, "save_every": 5000, "log_every": 100},
            "optimizer": {"learning_rate": {"kind": "linear", "value": 5e-4, "warmup_fraction": 0.05}},
        }
    )
