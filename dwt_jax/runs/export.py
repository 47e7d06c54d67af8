"""`dwt export`: any model, run or directory, as a directory for PyTorch."""

import sys
from pathlib import Path
from typing import Any

from dwt_jax.data.tokenizer import has_tokenizer, load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, resolve_output_dir
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import CLASSIFIER_KEYS
from dwt_jax.models import family
from dwt_jax.runs.load import LoadedModel, load_model
from dwt_jax.runs.metrics_file import read_jsonl, restore_nans
from dwt_jax.runs.run_dir import read_run_config


def export_model(path: str, step: int | None, out: Path, dtype: str, encoder_only: bool) -> str:
    """Write the model in `path`, a run (at the checkpoint of `step`, if given) or a model
    directory, to the new directory `out`. → the name of its class.

    dtype: float32, float16, bfloat16 or auto, the type that the model is stored in. Raises
    UserError if `out` holds anything.
    """
    out = resolve_output_dir(out)
    loaded_model = load_model(path, heads=None, step=step)
    names = family(loaded_model.model).HF_NAMES[loaded_model.model.model_type]
    if encoder_only:
        keep_pooler = names.has_pooler and not (
            "classifier" in loaded_model.params and "pooler" in names.classifier_modules
        )
        parts = ["embeddings", "layers", *(["pooler"] if keep_pooler else [])]
        excluded = tuple(name for name in loaded_model.params if name not in parts)
        params = {name: part for name, part in loaded_model.params.items() if name in parts}
        passthrough = {
            key: value for key, value in loaded_model.passthrough.items() if key not in CLASSIFIER_KEYS
        }
        loaded_model = loaded_model._replace(
            params=params, labels=(), passthrough=passthrough, ignored=(*loaded_model.ignored, *excluded)
        )
    check_tokenizer(loaded_model)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_checkpoint(
        loaded_model.params,
        loaded_model.model,
        loaded_model.tokenizer,
        out,
        dtype=loaded_model.dtype if dtype == "auto" else dtype,
        labels=loaded_model.labels,
        passthrough=loaded_model.passthrough,
        card=_build_card(Path(path).expanduser(), loaded_model),
    )
    return names.architecture_name(
        [head for head in family(loaded_model.model).HEADS if head in loaded_model.params]
    )


def check_tokenizer(loaded_model: LoadedModel) -> None:
    """Say what is odd about it; the files are copied as they are. Raises UserError where the model lacks
    tokens that it gives."""
    if not has_tokenizer(loaded_model.tokenizer):
        print(f"{loaded_model.tokenizer}: no tokenizer, so none is written", file=sys.stderr)
        return
    try:
        size = len(load_vocabulary(loaded_model.tokenizer))
    except UserError as error:
        print(f"the tokenizer is copied unread: {error}", file=sys.stderr)
        return
    if loaded_model.model.vocab_size < size:
        raise UserError(
            f"{loaded_model.tokenizer}: vocab_size is {loaded_model.model.vocab_size}, expected at least its tokenizer's "
            f"{size}"
        )


def _build_card(path: Path, loaded_model: LoadedModel) -> str:
    """A run's own; of a directory its own too, as long as the model is what it describes."""
    heads = [head for head in family(loaded_model.model).HEADS if head in loaded_model.params]
    workdir = path.parent if path.name == "model" else path
    if (workdir / "run.json").exists():
        config = read_run_config(workdir)
        summary: dict[str, Any] = {}
        step = config.train.steps if loaded_model.step is None else loaded_model.step
        if (workdir / "summary.json").exists() and step == config.train.steps:
            summary = read_json(workdir / "summary.json")
        else:
            evaluations = [
                record for record in read_jsonl(workdir / "evaluations.jsonl") if record["step"] == step
            ]
            summary = {"held_out": evaluations[-1]} if evaluations else {}
        try:
            if summary:
                summary["held_out"] = restore_nans(summary["held_out"])
            return model_card.run_card(config, heads, summary, step)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{workdir}: summary.json or evaluations.jsonl is damaged ({type(error).__name__}: {error}), "
                "expected what dwt wrote"
            ) from None
    source_card = model_card.existing_card(loaded_model.tokenizer)
    has_modules = (
        loaded_model.tokenizer / "modules.json"
    ).exists()  # of sentence-transformers, which are not read
    if source_card and not (loaded_model.ignored or has_modules):
        return source_card
    tokenizer_exists = has_tokenizer(loaded_model.tokenizer)
    return model_card.directory_card(
        loaded_model.model, heads, _source_name(path), source_card, tokenizer=tokenizer_exists
    )


def _source_name(path: Path) -> str:
    """Of a directory; in the hub's cache, of the repository."""
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name
