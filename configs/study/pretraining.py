"""Pre-training runs of the studies, by SCALE-RUN.

Scales are paper, h200, cpu and causal. Runs are student, and the teachers weak, very_weak and extremely_weak
(not at causal); at cpu there are also bert and bert_weak, the student and the weak teacher in BERT's shape
with its recipe.

paper: configs/paper.py for 20 epochs of its 30M sentences, with a checkpoint every second epoch.
h200, cpu: ModernBERT with the recipe of docs/recipe.md, on Wikipedia in data/wikipedia-2015.txt.xz
(articles separated by two empty lines); cpu also on books in data/books.txt.xz (one paragraph a line). A run
of cpu-student takes about 12 minutes of two cores with bf16, and 30 of two that have AVX2 alone.
causal: Llamas of cpu's sizes with the recipe of configs/causal.py, on the text of cpu.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

PAPER_RUNS = {"student": "student", "weak": "teacher4", "very_weak": "teacher2", "extremely_weak": "teacher1"}
SCALES = {  # vocabulary, tokens a row, rows a step, steps of the student
    "h200": (16384, 128, 256, 8000),
    "cpu": (8192, 128, 16, 4000),
    "causal": (8192, 128, 16, 2000),
}
SIZES = {  # layers, hidden size, share of the student's steps
    "h200": {
        "student": (6, 512, 1.0),
        "weak": (4, 512, 1.0),
        "very_weak": (2, 512, 1.0),
        "extremely_weak": (1, 512, 1.0),
    },
    "cpu": {
        "student": (4, 192, 1.0),
        "weak": (2, 192, 0.5),
        "very_weak": (1, 192, 0.5),
        "extremely_weak": (1, 96, 0.5),
        "bert": (4, 192, 1.0),
        "bert_weak": (2, 192, 0.5),
    },
    "causal": {"student": (4, 192, 1.0), "weak": (2, 192, 0.5), "very_weak": (1, 192, 0.5)},
}


def get_config(run: str) -> ConfigDict:
    scale, _, name = run.partition("-")
    runs = {"paper": PAPER_RUNS, **SIZES}.get(scale, {})
    if name not in runs:
        scales = ", ".join(("paper", *SIZES))
        runs_text = ", ".join(runs or PAPER_RUNS)
        raise ValueError(f"no run {run!r}, expected {scales}, then - and one of {runs_text}")
    if scale == "paper":
        config = sibling_config(__file__, "../paper").get_config(PAPER_RUNS[name])
        steps = student_steps = 30_000_000 * 20 // 128
        config.train = {**config.train, "epochs": 0}
    else:
        *_, student_steps = SCALES[scale]
        steps = round(student_steps * SIZES[scale][name][2])
        config = _modern_config(scale, name)
    checkpoints = 4 if scale in ("cpu", "causal") else 10
    config.train.update(
        steps=steps,
        save_every=student_steps // checkpoints,
        eval_every=student_steps // 8,
        keep_checkpoints=checkpoints,
    )
    return config


def _modern_config(scale: str, name: str) -> ConfigDict:
    vocab_size, length, batch_size, _ = SCALES[scale]
    num_layers, hidden_size, _ = SIZES[scale][name]
    sizes = {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // (32 if hidden_size < 512 else 64),
        "max_position_embeddings": length,
    }
    if name.startswith("bert"):
        # For a small model that is trained for less than one epoch; see configs/small_bert.py.
        small = {
            "initializer_range": 0.05,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        recipe = {
            "model": {**sizes, "intermediate_size": 4 * hidden_size, **small},
            "optimizer": {"learning_rate": {"kind": "linear", "value": 2e-3, "warmup_fraction": 0.05}},
        }
    else:
        base = "../causal" if scale == "causal" else "../modernbert"
        recipe = sibling_config(__file__, base).get_config("4x192").to_dict()
        recipe["model"] |= {**sizes, "intermediate_size": 8 * round(hidden_size / 3)}
        if scale == "h200":  # as configs/text.py, which has ModernBERT's own initialisation and a lower rate
            recipe["model"]["initializer_range"] = 0.02
            recipe["optimizer"]["learning_rate"]["value"] = 2e-3
    sources = [{"kind": "text", "path": "data/wikipedia-2015.txt.xz", "blank_lines": 2}]
    if scale in ("cpu", "causal"):
        sources.append({"kind": "text", "path": "data/books.txt.xz", "documents": "lines"})
    recipe["data"] = {
        **recipe.get("data", {}),
        "sources": sources,
        "tokenizer": {"vocab_size": vocab_size},
        "sequence_length": length,
        "validation_fraction": 0.002,
    }
    recipe["train"] = {"batch_size": batch_size, "log_every": 100}
    return ConfigDict(recipe)
