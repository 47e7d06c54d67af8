"""Load the pre-trained models of a run: its teacher, or the source that its student is grown from."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config_loader import flatten_dict
from dwt_jax.data.tokenizer import Vocabulary, load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, user_path
from dwt_jax.logs import logger
from dwt_jax.models import family
from dwt_jax.models.common.layers import padded_vocab_size
from dwt_jax.models.common.logical_axes import Axis, map_with_axes
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.runs.load import load_model
from dwt_jax.runs.metrics_file import sum_or_none


class PretrainedModel(NamedTuple):
    """A pre-trained model."""

    params: Any  # host fp32 arrays
    model: ModelConfig
    digest: str  # of its parameters
    training_flops: float | None  # of its pre-training; None if unknown


def load_pretrained(
    key: str, path: str, vocab: Vocabulary, allow_fewer_tokens: bool = False, step: int | None = None
) -> PretrainedModel:
    """Load a pre-trained model and check its vocabulary. Vocabulary rows without a token are removed.

    Args:
        key: config key or flag that names the model, for messages.
        path: model directory or run directory.
        vocab: vocabulary of the data.
        allow_fewer_tokens: whether the model may have only the first tokens of `vocab`.
        step: checkpoint of a run to read. None: the latest.

    Raises:
        UserError: the vocabulary differs from the data's; the message names the first difference.
    """
    loaded_model = load_model(path, step=step)
    source_vocab = load_vocabulary(loaded_model.tokenizer)
    check_vocabulary(key, path, source_vocab, vocab, allow_fewer_tokens)
    vocab_size = len(source_vocab.tokens)
    check_vocab_size(key, path, loaded_model.model, vocab_size)
    params, model = truncate_vocabulary(loaded_model.params, loaded_model.model, vocab_size)
    return PretrainedModel(
        params, model, params_digest(loaded_model.params), _read_training_flops(user_path(path))
    )


def params_digest(params: Any) -> str:
    """Return a digest of all parameters, as 16 hexadecimal digits."""
    hasher = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        hasher.update(np.ascontiguousarray(leaf).tobytes())
    return hasher.hexdigest()[:16]


def check_vocab_size(key: str, path: str, model: ModelConfig, num_tokens: int) -> None:
    """Raise UserError if the model of `path` has fewer rows than its tokenizer has tokens.

    Args:
        key: config key or flag that names the model, for the message.
        path: model directory or run directory.
        model: config of the model.
        num_tokens: number of tokens.
    """
    if model.vocab_size < num_tokens:
        raise UserError(
            f"{key}: {path} has vocab_size {model.vocab_size}, expected at least its tokenizer's {num_tokens}"
        )


def truncate_vocabulary(params: Any, model: ModelConfig, vocab_size: int) -> tuple[Any, ModelConfig]:
    """Remove rows of the vocabulary without a token: many checkpoints pad their tables.

    Args:
        params: parameters of the model.
        model: its config.
        vocab_size: number of tokens.

    Returns:
        Parameters and config of the model with `vocab_size` tokens.
    """
    rows = padded_vocab_size(vocab_size)

    def truncate(axes: tuple[Axis, ...], leaf: np.ndarray) -> np.ndarray:
        return leaf[:rows] if axes[0].name == "vocab" else leaf

    return map_with_axes(truncate, family(model).param_axes(model), params), dataclasses.replace(
        model, vocab_size=vocab_size
    )


def check_vocabulary(
    key: str, path: str, source_vocab: Vocabulary, data_vocab: Vocabulary, allow_fewer_tokens: bool = False
) -> None:
    """Check that a model has the vocabulary of the data, and warn if its tokenizer differs.

    For example, a tokenizer that does not lower-case encodes a text with other tokens of the same vocabulary,
    and one with a different end token gives other rows.

    Args:
        key: config key or flag that names the model, for messages.
        path: model directory or run directory.
        source_vocab: vocabulary of the model.
        data_vocab: vocabulary of the data.
        allow_fewer_tokens: whether the model may have only the first tokens of the data's.

    Raises:
        UserError: the vocabularies differ; the message has the first difference.
    """
    pairs = zip(source_vocab.tokens, data_vocab.tokens, strict=False)
    for i, (source_token, data_token) in enumerate(pairs):
        if source_token != data_token:
            raise UserError(
                f"{key}: {path} has another vocabulary, token {i} is {source_token!r}, "
                f"expected {data_token!r}"
            )
    source_size, data_size = len(source_vocab.tokens), len(data_vocab.tokens)
    if source_size > data_size or (source_size < data_size and not allow_fewer_tokens):
        raise UserError(
            f"{key}: {path} has another vocabulary, of {source_size} tokens, expected "
            f"{'at most ' * allow_fewer_tokens}the data's {data_size}"
        )
    source_settings, data_settings = (
        {**flatten_dict(vocab.pipeline), **_row_tokens(vocab)} for vocab in (source_vocab, data_vocab)
    )
    for name in {**source_settings, **data_settings}:
        setting, expected = source_settings.get(name), data_settings.get(name)
        is_by_token = name.split(".")[0] in ("merges", "scores", "added_tokens")
        if setting != expected and (not is_by_token or source_size == data_size):
            logger.warning(
                f"{key}: warning: {path} has the data's vocabulary, but another tokenizer: {name} is "
                f"{str(setting)[:80]}, the data's is {str(expected)[:80]}"
            )
            return


def _row_tokens(vocab: Vocabulary) -> dict[str, str]:
    """Return the special tokens that rows have, by their role."""
    ids = {"begin of text": vocab.cls_id, "end of text": vocab.sep_id, "mask": vocab.mask_id}
    return {role: vocab.tokens[i] for role, i in ids.items() if i >= 0}


def _read_training_flops(path: Path) -> float | None:
    """FLOPs of the model's run, its teacher and its source. None if unknown."""
    summary = (path.parent if path.name == "model" else path) / "summary.json"
    if not summary.exists():
        return None
    flops = read_json(summary).get("flops") or {}
    return sum_or_none(flops.get("total"), flops.get("teacher_training"), flops.get("source_training", 0.0))
