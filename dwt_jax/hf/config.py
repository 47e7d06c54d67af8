"""A model directory's `config.json`, in both directions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from dwt_jax.config import Model, model_problems
from dwt_jax.config_loader import scalar
from dwt_jax.data.hf_tokenizer import AS_IT_IS
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import present, read_object
from dwt_jax.hf.names import FAMILIES, REQUIRED, architecture

OF_CLASSIFIERS = ("problem_type", "classifier_dropout", "seq_classif_dropout")
KEPT = (*OF_CLASSIFIERS, "bos_token_id", "eos_token_id", "tokenizer_class")
"""Keys that say nothing here, and something to transformers: they are handed on."""


class Said(NamedTuple):
    """What a `config.json` says."""

    model: Model
    labels: tuple[str, ...]
    classes: tuple[str, ...]  # 'BertForMaskedLM', …; () where it does not say
    kept: dict[str, Any]


def model_config(
    model: Model, heads: Sequence[str] = ("mlm",), labels: Sequence[str] = (), dtype: str = "float32"
) -> dict[str, Any]:
    """What `config.json` of the directory says."""
    family = FAMILIES[model.model_type]
    config: dict[str, Any] = {
        "architectures": [architecture(family, heads)],
        "model_type": model.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in family.fields.items()},
        "dtype": dtype,
    }
    if labels:
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config


def load_config(path: Path, names: Sequence[str] = ()) -> Said:
    """What the `config.json` of a model directory says; what it leaves out means what it means in
    transformers. names: of the tensors, which tell the family where an old config.json does not.

    Raises UserError naming the key and value of whatever is not supported.
    """
    where = path / "config.json"
    found = read_object(where, "a Hugging Face model config")
    guessed = not found.get("model_type")
    kind = _guess_family(names) if guessed else found["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES) if kind else f", expected one of {', '.join(FAMILIES)}"
        raise UserError(f"{where}: model_type is {kind!r}{hint}")
    for key, allowed in REQUIRED.items():
        if found.get(key) is not None and found[key] not in allowed:
            expected = f"{allowed[0]!r}" if allowed else "none: quantised weights are not read"
            raise UserError(f"{where}: {key} is {found[key]!r}, expected {expected}")
    classes = found.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: architectures is {classes!r}, expected a list of names")
    kept = {key: found[key] for key in KEPT if found.get(key) is not None}
    for key in ("tokenizer_class", "problem_type"):
        if not isinstance(kept.get(key, ""), str):
            raise UserError(f"{where}: {key} is {kept[key]!r}, expected a name")
    if guessed and present(path / "tokenizer.json"):
        # Without a model_type transformers takes that file as it is; with one it would build another.
        kept.setdefault("tokenizer_class", AS_IT_IS)
    return Said(_sizes(found, kind, where), _labels(found, where), tuple(classes), kept)


def _sizes(found: Mapping[str, Any], kind: str, where: Path) -> Model:
    family, hints = FAMILIES[kind], get_type_hints(Model)
    given = {ours: found[key] for ours, key in family.fields.items() if key in found}
    if given.get("pad_token_id", 0) is None:
        del given["pad_token_id"]
    try:
        given = {ours: scalar(hints[ours], value, family.fields[ours]) for ours, value in given.items()}
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None
    model = Model(**{"model_type": kind, **family.defaults, **given})
    for problem in model_problems(model):
        raise UserError(f"{where}: {problem}")
    return model


def _guess_family(names: Sequence[str]) -> str | None:
    return next(
        (kind for kind, family in FAMILIES.items() if any(n.startswith(family.prefix) for n in names)), None
    )


def _labels(config: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    found = config.get("id2label")
    if not found:
        return ()
    try:
        numbered = {int(key): str(label) for key, label in found.items()}
        return tuple(numbered[i] for i in range(len(found)))
    except (AttributeError, TypeError, ValueError, KeyError):
        shown = str(found)[:200]
        raise UserError(f"{where}: id2label is {shown}, expected an object of names by 0, 1, …") from None
