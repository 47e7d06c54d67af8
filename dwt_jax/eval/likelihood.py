"""Held-out masked-LM loss and accuracy, under masks that are the same for every model."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.config import Mlm
from dwt_jax.data import dataset as data_rows
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding, to_global
from dwt_jax.files import atomic_write
from dwt_jax.models import family
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.common.sharding import infer_shardings, policy_for_mesh
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives.distillation import cross_entropy
from dwt_jax.objectives.masking import EVALUATION_SEED, MaskingVocab, apply_mlm_mask, row_keys

EVAL_MASK = Mlm()  # whatever a run was trained with: 15 %, 80/10/10, single tokens


class DocumentLosses(NamedTuple):
    """Sums by held-out document, float64 [documents]."""

    loss: np.ndarray  # of −log p(label)
    top1: np.ndarray  # predictions whose label was the most probable token
    top5: np.ndarray
    predictions: np.ndarray  # how many


@functools.cache
def _jit_score(
    model: ModelConfig, masking_vocab: MaskingVocab, policy: Policy, mesh: jax.sharding.Mesh
) -> Any:
    replicated_layout, row_sharding, policy = (
        replicated_sharding(mesh),
        batch_sharding(mesh),
        policy_for_mesh(mesh, policy),
    )

    def score(params, batch, row_numbers):
        keys = row_keys(EVALUATION_SEED, 0, row_numbers)
        masked_rows = apply_mlm_mask(batch["tokens"], batch["segments"], keys, EVAL_MASK, masking_vocab)
        hidden = family(model).encode(
            params,
            model,
            masked_rows.tokens,
            batch["segments"],
            positions=masked_rows.positions,
            policy=policy,
        )
        logits = lm_head_logits(params, model, hidden, policy=policy)
        loss = cross_entropy(logits, masked_rows.labels)
        label = jnp.take_along_axis(logits, masked_rows.labels[..., None], axis=-1)
        # How many other tokens the model does not put below the label: ties and NaN count against it.
        label_rank = (~(logits < label)).sum(-1) - 1
        segment = jnp.take_along_axis(batch["segments"].astype(jnp.int32), masked_rows.positions, axis=1)
        return loss, label_rank, masked_rows.weights, segment

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
    """Sums for each held-out document of a prepared directory; None if `stop` said so.

    Masks come from a fixed seed and the row's number: the same for every model, batch size
    and mesh.
    """
    rows = data_rows.open_dataset(data, "held_out")
    masking_vocab = MaskingVocab.from_vocabulary(load_vocabulary(data / "tokenizer"), EVAL_MASK.whole_word)
    score = _jit_score(model, masking_vocab, policy, mesh)
    row_count = data_rows.num_rows(rows)
    documents = data_rows.first_document_ids(rows)
    num_row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(batch_size, row_count) // num_row_shards) * num_row_shards
    parts = []
    for start in range(0, row_count, batch_size):
        if should_stop():
            return None
        row_numbers = np.arange(start, start + batch_size, dtype=np.int32)
        in_range = row_numbers < row_count
        batch = data_rows.read_rows(rows, np.minimum(row_numbers, row_count - 1).astype(np.int64))
        batch["segments"] = np.where(in_range[:, None], batch["segments"], 0).astype(batch["segments"].dtype)
        device_batch = to_global((batch, row_numbers), batch_sharding(mesh))
        outputs = jax.device_get(score(params, *device_batch))
        loss, label_rank, weights, segment = (x.astype(np.float64) for x in outputs)
        document = documents[np.minimum(row_numbers, row_count - 1)][:, None] + segment - 1
        is_prediction = weights > 0
        parts.append(
            np.stack(
                [
                    document[is_prediction],
                    loss[is_prediction],
                    label_rank[is_prediction] < 1,
                    label_rank[is_prediction] < 5,
                ]
            )
        )
    document, loss, top1, top5 = np.concatenate(parts, axis=1)
    _, index = np.unique(document, return_inverse=True)
    return DocumentLosses(*(np.bincount(index, values) for values in (loss, top1, top5, np.ones_like(loss))))


def summarize_losses(document_losses: DocumentLosses) -> dict[str, float]:
    """Mean loss in nats with its standard error over documents, perplexity, accuracies.

    The mean is a ratio of sums, so its error is that of a ratio estimator over clusters:
    √(n/(n−1) · Σ (S_d − m·n_d)²) / Σ n_d, which counts a document as one observation.
    """
    count, n = document_losses.predictions.sum(), len(document_losses.loss)
    mean = document_losses.loss.sum() / count
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


def write_document_losses(path: Path, document_losses: DocumentLosses) -> None:
    """For paired comparisons of runs: arrays `loss` and `count` by document."""
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, loss=document_losses.loss, count=document_losses.predictions)
