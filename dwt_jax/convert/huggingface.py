"""A model directory in Hugging Face's layout ↔ (params, Model), on top of two tables.

tables.py pairs the names; the role table says how a leaf is stored there: a kernel is
[out, in] with heads flattened, a layer axis is one tensor a layer, the padding of the
vocabulary is cut off.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import ml_dtypes
import numpy as np

from dwt_jax.config import Model, model_problems
from dwt_jax.config_file import scalar
from dwt_jax.convert.tables import BUFFERS, FAMILIES, REQUIRED, Family, architecture, canonical
from dwt_jax.convert.weights import Weights, open_weights
from dwt_jax.data.tokenizer import copy_files
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import building
from dwt_jax.model.annealing import settled
from dwt_jax.model.functional import HEADS, Params, abstract
from dwt_jax.model.roles import ROLES, annealed, path_name

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The types that weights are written in."""


class Checkpoint(NamedTuple):
    """What a model directory holds."""

    params: Params  # host fp32 arrays: embeddings, layers and whatever heads there are
    model: Model
    labels: tuple[str, ...]  # of the classifier, by its outputs; () without one
    dtype: str  # that all weights are stored in; float32 where they are mixed
    ignored: tuple[str, ...]  # tensors of heads that are not known here


# Arrays


def to_tensors(params: Params, model: Model, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors of the architecture that holds these parameters, by name."""
    import jax

    family, classifying = FAMILIES[model.model_type], "classifier" in params
    bare = not any(head in params for head in HEADS if head != "pooler")
    twins = {target: name for name, target in family.aliases.items() if name.endswith("decoder.bias")}
    tensors: dict[str, np.ndarray] = {}
    for place, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, array = path_name(place), np.asarray(leaf)
        name = family.tensor(path, classifying)
        name = name.removeprefix(family.prefix) if bare else name
        if ROLES[path][0].name == "layer":
            for i, one in enumerate(array):
                tensors[name.format(layer=i)] = _to_tensor(one, path, model, dtype)
            continue
        tensors[name] = _to_tensor(array, path, model, dtype)
        if name in twins and not model.tie_word_embeddings:  # there the decoder has a bias of its own
            tensors[twins[name]] = tensors[name]
    return tensors


def _axes(path: str) -> list[Any]:
    return [axis for axis in ROLES[path] if axis.name != "layer"]


def _to_tensor(array: np.ndarray, path: str, model: Model, dtype: str) -> np.ndarray:
    axes = _axes(path)
    if axes[0].name == "vocab":
        array = array[: model.vocab_size]
    elif any(axis.side == "in" for axis in axes):
        inputs = [n for n, axis in zip(array.shape, axes, strict=True) if axis.side == "in"]
        array = array.reshape(int(np.prod(inputs)), -1).T
    elif all(axis.side == "out" for axis in axes):
        array = array.reshape(-1)
    with np.errstate(over="ignore"):  # `save` complains of what does not fit
        return np.ascontiguousarray(array, DTYPES[dtype])


def _from_tensor(tensor: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse, in fp32; `shape` without the layer axis."""
    axes, tensor = _axes(path), tensor.astype(np.float32)
    if axes[0].name == "vocab":
        return np.pad(tensor, [(0, shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
    return (tensor.T if any(axis.side == "in" for axis in axes) else tensor).reshape(shape)


def _tensor_shape(shape: tuple[int, ...], path: str, model: Model) -> tuple[int, ...]:
    axes = _axes(path)
    if axes[0].name == "vocab":
        return (model.vocab_size, *shape[1:])
    sides = {
        side: [n for n, a in zip(shape, axes, strict=True) if a.side == side] for side in ("out", "in", "")
    }
    if sides["in"]:
        return int(np.prod(sides["out"])), int(np.prod(sides["in"]))
    return shape if sides[""] else (int(np.prod(shape)),)


def from_tensors(tensors: Weights, model: Model, where: str, labels: Sequence[str] = ()) -> Checkpoint:
    """Parameters (host fp32 arrays) from the tensors of any architecture of the family.

    Raises UserError naming every missing, unexpected and mismatched tensor at once.
    """
    import jax

    family = FAMILIES[model.model_type]
    _require_plausible(tensors, model, where)
    stored, wrong = _canonical_names(tensors, family)
    model = dataclasses.replace(model, tie_word_embeddings=_tied(tensors, stored, model, family))
    classifying = any(name.startswith("classifier.") for name in stored)
    heads = _heads(stored, family, classifying)
    outputs = family.tensor("classifier/bias", classifying)
    count = int(np.prod(tensors.shape(stored[outputs]))) if outputs in stored else max(len(labels), 1)
    types: set[str] = set()
    used: set[str] = set()

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        layered = ROLES[name][0].name == "layer"
        shape = like.shape[1:] if layered else like.shape
        expected = _tensor_shape(shape, name, model)
        arrays = []
        for i in range(like.shape[0] if layered else 1):
            wanted = family.tensor(name, classifying).format(layer=i)
            used.add(wanted)
            if wanted not in stored:
                wrong.append(f"missing {wanted} {list(expected)}")
                continue
            key = stored[wanted]
            found, kind = tensors.shape(key), np.dtype(tensors.dtype(key)).name
            if found != expected:
                wrong.append(f"{key} is {list(found)}, expected {list(expected)}")
            elif kind not in (*DTYPES, "float64"):
                wrong.append(f"{key} holds {kind}, expected floats")
            elif not wrong:
                types.add(kind)
                arrays.append(_from_tensor(tensors[key], name, shape))
        if wrong:
            return np.zeros(())
        return np.stack(arrays) if layered else arrays[0]

    params = jax.tree_util.tree_map_with_path(leaf, abstract(model, heads, count))
    spare = sorted(set(stored) - used)
    wrong += [f"unexpected {stored[name]}" for name in spare if name.startswith(family.prefix)]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
    names = tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))
    if "classifier" in heads and len(names) != count:
        raise UserError(
            f"{where}: {outputs} has {count} outputs, expected {len(names)} as config.json's id2label"
        )
    dtype = types.pop() if len(types) == 1 else "float32"
    return Checkpoint(
        params=params,
        model=model,
        labels=names if "classifier" in heads else (),
        dtype=dtype if dtype in DTYPES else "float32",
        ignored=tuple(stored[name] for name in spare),
    )


def _require_plausible(tensors: Weights, model: Model, where: str) -> None:
    """No size beyond what the file could hold: the rest would be as long as the config says."""
    numbers = sum(math.prod(tensors.shape(name)) for name in tensors)
    for field in dataclasses.fields(model):
        size = getattr(model, field.name)
        if type(size) is int and size > max(numbers, 10**6):
            raise UserError(f"{where}: {numbers} numbers, too few for a {field.name} of {size}")
    if model.num_hidden_layers > len(tensors):
        raise UserError(
            f"{where}: {len(tensors)} tensors, too few for num_hidden_layers of {model.num_hidden_layers}"
        )


def _canonical_names(tensors: Weights, family: Family) -> tuple[dict[str, str], list[str]]:
    """({name in the table: name in the file}, complaints about tensors that are there twice)"""
    stored: dict[str, str] = {}
    twice = []
    for key in tensors:
        name = canonical(key, family)
        if name.endswith(BUFFERS):
            continue
        if name in stored:
            twice.append(f"{stored[name]} and {key} are the same tensor")
        stored[name] = key
    for second, name in family.aliases.items():  # of the two biases transformers uses the decoder's
        if second in stored:
            stored[name] = stored.pop(second)
    return stored, twice


def _tied(tensors: Weights, stored: dict[str, str], model: Model, family: Family) -> bool:
    """Whether the decoder is the word table, as transformers decides it: it is not where the file
    has both and they differ, whatever config.json says. A spare copy is dropped from `stored`."""
    word, decoder = family.tensor("embeddings/word/embedding"), family.tensor("mlm/decoder/embedding")
    if decoder not in stored or not model.tie_word_embeddings:
        return model.tie_word_embeddings
    if word not in stored:
        stored[word] = stored.pop(decoder)
        return True
    a, b = tensors[stored[word]], tensors[stored[decoder]]
    if a.shape != b.shape or a.tobytes() != b.tobytes():
        return False
    del stored[decoder]
    return True


def _heads(stored: Mapping[str, str], family: Family, classifying: bool) -> tuple[str, ...]:
    """The heads of which the file has a tensor."""
    found = []
    for head in HEADS:
        paths = [
            path
            for path in ROLES
            if path.split("/")[0] == head and path.rpartition("/")[0] in family.modules and not annealed(path)
        ]
        if any(family.tensor(path, classifying) in stored for path in paths):
            found.append(head)
    return tuple(found)


# config.json


def model_config(model: Model, heads: Sequence[str] = ("mlm",), labels: Sequence[str] = (), dtype="float32"):
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
        config["problem_type"] = "regression" if len(labels) == 1 else "single_label_classification"
    return config


def load_config(path: Path, names: Sequence[str] = ()) -> tuple[Model, tuple[str, ...]]:
    """(sizes, labels) that the `config.json` of a model directory gives; what it leaves out means
    what it means in transformers. names: of the tensors, which tell the family where an old
    config.json does not.

    Raises UserError naming the key and value of whatever is not supported.
    """
    where = path / "config.json"
    try:
        found = json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {error}, expected a Hugging Face model config") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds a JSON {type(found).__name__}, expected an object")
    kind = found.get("model_type") or _guess_family(names)
    if kind not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES) if kind else f", expected one of {', '.join(FAMILIES)}"
        raise UserError(f"{where}: model_type is {kind!r}{hint}")
    for key, allowed in REQUIRED.items():
        if found.get(key) is not None and found[key] not in allowed:
            expected = f"{allowed[0]!r}" if allowed else "none: quantised weights are not read"
            raise UserError(f"{where}: {key} is {found[key]!r}, expected {expected}")
    family, hints = FAMILIES[kind], get_type_hints(Model)
    given = {ours: found[key] for ours, key in family.fields.items() if found.get(key) is not None}
    try:
        given = {ours: scalar(hints[ours], value, family.fields[ours]) for ours, value in given.items()}
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None
    model = Model(**{"model_type": kind, **family.defaults, **given})
    for problem in model_problems(model):
        raise UserError(f"{where}: {problem}")
    return model, _labels(found, where)


def _guess_family(names: Sequence[str]) -> str | None:
    return next(
        (kind for kind, family in FAMILIES.items() if any(n.startswith(family.prefix) for n in names)), None
    )


def _labels(config: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    found = config.get("id2label")
    if not found:
        return ()
    try:
        return tuple(str(found[key]) for key in sorted(found, key=int))
    except (TypeError, ValueError):
        raise UserError(f"{where}: id2label is {found!r}, expected an object of names by number") from None


# Directories


def load(path: Path) -> Checkpoint:
    """What a model directory holds: BERT, DistilBERT or RoBERTa, with any of HEADS.

    Raises UserError, in one line, for whatever is damaged, unsupported or incomplete.
    """
    tensors = open_weights(path)
    model, labels = load_config(path, list(tensors))
    return from_tensors(tensors, model, str(tensors.where), labels)


def save(
    params: Params,
    model: Model,
    tokenizer: Path,
    out: Path,
    *,
    dtype: str = "float32",
    labels: Sequence[str] = (),
    card: str = "",
) -> None:
    """Write the directory whole or not at all: config.json, model.safetensors, the files of the
    `tokenizer` directory and the model card. An `out` of an earlier call is replaced.

    Raises UserError if a number does not fit `dtype`, and where weights of norms or gates of layers
    are not annealed to 1 yet.
    """
    from safetensors.numpy import save_file

    params, model = settled(params, model)
    heads = [head for head in HEADS if head in params]
    tensors = to_tensors(params, model, dtype)
    if dtype == "float16":
        _require_finite(tensors, out)
    with building(out) as partial:
        copy_files(tokenizer, partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = model_config(model, heads, labels, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # written for the owner alone
        if card:
            (partial / "README.md").write_text(card)
        if not out.exists():
            partial.rename(out)
            return
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)


def _require_finite(tensors: Mapping[str, np.ndarray], out: Path) -> None:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{out}: {name} does not fit float16 (up to 65504), expected bfloat16 or float32")
