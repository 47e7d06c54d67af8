"""`dwt export`: any model, run or directory, as a directory for PyTorch."""

from pathlib import Path
from typing import Any

from dwt_jax.convert import card, huggingface
from dwt_jax.convert.tables import FAMILIES, architecture
from dwt_jax.errors import UserError
from dwt_jax.model.functional import HEADS
from dwt_jax.train.metrics import read
from dwt_jax.train.workdir import Loaded, config_of, load_model, read_json


def export(path: str, step: int | None, out: Path, dtype: str, encoder_only: bool) -> str:
    """Write the model in `path`, a run (at the checkpoint of `step`, if given) or a model
    directory, to the new directory `out`. → the name of its class.

    dtype: float32, float16, bfloat16 or auto, the type that the model is stored in. Raises
    UserError if `out` holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} holds something, expected a new or empty directory")
    loaded = load_model(path, heads=None, step=step)
    if encoder_only:
        heads = [head for head in loaded.params if head in HEADS and head != "pooler"]
        loaded = loaded._replace(params={k: v for k, v in loaded.params.items() if k not in heads}, labels=())
    out.parent.mkdir(parents=True, exist_ok=True)
    huggingface.save(
        loaded.params,
        loaded.model,
        loaded.tokenizer,
        out,
        dtype=loaded.dtype if dtype == "auto" else dtype,
        labels=loaded.labels,
        card=_card(Path(path), loaded),
    )
    heads = [head for head in HEADS if head in loaded.params]
    return architecture(FAMILIES[loaded.model.model_type], heads)


def _card(path: Path, loaded: Loaded) -> str:
    heads = [head for head in HEADS if head in loaded.params]
    own = loaded.tokenizer / "README.md"
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
        return card.of_run(config, heads, summary, step)
    if own.is_file():
        return own.read_text(encoding="utf-8", errors="replace")
    return card.of_directory(loaded.model, heads, path.absolute().name)
