"""`dwt export`: any model, run or directory, as a directory for PyTorch."""

import sys
from pathlib import Path
from typing import Any

from dwt_jax.data.tokenizer import has_tokenizer, vocabulary
from dwt_jax.errors import UserError
from dwt_jax.files import new_place
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.hf.config import OF_CLASSIFIERS
from dwt_jax.hf.names import FAMILIES, architecture
from dwt_jax.models.bert import HEADS
from dwt_jax.runs.metric_writer import measured, read
from dwt_jax.runs.run_dir import Loaded, config_of, load_model, read_json


def export(path: str, step: int | None, out: Path, dtype: str, encoder_only: bool) -> str:
    """Write the model in `path`, a run (at the checkpoint of `step`, if given) or a model
    directory, to the new directory `out`. → the name of its class.

    dtype: float32, float16, bfloat16 or auto, the type that the model is stored in. Raises
    UserError if `out` holds anything.
    """
    out = new_place(out)
    loaded = load_model(path, heads=None, step=step)
    family = FAMILIES[loaded.model.model_type]
    if encoder_only:
        keeps = family.pools and not ("classifier" in loaded.params and "pooler" in family.classifying)
        parts = ["embeddings", "layers", *(["pooler"] if keeps else [])]
        dropped = tuple(name for name in loaded.params if name not in parts)
        params = {name: part for name, part in loaded.params.items() if name in parts}
        kept = {key: value for key, value in loaded.kept.items() if key not in OF_CLASSIFIERS}
        loaded = loaded._replace(params=params, labels=(), kept=kept, ignored=(*loaded.ignored, *dropped))
    look_at_tokenizer(loaded)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(
        loaded.params,
        loaded.model,
        loaded.tokenizer,
        out,
        dtype=loaded.dtype if dtype == "auto" else dtype,
        labels=loaded.labels,
        kept=loaded.kept,
        card=_card(Path(path).expanduser(), loaded),
    )
    return architecture(family, [head for head in HEADS if head in loaded.params])


def look_at_tokenizer(loaded: Loaded) -> None:
    """Say what is odd about it; the files are copied as they are. Raises UserError where the model lacks
    tokens that it gives."""
    if not has_tokenizer(loaded.tokenizer):
        print(f"{loaded.tokenizer}: no tokenizer, so none is written", file=sys.stderr)
        return
    try:
        size = len(vocabulary(loaded.tokenizer))
    except UserError as error:
        print(f"the tokenizer is copied unread: {error}", file=sys.stderr)
        return
    if loaded.model.vocab_size < size:
        raise UserError(
            f"{loaded.tokenizer}: vocab_size is {loaded.model.vocab_size}, expected at least its tokenizer's "
            f"{size}"
        )


def _card(path: Path, loaded: Loaded) -> str:
    """A run's own; of a directory its own too, as long as the model is what it describes."""
    heads = [head for head in HEADS if head in loaded.params]
    workdir = path.parent if path.name == "model" else path
    if (workdir / "run.json").exists():
        config = config_of(workdir)
        summary: dict[str, Any] = {}
        step = config.train.steps if loaded.step is None else loaded.step
        if (workdir / "summary.json").exists() and step == config.train.steps:
            summary = read_json(workdir / "summary.json")
        else:
            found = [record for record in read(workdir / "evaluations.jsonl") if record["step"] == step]
            summary = {"held_out": found[-1]} if found else {}
        try:
            if summary:
                summary["held_out"] = measured(summary["held_out"])
            return model_card.of_run(config, heads, summary, step)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{workdir}: summary.json or evaluations.jsonl is damaged ({type(error).__name__}: {error}), "
                "expected what dwt wrote"
            ) from None
    theirs = model_card.of_its_own(loaded.tokenizer)
    modules = (loaded.tokenizer / "modules.json").exists()  # of sentence-transformers, which are not read
    if theirs and not (loaded.ignored or modules):
        return theirs
    tokens = has_tokenizer(loaded.tokenizer)
    return model_card.of_directory(loaded.model, heads, _name(path), theirs, tokenizer=tokens)


def _name(path: Path) -> str:
    """Of a directory; in the hub's cache, of the repository."""
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.name
