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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dwt_jax.config import Model
from dwt_jax.data.tokenizer import copy_files
from dwt_jax.errors import UserError
from dwt_jax.files import building
from dwt_jax.hf.config import load_config, model_config
from dwt_jax.hf.names import BUFFERS, FAMILIES, Family, canonical
from dwt_jax.hf.tensor_files import Weights, open_weights
from dwt_jax.models.bert import HEADS, Params, abstract
from dwt_jax.models.common.logical_axes import ROLES, annealed, path_name
from dwt_jax.remap.gates import settled

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
    labels: tuple[str, ...] = ()  # of the classifier, by its outputs; () without one
    dtype: str = "float32"  # that all weights are stored in; float32 where they are mixed
    ignored: tuple[str, ...] = ()  # tensors of heads that are not known here
    kept: Mapping[str, Any] = {}  # what config.json says for transformers alone, see configuration.KEPT


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
    with np.errstate(over="ignore"):  # of float64; `from_tensors` complains of what does not fit
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


def from_tensors(
    tensors: Weights, model: Model, where: str, labels: Sequence[str] = (), classes: Sequence[str] = ()
) -> Checkpoint:
    """Parameters (host fp32 arrays) from the tensors of any architecture of the family.

    classes: what config.json calls the model, if it says. Raises UserError naming every missing,
    unexpected and mismatched tensor at once.
    """
    import jax

    family = FAMILIES[model.model_type]
    _require_plausible(tensors, model, where)
    stored, wrong = _canonical_names(tensors, family)
    model = dataclasses.replace(model, tie_word_embeddings=_tied(tensors, stored, model, family))
    heads = _heads(stored, family, classes)
    classifying = "classifier" in heads
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
                if not np.isfinite(arrays[-1]).all():
                    wrong.append(f"{key} holds numbers that are not finite, expected finite ones")
        if wrong:
            return np.zeros(())
        return np.stack(arrays) if layered else arrays[0]

    params = jax.tree_util.tree_map_with_path(leaf, abstract(model, heads, count))
    spare = sorted(set(stored) - used)
    unread = tuple(family.tensor(f"pooler/{leaf}") for leaf in ("kernel", "bias")) if classifying else ()
    wrong += [
        f"unexpected {stored[name]}"
        for name in spare
        if name.startswith(family.prefix) and name not in unread  # a RoBERTa that classifies has two
    ]
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
    a, b = (np.asarray(tensors[stored[name]], np.float32) for name in (word, decoder))
    if not np.array_equal(a, b, equal_nan=True):
        return False
    del stored[decoder]
    return True


def _heads(stored: Mapping[str, str], family: Family, classes: Sequence[str]) -> tuple[str, ...]:
    """The heads of which the file has a tensor.

    A classifier is one of sequences only: behind a pooler, and not of tokens or choices, whose
    classes call theirs the same.
    """

    def there(head: str, classifying: bool) -> bool:
        paths = [
            path
            for path in ROLES
            if path.split("/")[0] == head and path.rpartition("/")[0] in family.modules and not annealed(path)
        ]
        return any(family.tensor(path, classifying) in stored for path in paths)

    of_sequences = not any(name.endswith(("ForTokenClassification", "ForMultipleChoice")) for name in classes)
    classifying = of_sequences and there("classifier", True) and there("pooler", True)
    found = []
    for head in HEADS:
        if head == "classifier" and not classifying:
            continue
        if head == "pooler" and not classifying and not family.pools:
            continue
        if there(head, classifying):
            found.append(head)
    return tuple(found)


# Directories


def load(path: Path) -> Checkpoint:
    """What a model directory holds: BERT, DistilBERT or RoBERTa, with any of HEADS.

    Raises UserError, in one line, for whatever is damaged, unsupported or incomplete.
    """
    tensors = open_weights(path)
    said = load_config(path, list(tensors))
    found = from_tensors(tensors, said.model, str(tensors.where), said.labels, said.classes)
    return found._replace(kept=said.kept)


def save(
    params: Params,
    model: Model,
    tokenizer: Path,
    out: Path,
    *,
    dtype: str = "float32",
    labels: Sequence[str] = (),
    kept: Mapping[str, Any] = {},
    card: str = "",
) -> None:
    """Write the directory whole or not at all: config.json, model.safetensors, the files of the
    `tokenizer` directory and the model card. An `out` of an earlier call is replaced.

    kept: further keys of config.json, such as problem_type (see configuration.KEPT).

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
        config = {**model_config(model, heads, labels, dtype), **kept}
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
