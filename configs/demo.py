"""The runs of the demo on the built-in corpus, each trainable on its own:

    dwt train --config=configs/demo.py:teacher --workdir=runs/teacher
    dwt train --config=configs/demo.py:student --workdir=runs/student \\
        --config.teacher.path=runs/teacher --config.distill.preset=paper_normal

The sizes are for minutes on two CPU cores. Vocabulary, rows and batches are small, because a model of
this size needs many steps to leave the unigram plateau. The initialization is wider than BERT's 0.02,
which slows this down at hidden size 64 (measured: 5.76 against 5.83 nats after 2,400 steps of the
teacher).
"""

from ml_collections import ConfigDict

RUNS = {  # hidden size, heads, steps
    "teacher": (64, 2, 1800),
    "student": (128, 4, 900),
}


def get_config(run: str = "student") -> ConfigDict:
    if run not in RUNS:
        raise ValueError(f"no run {run!r}, expected one of {', '.join(RUNS)}")
    hidden_size, heads, steps = RUNS[run]
    return ConfigDict(
        {
            "model": {
                "num_hidden_layers": 2,
                "hidden_size": hidden_size,
                "num_attention_heads": heads,
                "intermediate_size": 4 * hidden_size,
                "max_position_embeddings": 64,
                "initializer_range": 0.05,
                "hidden_dropout_prob": 0.0,  # no overfitting in less than one epoch
                "attention_probs_dropout_prob": 0.0,
            },
            "data": {
                "tokenizer": {"vocab_size": 2048},
                "sequence_length": 64,
                "row_mode": "packed",
                "validation_fraction": 0.05,
            },
            "train": {
                "steps": steps,
                "batch_size": 16,
                "log_every": 60,
                "eval_every": 180,
                "save_every": 300,
            },
            "optimizer": {"learning_rate": {"kind": "linear", "value": 3e-3, "warmup_fraction": 0.05}},
        }
    )
