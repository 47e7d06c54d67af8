"""A tiny corpus and the command line on it, for the tests that train."""

import os
import random
import subprocess
import sys
from pathlib import Path

CONFIG = """
def get_config(arg: str = ""):
    return {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
        "data": {
            "path": arg,
            "sources": [{"kind": "text", "path": "CORPUS", "documents": "lines"}],
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 32,
            "held_out": 0.2,
        },
        "train": {
            "steps": 12,
            "batch_size": 8,
            "checkpoint_every": 4,
            "log_every": 2,
            "evaluate_every": 4,
            "tensorboard": False,
        },
        "optimizer": {"learning_rate": {"value": 3e-3}},
    }
"""


def write_corpus(path: Path, documents: int = 120, seed: int = 0) -> None:
    """One document a line: sentences of a small grammar, so that there is something to learn."""
    rng = random.Random(seed)
    nouns, verbs = ["cat", "dog", "bird", "horse", "child"], ["sees", "hears", "follows", "finds"]
    adjectives = ["old", "small", "green", "quiet", "quick"]

    def sentence() -> str:
        who, whom = rng.choice(nouns), rng.choice(nouns)
        return f"The {rng.choice(adjectives)} {who} {rng.choice(verbs)} the {rng.choice(adjectives)} {whom}."

    lines = (" ".join(sentence() for _ in range(rng.randint(2, 12))) for _ in range(documents))
    path.write_text("\n".join(lines) + "\n")


def prepared_project(folder: Path) -> str:
    """`make_project` with its rows prepared: the config with them as its argument."""
    from dwt_jax.config_file import load
    from dwt_jax.data.prepare import prepare

    config = make_project(folder)
    prepare(load(str(config)).data, folder / "rows", workers=1, log=lambda _: None)
    return f"{config}:{folder / 'rows'}"


def make_project(folder: Path) -> Path:
    """Corpus and config file in `folder`; the path of the config."""
    write_corpus(folder / "corpus.txt")
    config = folder / "tiny.py"
    config.write_text(CONFIG.replace("CORPUS", str(folder / "corpus.txt")))
    return config


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "DWT_PEAK_FLOPS": "1e11", **more}


def dwt(
    *arguments: object, variables: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a user has it."""
    command = [sys.executable, "-m", "dwt_jax", *map(str, arguments)]
    env = environment(**(variables or {}))
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **options)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dwt_jax", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
