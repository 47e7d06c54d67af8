"""Pre-training runs of the studies, by SCALE-RUN.

Scales are paper, h200 and cpu; runs are student, teacher4, teacher2 and teacher1 (number of layers).

paper: configs/paper.py for 20 epochs of its 30M sentences, with a checkpoint every second epoch.
h200, cpu: Wikipedia in data/wikipedia-2015.txt.xz (articles separated by two empty lines), packed
rows. cpu takes hours on two cores, h200 minutes on one GPU.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

LAYERS = {"student": 6, "teacher4": 4, "teacher2": 2, "teacher1": 1}
SCALES = {  # hidden size, vocabulary, length, batch, steps, learning rate
    "h200": (512, 16384, 128, 256, 8000, 5e-4),
    "cpu": (64, 4096, 64, 32, 2400, 2e-3),
}
# For a small model that is trained for less than one epoch; see configs/small_bert.py.
SMALL = {"initializer_range": 0.05, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def get_config(run: str) -> ConfigDict:
    scale, _, name = run.partition("-")
    if scale not in (*SCALES, "paper") or name not in LAYERS:
        raise ValueError(f"no run {run!r}, expected paper, {' or '.join(SCALES)}, then - and {list(LAYERS)}")
    if scale == "paper":
        config = sibling_config(__file__, "../paper").get_config(name)
        steps = 30_000_000 * 20 // 128
        config.train = {**config.train, "epochs": 0, "steps": steps}
    else:
        hidden_size, vocab_size, length, batch_size, steps, learning_rate = SCALES[scale]
        config = ConfigDict(
            {
                "model": {
                    "num_hidden_layers": LAYERS[name],
                    "hidden_size": hidden_size,
                    "num_attention_heads": max(2, hidden_size // 64),
                    "intermediate_size": 4 * hidden_size,
                    "max_position_embeddings": 128,
                    **(SMALL if scale == "cpu" else {}),
                },
                "data": {
                    "sources": [{"kind": "text", "path": "data/wikipedia-2015.txt.xz", "blank_lines": 2}],
                    "tokenizer": {"vocab_size": vocab_size},
                    "sequence_length": length,
                    "row_mode": "packed",
                    "validation_fraction": 0.002,
                },
                "train": {"steps": steps, "batch_size": batch_size, "log_every": 100},
                "optimizer": {
                    "learning_rate": {"kind": "linear", "value": learning_rate, "warmup_fraction": 0.05}
                },
            }
        )
    config.train.update(save_every=steps // 10, eval_every=steps // 5, keep_checkpoints=11)
    return config
