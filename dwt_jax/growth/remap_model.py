"""Grow a model directory to a larger configuration (`dwt remap`)."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import resolve_output_dir, user_path
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import CLASSIFIER_KEYS
from dwt_jax.hf.source_card import existing_card, source_name
from dwt_jax.logs import logger
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap import apply
from dwt_jax.remap.gates import has_gates
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.report import RemapReport
from dwt_jax.runs.export import check_tokenizer
from dwt_jax.runs.load import LoadedModel, load_model

PROBE_SHAPE = (8, 64)
"""Rows and tokens of the random probe on which the drift of the logits is measured."""


def remap_model(
    path: str,
    target: ModelConfig,
    method: str,
    out: Path,
    options: GrowthOptions,
    seed: int,
    step: int | None = None,
) -> RemapReport:
    """Write a larger copy of a model to a new directory.

    The heads are grown too. For another model type only the masked-LM head is: it computes other heads
    differently.

    Args:
        path: run directory or model directory.
        target: config of the larger model. A vocab_size of 0 means the source's. The tables of a tied
            source are two with tie_word_embeddings False; two tables stay two.
        method: growth method, as in remap.methods.get_method.
        out: new model directory.
        options: options of the method.
        seed: random seed.
        step: checkpoint of a run to read. None: the latest.

    Returns:
        The report of the growth, with the drift of the logits on random tokens.

    Raises:
        UserError: sizes that the method does not support, a vocabulary smaller than the tokenizer's, or a
            target with gates or weighted norms, which exist in runs only. Nothing is written then.
    """
    out = resolve_output_dir(out)
    _check_supported(target, method)
    loaded_model = load_model(path, heads="all", step=step)
    source = loaded_model.model
    if target.model_type != source.model_type:
        loaded_model = _convert_family(loaded_model, target.model_type)
    target = dataclasses.replace(
        target,
        vocab_size=target.vocab_size or source.vocab_size,
        pad_token_id=source.pad_token_id,
        tie_word_embeddings=source.tie_word_embeddings and target.tie_word_embeddings,
    )
    check_tokenizer(loaded_model._replace(model=target))
    has_lm_head = all(head in loaded_model.params for head in family(source).LM_HEADS)
    probe = _random_probe(source, target) if has_lm_head else None
    target_params, report = apply.remap_params(
        loaded_model.params, source, target, method, jax.random.key(seed), options=options, probe=probe
    )
    checkpoint.save_checkpoint(
        target_params,
        target,
        loaded_model.tokenizer,
        out,
        labels=loaded_model.labels,
        passthrough=loaded_model.passthrough,
        card=model_card.grown_card(
            target,
            [head for head in family(target).HEADS if head in target_params],
            source_name(user_path(path)),
            method,
            report.function_preserving,
            existing_card(loaded_model.tokenizer),
        ),
    )
    return report


def _check_supported(target: ModelConfig, method: str) -> None:
    if has_gates(target):
        key = "gated_layers" if target.gated_layers else "weighted_norm"
        raise UserError(
            f"config: model.{key} is True, expected False: gates exist in runs only (init.method)"
        )
    if method.split("+")[-1] == "ligo":
        raise UserError(
            "--method: ligo learns its maps from data, expected another method (or init.method=ligo)"
        )


def _random_probe(source: ModelConfig, target: ModelConfig) -> dict[str, np.ndarray]:
    length = min(PROBE_SHAPE[1], source.max_length, target.max_length)
    ids = np.random.default_rng(0).integers(0, min(source.vocab_size, target.vocab_size), PROBE_SHAPE)
    return {
        "tokens": ids[:, :length].astype(np.int32),
        "segments": np.ones((PROBE_SHAPE[0], length), np.int32),
    }


def _convert_family(loaded_model: LoadedModel, model_type: str) -> LoadedModel:
    """Return the parts that both model types compute alike, and log the names of the others."""
    module = family(loaded_model.model)
    dropped_heads = [
        head for head in module.HEADS if head in loaded_model.params and head not in module.LM_HEADS
    ]
    if dropped_heads:
        logger.warning(
            f"omitted, {model_type} computes these heads differently from {loaded_model.model.model_type}: "
            f"{', '.join(dropped_heads)}"
        )
    params = {name: part for name, part in loaded_model.params.items() if name not in dropped_heads}
    passthrough = {
        key: value for key, value in loaded_model.passthrough.items() if key not in CLASSIFIER_KEYS
    }
    return loaded_model._replace(params=params, labels=(), passthrough=passthrough)
