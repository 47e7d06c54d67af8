"""A model directory in Hugging Face's layout ↔ (params, ModelConfig), on top of two tables.

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

from dwt_jax.data.tokenizer import copy_tokenizer_files
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir
from dwt_jax.hf.config import load_hf_config, to_hf_config
from dwt_jax.hf.tensor_files import Weights, open_weights
from dwt_jax.models import family
from dwt_jax.models.common.hf_names import HFNames
from dwt_jax.models.common.logical_axes import Axes, is_gate, path_name
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.gates import fold_gates

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The types that weights are written in."""


class HFCheckpoint(NamedTuple):
    """What a model directory holds."""

    params: Params  # host fp32 arrays: embeddings, layers and whatever heads there are
    model: ModelConfig
    labels: tuple[str, ...] = ()  # of the classifier, by its outputs; () without one
    dtype: str = "float32"  # that all weights are stored in; float32 where they are mixed
    ignored: tuple[str, ...] = ()  # tensors of heads that are not known here
    passthrough: Mapping[
        str, Any
    ] = {}  # what config.json says for transformers alone, see configuration.KEPT


# Arrays


def to_hf_tensors(params: Params, model: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors of the architecture that holds these parameters, by name."""
    import jax

    names, param_axes = family(model).HF_NAMES[model.model_type], family(model).param_axes(model)
    is_classifier = "classifier" in params
    bare = not any(head in params for head in family(model).HEADS if head != "pooler")
    bias_aliases = {target: name for name, target in names.aliases.items() if name.endswith("decoder.bias")}
    tensors: dict[str, np.ndarray] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, array = path_name(key_path), np.asarray(leaf)
        name = names.tensor_name(path, is_classifier)
        name = name.removeprefix(names.prefix) if bare else name
        axes = param_axes[path]
        if axes[0].name == "layer":
            for i, layer_array in enumerate(array):
                tensors[name.format(layer=i)] = _to_tensor(layer_array, axes[1:], model, dtype)
            continue
        tensors[name] = _to_tensor(array, axes, model, dtype)
        if name in bias_aliases and not model.tie_word_embeddings:  # there the decoder has a bias of its own
            tensors[bias_aliases[name]] = tensors[name]
    return tensors


def _to_tensor(array: np.ndarray, axes: Axes, model: ModelConfig, dtype: str) -> np.ndarray:
    if axes[0].name == "vocab":
        array = array[: model.vocab_size]
    elif any(axis.fan == "in" for axis in axes):
        inputs = [n for n, axis in zip(array.shape, axes, strict=True) if axis.fan == "in"]
        array = array.reshape(int(np.prod(inputs)), -1).T
    elif all(axis.fan == "out" for axis in axes):
        array = array.reshape(-1)
    with np.errstate(over="ignore"):  # `save_checkpoint` complains of what does not fit
        return np.ascontiguousarray(array, DTYPES[dtype])


def _from_tensor(tensor: np.ndarray, axes: Axes, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse, in fp32; `axes` and `shape` without the layer axis."""
    with np.errstate(over="ignore"):  # of float64; `from_hf_tensors` complains of what does not fit
        tensor = tensor.astype(np.float32)
    if axes[0].name == "vocab":
        return np.pad(tensor, [(0, shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
    return (tensor.T if any(axis.fan == "in" for axis in axes) else tensor).reshape(shape)


def _tensor_shape(shape: tuple[int, ...], axes: Axes, model: ModelConfig) -> tuple[int, ...]:
    if axes[0].name == "vocab":
        return (model.vocab_size, *shape[1:])
    sizes_by_fan = {
        fan: [n for n, a in zip(shape, axes, strict=True) if a.fan == fan] for fan in ("out", "in", "")
    }
    if sizes_by_fan["in"]:
        return int(np.prod(sizes_by_fan["out"])), int(np.prod(sizes_by_fan["in"]))
    return shape if sizes_by_fan[""] else (int(np.prod(shape)),)


def from_hf_tensors(
    tensors: Weights,
    model: ModelConfig,
    location: str,
    labels: Sequence[str] = (),
    architectures: Sequence[str] = (),
) -> HFCheckpoint:
    """Parameters (host fp32 arrays) from the tensors of any architecture of the family.

    classes: what config.json calls the model, if it says. Raises UserError naming every missing,
    unexpected and mismatched tensor at once.
    """
    import jax

    names, param_axes = family(model).HF_NAMES[model.model_type], family(model).param_axes(model)
    _require_plausible(tensors, model, location)
    file_names, problems = _canonical_names(tensors, names)
    model = dataclasses.replace(model, tie_word_embeddings=_is_tied(tensors, file_names, model, names))
    heads = _detect_heads(file_names, model, architectures)
    is_classifier = "classifier" in heads
    outputs = names.tensor_name("classifier/bias", is_classifier)
    count = int(np.prod(tensors.shape(file_names[outputs]))) if outputs in file_names else max(len(labels), 1)
    dtypes: set[str] = set()
    used_names: set[str] = set()

    def leaf(path: tuple[Any, ...], abstract_leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        layered, axes = param_axes[name][0].name == "layer", param_axes[name]
        shape, axes = (abstract_leaf.shape[1:], axes[1:]) if layered else (abstract_leaf.shape, axes)
        expected = _tensor_shape(shape, axes, model)
        arrays = []
        for i in range(abstract_leaf.shape[0] if layered else 1):
            tensor_name = names.tensor_name(name, is_classifier).format(layer=i)
            used_names.add(tensor_name)
            if tensor_name not in file_names:
                problems.append(f"missing {tensor_name} {list(expected)}")
                continue
            key = file_names[tensor_name]
            tensor_shape, kind = tensors.shape(key), np.dtype(tensors.dtype(key)).name
            if tensor_shape != expected:
                problems.append(f"{key} is {list(tensor_shape)}, expected {list(expected)}")
            elif kind not in (*DTYPES, "float64"):
                problems.append(f"{key} holds {kind}, expected floats")
            elif not problems:
                dtypes.add(kind)
                arrays.append(_from_tensor(tensors[key], axes, shape))
                if not np.isfinite(arrays[-1]).all():
                    problems.append(f"{key} holds numbers that are not finite, expected finite ones")
        if problems:
            return np.zeros(())
        return np.stack(arrays) if layered else arrays[0]

    params = jax.tree_util.tree_map_with_path(leaf, family(model).abstract_params(model, heads, count))
    unused = sorted(set(file_names) - used_names)
    unused_pooler = (
        tuple(names.tensor_name(f"pooler/{leaf}") for leaf in ("kernel", "bias")) if is_classifier else ()
    )
    problems += [
        f"unexpected {file_names[name]}"
        for name in unused
        if name.startswith(names.prefix) and name not in unused_pooler  # some classifiers have two
    ]
    if problems:
        raise UserError(f"{location}: {'; '.join(problems)}")
    labels = tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))
    if "classifier" in heads and len(labels) != count:
        raise UserError(
            f"{location}: {outputs} has {count} outputs, expected {len(labels)} as config.json's id2label"
        )
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return HFCheckpoint(
        params=params,
        model=model,
        labels=labels if "classifier" in heads else (),
        dtype=dtype if dtype in DTYPES else "float32",
        ignored=tuple(file_names[name] for name in unused),
    )


def _require_plausible(tensors: Weights, model: ModelConfig, location: str) -> None:
    """No size beyond what the file could hold: the rest would be as long as the config says."""
    num_elements = sum(math.prod(tensors.shape(name)) for name in tensors)
    for field in dataclasses.fields(model):
        size = getattr(model, field.name)
        if type(size) is int and size > max(num_elements, 10**6):
            raise UserError(f"{location}: {num_elements} numbers, too few for a {field.name} of {size}")
    if model.num_hidden_layers > len(tensors):
        raise UserError(
            f"{location}: {len(tensors)} tensors, too few for num_hidden_layers of {model.num_hidden_layers}"
        )


def _canonical_names(tensors: Weights, names: HFNames) -> tuple[dict[str, str], list[str]]:
    """({name in the table: name in the file}, complaints about tensors that are there twice)"""
    file_names: dict[str, str] = {}
    problems = []
    for key in tensors:
        name = names.canonical_tensor_name(key)
        if name.endswith(names.buffers):
            continue
        if name in file_names:
            problems.append(f"{file_names[name]} and {key} are the same tensor")
        file_names[name] = key
    for alias, name in names.aliases.items():  # of the two biases transformers uses the decoder's
        if alias in file_names:
            file_names[name] = file_names.pop(alias)
    return file_names, problems


def _is_tied(tensors: Weights, file_names: dict[str, str], model: ModelConfig, names: HFNames) -> bool:
    """Whether the decoder is the word table, as transformers decides it: it is not where the file
    has both and they differ, whatever config.json says. A spare copy is dropped from `stored`."""
    word, decoder = (
        names.tensor_name("embeddings/word/embedding"),
        names.tensor_name("mlm/decoder/embedding"),
    )
    if decoder not in file_names or not model.tie_word_embeddings:
        return model.tie_word_embeddings
    if word not in file_names:
        file_names[word] = file_names.pop(decoder)
        return True
    a, b = (np.asarray(tensors[file_names[name]], np.float32) for name in (word, decoder))
    if not np.array_equal(a, b, equal_nan=True):
        return False
    del file_names[decoder]
    return True


def _detect_heads(
    file_names: Mapping[str, str], model: ModelConfig, architectures: Sequence[str]
) -> tuple[str, ...]:
    """The heads of which the file has a tensor.

    A classifier is one of sequences only: behind a pooler, and not of tokens or choices, whose
    classes call theirs the same.
    """
    names = family(model).HF_NAMES[model.model_type]

    def has_head(head: str, is_classifier: bool) -> bool:
        paths = [
            path
            for path in family(model).param_axes(model)
            if path.split("/")[0] == head and path.rpartition("/")[0] in names.modules and not is_gate(path)
        ]
        return any(names.tensor_name(path, is_classifier) in file_names for path in paths)

    is_sequence_model = not any(
        name.endswith(("ForTokenClassification", "ForMultipleChoice")) for name in architectures
    )
    is_classifier = is_sequence_model and has_head("classifier", True) and has_head("pooler", True)
    heads = []
    for head in family(model).HEADS:
        if head == "classifier" and not is_classifier:
            continue
        if head == "pooler" and not is_classifier and not names.has_pooler:
            continue
        if has_head(head, is_classifier):
            heads.append(head)
    return tuple(heads)


# Directories


def load_checkpoint(path: Path) -> HFCheckpoint:
    """What a model directory of a registered family holds, with any of its HEADS.

    Raises UserError, in one line, for whatever is damaged, unsupported or incomplete.
    """
    tensors = open_weights(path)
    config = load_hf_config(path, list(tensors))
    checkpoint = from_hf_tensors(
        tensors, config.model, str(tensors.path), config.labels, config.architectures
    )
    return checkpoint._replace(passthrough=config.passthrough)


def save_checkpoint(
    params: Params,
    model: ModelConfig,
    tokenizer: Path,
    out: Path,
    *,
    dtype: str = "float32",
    labels: Sequence[str] = (),
    passthrough: Mapping[str, Any] = {},
    card: str = "",
) -> None:
    """Write the directory whole or not at all: config.json, model.safetensors, the files of the
    `tokenizer` directory and the model card. An `out` of an earlier call is replaced.

    kept: further keys of config.json, such as problem_type (see config.PASSTHROUGH_KEYS).

    Raises UserError if a number does not fit `dtype`, and where weights of norms or gates of layers
    are not annealed to 1 yet.
    """
    from safetensors.numpy import save_file

    params, model = fold_gates(params, model)
    heads = [head for head in family(model).HEADS if head in params]
    tensors = to_hf_tensors(params, model, dtype)
    if dtype == "float16":
        _require_finite(tensors, out)
    with atomic_dir(out) as partial:
        copy_tokenizer_files(tokenizer, partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = {**to_hf_config(model, heads, labels, dtype), **passthrough}
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
