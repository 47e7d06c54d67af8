"""Held-out loss and accuracy of any objective, with the same targets for every model."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.data.batch import Batch
from dwt_jax.data.dataset import first_document_ids, num_rows, open_dataset, read_rows
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, to_global
from dwt_jax.files import atomic_write, read_json
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits, map_positions
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives import Objective, objective_module
from dwt_jax.objectives.distillation import cross_entropy
from dwt_jax.objectives.targets import EVALUATION_SEED, row_keys


class DocumentLosses(NamedTuple):
    """Sums over the predictions of each held-out document, float64 [documents]."""

    loss: np.ndarray  # −log p(label), nats
    top1: np.ndarray  # predictions whose label is the most probable token
    top5: np.ndarray  # predictions whose label is among the five most probable tokens
    predictions: np.ndarray  # number of predictions


@functools.cache
def _jit_score(model: ModelConfig, objective: Objective, policy: Policy, mesh: jax.sharding.Mesh) -> Any:
    """Return the jitted (params, batch, row numbers [B]) → loss, label rank, weight, segment, each [B, P]."""
    replicated_layout, row_sharding, policy = (
        replicated_sharding(mesh),
        batch_sharding(mesh),
        policy_for_mesh(mesh, policy),
    )

    def score(
        params: Params, batch: Batch, row_numbers: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        keys = row_keys(EVALUATION_SEED, 0, row_numbers)
        targets = objective_module(objective).make_targets(batch, keys, objective)
        segment_ids = jnp.asarray(batch.segment_ids)
        hidden = family(model).encode(
            params, model, targets.inputs, segment_ids, positions=targets.positions, policy=policy
        )

        def score_labels(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, labels = chunk
            logits = lm_head_logits(params, model, hidden, policy=policy)
            label = jnp.take_along_axis(logits, labels[..., None], axis=-1)
            # Number of other tokens that do not have a smaller logit: ties and NaN count against the label.
            return cross_entropy(logits, labels), (~(logits < label)).sum(-1) - 1

        loss, label_rank = map_positions(score_labels, (hidden, targets.labels), model.vocab_size, policy)
        segment = segment_ids.astype(jnp.int32)
        if targets.positions is not None:
            segment = jnp.take_along_axis(segment, targets.positions, axis=1)
        return loss, label_rank, targets.weights, segment

    layout = infer_shardings(family(model).abstract_params(model), model, mesh)
    return jax.jit(score, in_shardings=(layout, row_sharding, row_sharding), out_shardings=replicated_layout)


def losses_per_document(
    params: Any,
    model: ModelConfig,
    data: Path,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int = 64,
    policy: Policy = Policy(),
    should_stop: Callable[[], bool] = lambda: False,
) -> DocumentLosses | None:
    """Compute the losses of each held-out document.

    Masks depend only on a fixed seed and the row's number, so they are the same for every model, batch
    size and mesh.

    Args:
        params: placed on the mesh.
        model: config of the model.
        data: a prepared directory.
        mesh: devices.
        batch_size: rows per batch, rounded up to a multiple of the mesh's batch shards.
        policy: dtypes.
        should_stop: checked before each batch.

    Returns:
        The sums of each document, or None once `should_stop` returns True.
    """
    dataset = open_dataset(data, "held_out")
    vocabulary = load_vocabulary(data / "tokenizer")
    objective = objective_module(model.objective).make_evaluation_objective(vocabulary)
    score = _jit_score(model, objective, policy, mesh)
    row_count = num_rows(dataset)
    documents = first_document_ids(dataset)
    num_row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(batch_size, row_count) // num_row_shards) * num_row_shards
    values_by_batch = []
    for start in range(0, row_count, batch_size):
        if should_stop():
            return None
        row_numbers = np.arange(start, start + batch_size, dtype=np.int32)
        in_range = row_numbers < row_count
        batch = read_rows(dataset, np.minimum(row_numbers, row_count - 1).astype(np.int64))
        segment_ids = np.asarray(batch.segment_ids)
        batch = Batch(batch.tokens, np.where(in_range[:, None], segment_ids, 0).astype(segment_ids.dtype))
        device_batch = to_global((batch, row_numbers), batch_sharding(mesh))
        outputs = jax.device_get(score(params, *device_batch))
        loss, label_rank, weights, segment = (x.astype(np.float64) for x in outputs)
        document = documents[np.minimum(row_numbers, row_count - 1)][:, None] + segment - 1
        is_prediction = weights > 0
        values_by_batch.append(
            np.stack(
                [
                    document[is_prediction],
                    loss[is_prediction],
                    label_rank[is_prediction] < 1,
                    label_rank[is_prediction] < 5,
                ]
            )
        )
    document, loss, top1, top5 = np.concatenate(values_by_batch, axis=1)
    _, index = np.unique(document, return_inverse=True)
    return DocumentLosses(*(np.bincount(index, values) for values in (loss, top1, top5, np.ones_like(loss))))


def summarize_losses(document_losses: DocumentLosses) -> dict[str, float]:
    """Compute mean loss in nats with its standard error, perplexity and accuracies.

    The mean m is a ratio of sums over documents, of losses S_d and of predictions n_d. Its standard
    error is that of a ratio estimator over clusters, with a document as one observation:
    √(n/(n−1) · Σ (S_d − m·n_d)²) / Σ n_d.
    """
    count, n = document_losses.predictions.sum(), len(document_losses.loss)
    if not count:
        names = ("held_out_loss", "standard_error", "perplexity", "top1_accuracy", "top5_accuracy")
        return {**dict.fromkeys(names, math.nan), "predictions": 0, "documents": n}
    mean = document_losses.loss.sum() / count
    with np.errstate(invalid="ignore"):
        residual = document_losses.loss - mean * document_losses.predictions
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / count if n > 1 else float("nan")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))
    return {
        "held_out_loss": float(mean),
        "standard_error": float(error),
        "perplexity": perplexity,
        "top1_accuracy": float(document_losses.top1.sum() / count),
        "top5_accuracy": float(document_losses.top5.sum() / count),
        "predictions": int(count),
        "documents": n,
    }


def losses_per_byte(metrics: Mapping[str, Any], objective: str, data: Path) -> dict[str, float]:
    """Convert the held-out loss to a loss per UTF-8 byte of the text, which is comparable across tokenizers.

    A causal model has `bits_per_byte`, Σ −log₂ p(token | earlier tokens of its segment) / bytes: the length
    of a code for the text. Every token of the text and every end token is predicted once.

    A masked model has `loss_per_byte`, loss · text tokens / bytes, in nats. This is not a code length: a
    token is predicted from both sides, including tokens that are predicted from it.

    Args:
        metrics: as `summarize_losses` returns them, of all held-out rows.
        objective: name of the model's objective.
        data: the prepared directory.

    Returns:
        One of the two; nothing for rows of an earlier version, which did not count bytes.
    """
    text = read_json(data / "index.json")["splits"]["held_out"]
    if not (num_bytes := text.get("text_bytes")):
        return {}
    if objective == "next_token":
        nats = metrics["held_out_loss"] * metrics["predictions"]
        return {"bits_per_byte": nats / (math.log(2) * num_bytes)}
    return {"loss_per_byte": metrics["held_out_loss"] * text["text_tokens"] / num_bytes}


MAX_LOSS = 100.0
"""Largest held-out loss that can be right, in nats. One that knows nothing has log(vocabulary), 7 to 13."""

EXPECTED_LOSS = f"a loss above 0 and at most {MAX_LOSS:g}"


def loss_problem(metrics: Mapping[str, Any]) -> str:
    """Describe what is implausible about the result of an evaluation; '' if it is plausible.

    A loss of exactly 0 is implausible (every label would have probability 1), as is one above MAX_LOSS.

    Args:
        metrics: as `summarize_losses` returns them.
    """
    if not metrics["predictions"]:
        return "no token of the held-out rows can be predicted"
    loss = metrics["held_out_loss"]
    return "" if 0 < loss <= MAX_LOSS else f"the held-out loss is {loss:g}"


def write_document_losses(path: Path, document_losses: DocumentLosses) -> None:
    """Write the arrays `loss` and `count` [documents], for paired comparisons of runs."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, loss=document_losses.loss, count=document_losses.predictions)
