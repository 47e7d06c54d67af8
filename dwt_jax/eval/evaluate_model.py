"""`dwt evaluate`: a model directory on a prepared directory."""

import sys
from pathlib import Path

import jax

from dwt_jax.config import Mesh
from dwt_jax.data.shards import read_index
from dwt_jax.data.tokenizer import digest, vocabulary
from dwt_jax.distributed.mesh import make_mesh, shardings
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.runs.run_dir import load_model


def evaluate(path: str, data: Path, batch_size: int) -> dict[str, float]:
    """Held-out loss, perplexity and accuracies (see `mlm.summarise`) of the model in `path`."""
    return likelihood.summarise(documents_of(path, data, batch_size))


def documents_of(path: str, data: Path, batch_size: int = 64) -> likelihood.Documents:
    """The same by held-out document. Raises UserError if data and model disagree in vocabulary or length."""
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    data = data.expanduser()
    index = read_index(data)
    if index is None:
        raise UserError(f"--data: no index.json in {data}, expected a directory that dwt prepare wrote")
    loaded = load_model(path)
    words = vocabulary(loaded.tokenizer)
    if words.tokens != vocabulary(data / "tokenizer").tokens:
        raise UserError(f"--data: {data} has another vocabulary than {path}, expected the same")
    if digest(loaded.tokenizer) != digest(data / "tokenizer"):
        print(f"{path} takes text apart otherwise than {data} was (lower-casing, say)", file=sys.stderr)
    if loaded.model.vocab_size < len(words):
        raise UserError(
            f"--model: {path} has vocab_size {loaded.model.vocab_size}, expected at least its tokenizer's "
            f"{len(words)}"
        )
    length = index["sequence_length"]
    if length > loaded.model.max_length:
        raise UserError(
            f"--data: {data} has rows of {length} tokens, expected at most the model's "
            f"{loaded.model.max_length} positions"
        )
    mesh = make_mesh(Mesh(), jax.device_count())
    params = jax.device_put(loaded.params, shardings(loaded.params, mesh))
    documents = likelihood.by_document(params, loaded.model, data, mesh=mesh, batch_size=batch_size)
    assert documents is not None  # nothing stops it
    return documents
