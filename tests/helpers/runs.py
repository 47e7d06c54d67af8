"""A tiny corpus and the command line on it, for the tests that train."""

import os
import random
import socket
import subprocess
import sys
import threading
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
            "validation_fraction": 0.2,
        },
        "train": {
            "steps": 12,
            "batch_size": 8,
            "save_every": 4,
            "log_every": 2,
            "eval_every": 4,
            "tensorboard": False,
        },
        "optimizer": {"learning_rate": 3e-3},
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
    from dwt_jax.config_loader import load_config
    from dwt_jax.data.prepare import prepare_data

    config = make_project(folder)
    prepare_data(load_config(str(config)).data, folder / "rows", workers=1)
    return f"{config}:{folder / 'rows'}"


def project_with_teacher(folder: Path, steps: int) -> tuple[str, Path]:
    """`prepared_project`, and in folder/teacher a teacher of one layer that was trained for `steps` steps."""
    from dwt_jax.config_loader import load_config
    from dwt_jax.train.loop import train

    spec = prepared_project(folder)
    train(load_config(spec, {"train.steps": str(steps), "model.num_hidden_layers": "1"}), folder / "teacher")
    return spec, folder


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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_several(
    command: list[str], processes: int, devices: int = 1, others: list[str] | None = None, **variables: str
) -> list[subprocess.Popen[str]]:
    """A command line of Python in several processes on this machine. others: what all but the first run."""
    port = free_port()
    started = []
    for i in range(processes):
        several = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        env = environment(JAX_NUM_CPU_DEVICES=str(devices), **(several if processes > 1 else {}), **variables)
        words = [sys.executable, *(others if others and i else command)]
        started.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        )
    return started


def ended(processes: list[subprocess.Popen[str]], limit: float = 200) -> list[tuple[int, str]]:
    """(exit status, the rest of what it said) of each; those that take longer than `limit` seconds fail."""
    found: dict[int, str] = {}
    readers = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: p.stdout.read()}))
        for i, p in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    try:
        statuses = [process.wait(timeout=limit) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for reader in readers:
            reader.join()
    return [(status, found[i]) for i, status in enumerate(statuses)]
