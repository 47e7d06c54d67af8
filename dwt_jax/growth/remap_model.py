"""`dwt remap`: a model directory as a larger (or smaller) one."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import resolve_output_dir
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import CLASSIFIER_KEYS
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap import apply
from dwt_jax.remap.gates import has_gates
from dwt_jax.remap.methods import GrowthOptions
from dwt_jax.remap.report import RemapReport
from dwt_jax.runs.export import check_tokenizer
from dwt_jax.runs.load import LoadedModel, load_model

PROBE_SHAPE = (8, 64)  # rows and tokens, of random ids, on which the drift of the logits is measured


def remap_model(
    path: str,
    target: ModelConfig,
    method: str,
    out: Path,
    options: GrowthOptions,
    seed: int,
    step: int | None = None,
) -> RemapReport:
    """Write the model in `path`, a run (at the checkpoint of `step`, if given) or model directory, grown
    to `target`, to the new directory `out`. Its heads come with it; to another family, which
    computes them otherwise, the masked-LM head alone.

    A vocab_size of 0 is the source's. Raises UserError, before anything is written, for what the
    method cannot do, for fewer tokens than the tokenizer has, and for gates and weights of norms: those
    open in training (init.method).
    """
    out = resolve_output_dir(out)
    if has_gates(target):
        key = "gated_layers" if target.gated_layers else "weighted_norm"
        raise UserError(
            f"config: model.{key} is True, expected False: it is annealed away in training (init.method)"
        )
    if method.split("+")[-1] == "ligo":
        raise UserError("--method: ligo learns its maps from data, expected another (see dwt remap --pilot)")
    loaded_model = load_model(path, heads=None, step=step)
    source = loaded_model.model
    if target.model_type != source.model_type:
        loaded_model = _convert_family(loaded_model, target.model_type)
    target = dataclasses.replace(
        target,
        vocab_size=target.vocab_size or source.vocab_size,
        pad_token_id=source.pad_token_id,
        tie_word_embeddings=source.tie_word_embeddings,
    )
    check_tokenizer(loaded_model._replace(model=target))
    probe = None
    if "mlm" in loaded_model.params:
        length = min(PROBE_SHAPE[1], source.max_length, target.max_length)
        ids = np.random.default_rng(0).integers(0, min(source.vocab_size, target.vocab_size), PROBE_SHAPE)
        probe = {
            "tokens": ids[:, :length].astype(np.int32),
            "segments": np.ones((PROBE_SHAPE[0], length), np.int32),
        }
    target_params, report = apply.remap_params(
        loaded_model.params, source, target, method, jax.random.key(seed), options=options, probe=probe
    )
    heads = [head for head in family(target).HEADS if head in target_params]
    checkpoint.save_checkpoint(
        target_params,
        target,
        loaded_model.tokenizer,
        out,
        labels=loaded_model.labels,
        passthrough=loaded_model.passthrough,
        card=model_card.grown_card(
            target,
            heads,
            Path(path).expanduser().absolute().name,
            method,
            report.exact,
            model_card.existing_card(loaded_model.tokenizer),
        ),
    )
    return report


def _convert_family(loaded_model: LoadedModel, model_type: str) -> LoadedModel:
    """What means the same in every family; the rest is named."""
    dropped_heads = [
        head for head in family(loaded_model.model).HEADS if head in loaded_model.params and head != "mlm"
    ]
    if dropped_heads:
        print(
            f"left out, a {model_type} computes it otherwise than a {loaded_model.model.model_type}: {', '.join(dropped_heads)}",
            file=sys.stderr,
        )
    params = {name: part for name, part in loaded_model.params.items() if name not in dropped_heads}
    passthrough = {
        key: value for key, value in loaded_model.passthrough.items() if key not in CLASSIFIER_KEYS
    }
    return loaded_model._replace(params=params, labels=(), passthrough=passthrough)
