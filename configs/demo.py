"""The demo's runs on the built-in corpus, each trainable by itself:

    dwt train --config=configs/demo.py:teacher --workdir=runs/teacher
    dwt train --config=configs/demo.py:student --workdir=runs/student \\
        --config.teacher.path=runs/teacher --config.distill.preset=paper_normal
"""

from ml_collections import ConfigDict

SIZES = {
    "teacher": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    },
    "student": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
}


def get_config(run: str = "student") -> ConfigDict:
    if run not in SIZES:
        raise ValueError(f"no run {run!r}, expected one of {', '.join(SIZES)}")
    return ConfigDict(
        {
            "model": {
                **SIZES[run],
                "max_position_embeddings": 64,
                "hidden_dropout_prob": 0.0,  # one or two epochs: nothing to over-fit
                "attention_probs_dropout_prob": 0.0,
            },
            "data": {
                "tokenizer": {"vocab_size": 4096},
                "sequence_length": 64,
                "held_out": 0.1,
            },
            "train": {
                "steps": 1000,
                "batch_size": 64,
                "log_every": 50,
                "evaluate_every": 100,
                "checkpoint_every": 500,
            },
            "optimizer": {"learning_rate": {"kind": "linear", "value": 2e-3, "warmup": 0.05}},
        }
    )
