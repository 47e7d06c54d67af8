"""Held-out masked-LM loss and accuracy, under masks that are the same for every model."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Mask, Model
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.tokenizer import vocabulary
from dwt_jax.distributed.mesh import over, put, replicated, rows_sharding, shardings
from dwt_jax.files import whole_file
from dwt_jax.models import bert
from dwt_jax.models.common.matmul import Numerics
from dwt_jax.objectives.distillation import hard_loss
from dwt_jax.objectives.masking import EVALUATION_SEED, Tokens, mask_rows, row_keys

MASK = Mask()  # whatever a run was trained with: 15 %, 80/10/10, single tokens


class Documents(NamedTuple):
    """Sums by held-out document, float64 [documents]."""

    loss: np.ndarray  # of −log p(label)
    top1: np.ndarray  # predictions whose label was the most probable token
    top5: np.ndarray
    predictions: np.ndarray  # how many


@functools.cache
def _compiled(model: Model, tokens: Tokens, numerics: Numerics, mesh: jax.sharding.Mesh) -> Any:
    same, by_row, numerics = replicated(mesh), rows_sharding(mesh), over(mesh, numerics)

    def score(params, batch, row_numbers):
        keys = row_keys(EVALUATION_SEED, 0, row_numbers)
        masked = mask_rows(batch["tokens"], batch["segments"], keys, MASK, tokens)
        hidden = bert.encode(
            params, model, masked.tokens, batch["segments"], at=masked.positions, numerics=numerics
        )
        logits = bert.mlm_logits(params, model, hidden, numerics=numerics)
        loss = hard_loss(logits, masked.labels)
        label = jnp.take_along_axis(logits, masked.labels[..., None], axis=-1)
        # How many other tokens the model does not put below the label: ties and NaN count against it.
        better = (~(logits < label)).sum(-1) - 1
        segment = jnp.take_along_axis(batch["segments"].astype(jnp.int32), masked.positions, axis=1)
        return loss, better, masked.weights, segment

    layout = shardings(bert.abstract(model), mesh)
    return jax.jit(score, in_shardings=(layout, by_row, by_row), out_shardings=same)


def by_document(
    params: Any,
    model: Model,
    data: Path,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
    stop: Callable[[], bool] = lambda: False,
) -> Documents | None:
    """Sums for each held-out document of a prepared directory; None if `stop` said so.

    Masks come from a fixed seed and the row's number: the same for every model, batch size
    and mesh.
    """
    rows = data_rows.open_rows(data, "held_out")
    tokens = Tokens.of(vocabulary(data / "tokenizer"), MASK.whole_word)
    score = _compiled(model, tokens, numerics, mesh)
    total = data_rows.count(rows)
    documents = data_rows.first_documents(rows)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(batch_size, total) // spread) * spread
    parts = []
    for start in range(0, total, batch_size):
        if stop():
            return None
        numbers = np.arange(start, start + batch_size, dtype=np.int32)
        inside = numbers < total
        batch = data_rows.gather(rows, np.minimum(numbers, total - 1).astype(np.int64))
        batch["segments"] = np.where(inside[:, None], batch["segments"], 0).astype(batch["segments"].dtype)
        placed = put((batch, numbers), rows_sharding(mesh))
        found = jax.device_get(score(params, *placed))
        loss, better, weights, segment = (x.astype(np.float64) for x in found)
        document = documents[np.minimum(numbers, total - 1)][:, None] + segment - 1
        real = weights > 0
        parts.append(np.stack([document[real], loss[real], better[real] < 1, better[real] < 5]))
    document, loss, top1, top5 = np.concatenate(parts, axis=1)
    _, index = np.unique(document, return_inverse=True)
    return Documents(*(np.bincount(index, values) for values in (loss, top1, top5, np.ones_like(loss))))


def summarise(documents: Documents) -> dict[str, float]:
    """Mean loss in nats with its standard error over documents, perplexity, accuracies.

    The mean is a ratio of sums, so its error is that of a ratio estimator over clusters:
    √(n/(n−1) · Σ (S_d − m·n_d)²) / Σ n_d, which counts a document as one observation.
    """
    count, n = documents.predictions.sum(), len(documents.loss)
    mean = documents.loss.sum() / count
    residual = documents.loss - mean * documents.predictions
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / count if n > 1 else float("nan")
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))
    return {
        "held_out_loss": float(mean),
        "standard_error": float(error),
        "perplexity": perplexity,
        "top1_accuracy": float(documents.top1.sum() / count),
        "top5_accuracy": float(documents.top5.sum() / count),
        "predictions": int(count),
        "documents": n,
    }


def write(path: Path, documents: Documents) -> None:
    """For paired comparisons of runs: arrays `loss` and `count` by document."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, loss=documents.loss, count=documents.predictions)
