"""Evaluate a model on the held-out documents of a prepared directory (`dwt evaluate`)."""

from pathlib import Path

import jax

from dwt_jax.config import Mesh
from dwt_jax.data.shards import read_dataset_index
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import make_mesh
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.files import user_path
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import Params
from dwt_jax.runs.load import LoadedModel, load_model
from dwt_jax.runs.pretrained import check_vocab_size, check_vocabulary, truncate_vocabulary


def evaluate_model(path: str, data: Path, batch_size: int) -> dict[str, float]:
    """Compute held-out loss, perplexity, accuracies, and the loss per byte of text.

    Args:
        path: a run's directory or a model in Hugging Face's layout.
        data: a directory that `dwt prepare` wrote.
        batch_size: rows per batch; does not change the result.

    Returns:
        As `likelihood.summarize_losses` and `likelihood.losses_per_byte`.

    Raises:
        UserError: if data and model disagree in vocabulary or length.
    """
    metrics = evaluate_documents(path, data, batch_size)[1]
    if problem := likelihood.loss_problem(metrics):
        flag = "--model" if metrics["predictions"] else "--data"
        raise UserError(f"{flag}: {problem} ({path} on {data}), expected {likelihood.EXPECTED_LOSS}")
    return metrics


def evaluate_documents(
    path: str, data: Path, batch_size: int = 64
) -> tuple[likelihood.DocumentLosses, dict[str, float]]:
    """Compute the losses of each held-out document, and their summary.

    Arguments and errors are those of `evaluate_model`, except that an implausible loss is returned.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    data = user_path(data)
    index = read_dataset_index(data)
    if index is None:
        raise UserError(f"--data: no index.json in {data}, expected a directory that dwt prepare wrote")
    loaded_model = load_model(path)
    vocab = load_vocabulary(loaded_model.tokenizer)
    check_vocabulary("--model", path, vocab, load_vocabulary(data / "tokenizer"))
    loaded_model = fit_to_vocabulary(loaded_model, path, len(vocab))
    length = index["sequence_length"]
    if length > loaded_model.model.max_length:
        raise UserError(
            f"--data: {data} has rows of {length} tokens, expected at most the model's "
            f"{loaded_model.model.max_length} positions"
        )
    params, mesh = put_on_mesh(loaded_model)
    document_losses = likelihood.losses_per_document(
        params, loaded_model.model, data, mesh=mesh, batch_size=batch_size
    )
    assert document_losses is not None  # should_stop is never true
    metrics = likelihood.summarize_losses(document_losses)
    per_byte = likelihood.losses_per_byte(metrics, loaded_model.model.objective, data)
    return document_losses, {**metrics, **per_byte}


def fit_to_vocabulary(loaded_model: LoadedModel, path: str, num_tokens: int) -> LoadedModel:
    """Return the model of `path` without vocabulary rows that have no token, as for a teacher.

    Raises:
        UserError: the model has fewer rows than its tokenizer has tokens.
    """
    check_vocab_size("--model", path, loaded_model.model, num_tokens)
    params, model = truncate_vocabulary(loaded_model.params, loaded_model.model, num_tokens)
    return loaded_model._replace(params=params, model=model)


def put_on_mesh(loaded_model: LoadedModel) -> tuple[Params, jax.sharding.Mesh]:
    """Put the parameters on a mesh of all devices. Returns (parameters, mesh)."""
    mesh = make_mesh(Mesh(), jax.device_count())
    shardings = infer_shardings(loaded_model.params, loaded_model.model, mesh)
    return jax.device_put(loaded_model.params, shardings), mesh
