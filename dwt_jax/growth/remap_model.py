"""`dwt remap`: a model directory as a larger (or smaller) one."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from dwt_jax.config import Model
from dwt_jax.errors import UserError
from dwt_jax.files import new_place
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import OF_CLASSIFIERS
from dwt_jax.models.bert import HEADS
from dwt_jax.remap import apply
from dwt_jax.remap.gates import has_annealed
from dwt_jax.remap.methods import Options
from dwt_jax.remap.report import Report
from dwt_jax.runs.export import look_at_tokenizer
from dwt_jax.runs.run_dir import Loaded, load_model

PROBE = (8, 64)  # rows and tokens, of random ids, on which the drift of the logits is measured


def remap(
    path: str, target: Model, method: str, out: Path, options: Options, seed: int, step: int | None = None
) -> Report:
    """Write the model in `path`, a run (at the checkpoint of `step`, if given) or model directory, grown
    to `target`, to the new directory `out`. Its heads come with it; to another family, which
    computes them otherwise, the masked-LM head alone.

    A vocab_size of 0 is the source's. Raises UserError, before anything is written, for what the
    method cannot do, for fewer tokens than the tokenizer has, and for gates and weights of norms: those
    open in training (init.method).
    """
    out = new_place(out)
    if has_annealed(target):
        key = "gated_layers" if target.gated_layers else "weighted_norm"
        raise UserError(
            f"config: model.{key} is True, expected False: it is annealed away in training (init.method)"
        )
    if method.split("+")[-1] == "ligo":
        raise UserError("--method: ligo learns its maps from data, expected another (see dwt remap --pilot)")
    loaded = load_model(path, heads=None, step=step)
    source = loaded.model
    if target.model_type != source.model_type:
        loaded = _across(loaded, target.model_type)
    target = dataclasses.replace(
        target,
        vocab_size=target.vocab_size or source.vocab_size,
        pad_token_id=source.pad_token_id,
        tie_word_embeddings=source.tie_word_embeddings,
    )
    look_at_tokenizer(loaded._replace(model=target))
    probe = None
    if "mlm" in loaded.params:
        length = min(PROBE[1], source.max_length, target.max_length)
        ids = np.random.default_rng(0).integers(0, min(source.vocab_size, target.vocab_size), PROBE)
        probe = {
            "tokens": ids[:, :length].astype(np.int32),
            "segments": np.ones((PROBE[0], length), np.int32),
        }
    grown, report = apply.remap(
        loaded.params, source, target, method, jax.random.key(seed), options=options, probe=probe
    )
    heads = [head for head in HEADS if head in grown]
    checkpoint.save(
        grown,
        target,
        loaded.tokenizer,
        out,
        labels=loaded.labels,
        kept=loaded.kept,
        card=model_card.of_remapped(
            target,
            heads,
            Path(path).expanduser().absolute().name,
            method,
            report.exact,
            model_card.of_its_own(loaded.tokenizer),
        ),
    )
    return report


def _across(loaded: Loaded, family: str) -> Loaded:
    """What means the same in every family; the rest is named."""
    left = [head for head in HEADS if head in loaded.params and head != "mlm"]
    if left:
        print(
            f"left out, a {family} computes it otherwise than a {loaded.model.model_type}: {', '.join(left)}",
            file=sys.stderr,
        )
    params = {name: part for name, part in loaded.params.items() if name not in left}
    kept = {key: value for key, value in loaded.kept.items() if key not in OF_CLASSIFIERS}
    return loaded._replace(params=params, labels=(), kept=kept)
