"""Export a model to a Hugging Face model directory (`dwt export`)."""

from pathlib import Path
from typing import Any

from dwt_jax.data.auto_tokenizer import UnsupportedTokenizerError
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.data.tokenizer_files import has_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, resolve_output_dir, user_path
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import CLASSIFIER_KEYS
from dwt_jax.hf.source_card import existing_card, source_name
from dwt_jax.logs import logger
from dwt_jax.models import family
from dwt_jax.runs.load import LoadedModel, load_model
from dwt_jax.runs.metrics_file import read_jsonl, restore_nans
from dwt_jax.runs.run_dir import read_run_config


def export_model(path: str, step: int | None, out: Path, dtype: str, encoder_only: bool) -> str:
    """Write a model to a new directory.

    Args:
        path: run directory or model directory.
        step: checkpoint of a run to read. None: the latest.
        out: directory to write.
        dtype: float32, float16, bfloat16, or auto (the dtype of the stored weights).
        encoder_only: whether to omit the heads.

    Returns:
        The name of the model's class in transformers.

    Raises:
        UserError: `out` is not empty, or the model cannot be read.
    """
    out = resolve_output_dir(out)
    loaded_model = load_model(path, heads="all", step=step)
    names = family(loaded_model.model).HF_NAMES[loaded_model.model.model_type]
    if encoder_only:
        keep_pooler = names.has_pooler and not (
            "classifier" in loaded_model.params and "pooler" in names.classifier_modules
        )
        parts = [*family(loaded_model.model).ENCODER_PARTS, *(["pooler"] if keep_pooler else [])]
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
        card=_build_card(user_path(path), loaded_model),
    )
    return names.architecture_name(
        [head for head in family(loaded_model.model).HEADS if head in loaded_model.params]
    )


def check_tokenizer(loaded_model: LoadedModel) -> None:
    """Log a warning if the files have no fast tokenizer; they are copied unchanged.

    Raises:
        UserError: the tokenizer is damaged, or larger than the model's vocabulary.
    """
    if not has_tokenizer(loaded_model.tokenizer):
        logger.warning(f"{loaded_model.tokenizer}: no tokenizer; none is written")
        return
    try:
        size = len(load_vocabulary(loaded_model.tokenizer))
    except UnsupportedTokenizerError as error:
        logger.warning(f"the tokenizer files are copied unchanged: {error}")
        return
    vocab_size = loaded_model.model.vocab_size
    if vocab_size < size:
        raise UserError(
            f"{loaded_model.tokenizer}: vocab_size is {vocab_size}, expected at least its tokenizer's {size}"
        )


def _build_card(path: Path, loaded_model: LoadedModel) -> str:
    """The card of a run or of a model directory. A card that describes the whole model is kept."""
    heads = [head for head in family(loaded_model.model).HEADS if head in loaded_model.params]
    workdir = path.parent if path.name == "model" else path
    if (workdir / "run.json").exists():
        config = read_run_config(workdir)
        step = config.train.steps if loaded_model.step is None else loaded_model.step
        summary = _read_summary(workdir, step, step == config.train.steps)
        try:
            if summary:
                summary["held_out"] = restore_nans(summary["held_out"])
            return model_card.run_card(config, heads, summary, step)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{workdir}: summary.json or evaluations.jsonl is damaged ({type(error).__name__}: {error}), "
                "expected what dwt wrote"
            ) from None
    source_card = existing_card(loaded_model.tokenizer)
    has_modules = (loaded_model.tokenizer / "modules.json").exists()
    if has_modules:
        logger.warning(
            f"{loaded_model.tokenizer}: omitted the modules of sentence-transformers (modules.json)"
        )
    if source_card and not (loaded_model.ignored or has_modules):
        return source_card
    tokenizer_exists = has_tokenizer(loaded_model.tokenizer)
    return model_card.directory_card(
        loaded_model.model, heads, source_name(path), source_card, tokenizer=tokenizer_exists
    )


def _read_summary(workdir: Path, step: int, is_last_step: bool) -> dict[str, Any]:
    """The run's summary.json, or for an unfinished run the evaluation at `step`, if there is one."""
    if is_last_step and (workdir / "summary.json").exists():
        return read_json(workdir / "summary.json")
    evaluations = [record for record in read_jsonl(workdir / "evaluations.jsonl") if record["step"] == step]
    return {"held_out": evaluations[-1]} if evaluations else {}
