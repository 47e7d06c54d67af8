"""Read and write model directories in Hugging Face's layout.

The family's HF_NAMES pair the names. The logical axes of a leaf determine its layout in the file: a kernel is
[out, in] with heads flattened, a layer axis is one tensor per layer, and the padding of the
vocabulary is cut off.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dwt_jax.data.tokenizer import copy_model_tokenizer, load_vocabulary
from dwt_jax.data.tokenizer_files import has_tokenizer
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_dir, commit_dir
from dwt_jax.hf.config import load_hf_config, to_hf_config
from dwt_jax.hf.tensor_files import Weights, open_weights
from dwt_jax.hf.tensor_names import (
    canonical_names,
    detect_heads,
    is_tied,
    require_layers,
    require_plausible_sizes,
)
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import Axes, init_value, path_name
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.gates import fold_gates

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes in which weights can be saved."""


class HFCheckpoint(NamedTuple):
    """The content of a model directory."""

    params: Params  # host fp32 arrays: embeddings, layers and the heads that the directory has
    model: ModelConfig
    labels: tuple[str, ...] = ()  # of the classifier, by its outputs; () without one
    dtype: str = "float32"  # of the stored weights; float32 if they are mixed
    ignored: tuple[str, ...] = ()  # names of tensors of unsupported heads
    passthrough: Mapping[str, Any] = {}  # see config.PASSTHROUGH_KEYS


# Arrays


def to_hf_tensors(params: Params, model: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return the tensors by name, as in the transformers class with these parameters.

    Args:
        params: host arrays.
        model: config of the model.
        dtype: a name in DTYPES.
    """
    import jax

    names, param_axes = family(model).HF_NAMES[model.model_type], family(model).param_axes(model)
    is_classifier = "classifier" in params
    bare = not any(head in params for head in family(model).HEADS if head != "pooler")
    bias_aliases = {target: name for name, target in names.aliases.items() if name.endswith("decoder.bias")}
    absent_names = [name.removeprefix(names.prefix) if bare else name for name in names.absent_tensors]
    tensors: dict[str, np.ndarray] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, array = path_name(key_path), np.asarray(leaf)
        name = names.tensor_name(path, is_classifier)
        name = name.removeprefix(names.prefix) if bare else name
        axes = param_axes[path]
        if axes[0].name == "layer":
            for i, layer_array in enumerate(array):
                layer_name = name.format(layer=i)
                if layer_name not in absent_names:
                    tensors[layer_name] = _to_tensor(layer_array, axes[1:], model, dtype)
            continue
        tensors[name] = _to_tensor(array, axes, model, dtype)
        if name in bias_aliases and not model.tie_word_embeddings:  # the decoder's second bias
            tensors[bias_aliases[name]] = tensors[name]
    for name, array in names.computed_tensors(model).items():
        tensors[name.removeprefix(names.prefix) if bare else name] = array.astype(DTYPES[dtype])
    return tensors


def _to_tensor(array: np.ndarray, axes: Axes, model: ModelConfig, dtype: str) -> np.ndarray:
    if axes[0].name == "vocab":
        array = array[: model.vocab_size]
    elif any(axis.fan == "in" for axis in axes):
        inputs = [n for n, axis in zip(array.shape, axes, strict=True) if axis.fan == "in"]
        array = array.reshape(int(np.prod(inputs)), -1).T
    elif all(axis.fan == "out" for axis in axes):
        array = array.reshape(-1)
    with np.errstate(over="ignore"):  # `save_checkpoint` refuses values that do not fit
        return np.ascontiguousarray(array, DTYPES[dtype])


def _from_tensor(tensor: np.ndarray, axes: Axes, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_to_tensor`, in fp32. `axes` and `shape` are without the layer axis."""
    with np.errstate(over="ignore"):  # of float64; `from_hf_tensors` refuses values that do not fit
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
        num_inputs = int(np.prod(sizes_by_fan["in"]))
        return int(np.prod(shape)) // num_inputs, num_inputs
    return shape if sizes_by_fan[""] else (int(np.prod(shape)),)


def from_hf_tensors(
    tensors: Weights,
    model: ModelConfig,
    location: str,
    labels: Sequence[str] = (),
    architectures: Sequence[str] = (),
) -> HFCheckpoint:
    """Return the parameters from the tensors of any transformers class of the family.

    Args:
        tensors: the tensors of the file.
        model: config of the model.
        location: path of the file, for messages.
        labels: names of the classifier's outputs, from config.json.
        architectures: names of the model's classes, from config.json.

    Raises:
        UserError: the message names every missing, unexpected and mismatched tensor.
    """
    import jax

    names = family(model).HF_NAMES[model.model_type]
    require_plausible_sizes(tensors, model, location)
    file_names, problems = canonical_names(tensors, names)
    require_layers(file_names, model, location)
    model = dataclasses.replace(model, tie_word_embeddings=is_tied(tensors, file_names, model, names))
    heads = detect_heads(file_names, model, architectures)
    is_classifier = "classifier" in heads
    weight = names.tensor_name("classifier/kernel", is_classifier)
    num_labels = tensors.shape(file_names[weight])[0] if weight in file_names else max(len(labels), 1)
    reader = _LeafReader(tensors, model, file_names, is_classifier, problems)
    params = jax.tree_util.tree_map_with_path(
        reader.read_leaf, family(model).abstract_params(model, heads, num_labels)
    )
    unused = sorted(set(file_names) - reader.used_names)
    unused_pooler: tuple[str, ...] = ()
    if is_classifier and "pooler" in names.modules:
        unused_pooler = tuple(names.tensor_name(f"pooler/{leaf}") for leaf in ("kernel", "bias"))
    problems += [
        f"unexpected {file_names[name]}"
        for name in unused
        if name.startswith(names.prefix) and name not in unused_pooler  # some classifiers have two
    ]
    if problems:
        raise UserError(f"{location}: {'; '.join(problems)}")
    labels = tuple(labels) or tuple(f"LABEL_{i}" for i in range(num_labels))
    if is_classifier and len(labels) != num_labels:
        raise UserError(
            f"{location}: {weight} has {num_labels} outputs, expected {len(labels)} as config.json's id2label"
        )
    dtype = reader.dtypes.pop() if len(reader.dtypes) == 1 else "float32"
    return HFCheckpoint(
        params=params,
        model=model,
        labels=labels if is_classifier else (),
        dtype=dtype if dtype in DTYPES else "float32",
        ignored=tuple(file_names[name] for name in unused),
    )


class _LeafReader:
    """Reads the leaves of the parameters, and collects the problems of all tensors in one message."""

    def __init__(
        self,
        tensors: Weights,
        model: ModelConfig,
        file_names: Mapping[str, str],
        is_classifier: bool,
        problems: list[str],
    ) -> None:
        self.tensors = tensors
        self.model = model
        self.file_names = file_names
        self.is_classifier = is_classifier
        self.problems = problems
        self.names = family(model).HF_NAMES[model.model_type]
        self.param_axes = family(model).param_axes(model)
        self.dtypes: set[str] = set()
        self.used_names: set[str] = set()

    def read_leaf(self, path: tuple[Any, ...], abstract_leaf: Any) -> np.ndarray:
        """Return one leaf in fp32, or a placeholder if there are problems."""
        name = path_name(path)
        layered, axes = self.param_axes[name][0].name == "layer", self.param_axes[name]
        shape, axes = (abstract_leaf.shape[1:], axes[1:]) if layered else (abstract_leaf.shape, axes)
        arrays = []
        for i in range(abstract_leaf.shape[0] if layered else 1):
            tensor_name = self.names.tensor_name(name, self.is_classifier).format(layer=i)
            if tensor_name in self.names.absent_tensors:
                arrays.append(np.full(shape, init_value(name), np.float32))
            elif (array := self._read_tensor(tensor_name, axes, shape)) is not None:
                arrays.append(array)
        if self.problems:
            return np.zeros(())
        return np.stack(arrays) if layered else arrays[0]

    def _read_tensor(self, tensor_name: str, axes: Axes, shape: tuple[int, ...]) -> np.ndarray | None:
        self.used_names.add(tensor_name)
        expected = _tensor_shape(shape, axes, self.model)
        if tensor_name not in self.file_names:
            self.problems.append(f"missing {tensor_name} {list(expected)}")
            return None
        key = self.file_names[tensor_name]
        tensor_shape, kind = self.tensors.shape(key), np.dtype(self.tensors.dtype(key)).name
        if tensor_shape != expected:
            self.problems.append(f"{key} is {list(tensor_shape)}, expected {list(expected)}")
        elif kind not in (*DTYPES, "float64"):
            self.problems.append(f"{key} holds {kind}, expected floats")
        elif not self.problems:
            self.dtypes.add(kind)
            array = _from_tensor(self.tensors[key], axes, shape)
            if not np.isfinite(array).all():
                self.problems.append(f"{key} holds numbers that are not finite, expected finite ones")
            return array
        return None


# Directories


def load_checkpoint(path: Path) -> HFCheckpoint:
    """Read a model directory of a registered family, with any of its HEADS.

    Raises:
        UserError: a file is damaged, unsupported or incomplete.
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
    """Write a model directory, atomically; an existing `out` is replaced.

    It has config.json, model.safetensors, the tokenizer's files and the model card.

    Args:
        params: parameters.
        model: config of the model.
        tokenizer: directory of the tokenizer.
        out: directory to write.
        dtype: a name in DTYPES.
        labels: names of the classifier's outputs.
        passthrough: additional keys of config.json, such as problem_type (see config.PASSTHROUGH_KEYS).
        card: text of the model card. Empty: none is written.

    Raises:
        UserError: a value does not fit `dtype`, or a gate is not 1 yet.
    """
    from safetensors.numpy import save_file

    params, model = fold_gates(params, model)
    heads = [head for head in family(model).HEADS if head in params]
    tensors = to_hf_tensors(params, model, dtype)
    if dtype == "float16":
        _require_finite(tensors, out)
    with atomic_dir(out) as partial:
        copy_model_tokenizer(tokenizer, partial, model)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        config = {**to_hf_config(model, heads, labels, dtype), **_token_ids(partial, model), **passthrough}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(
            partial / "config.json", partial / "model.safetensors"
        )  # it is only readable by its owner
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if commit_dir(partial, out):
            return
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)


def _token_ids(directory: Path, model: ModelConfig) -> dict[str, int]:
    """The token ids that transformers reads from config.json, e.g. to end a continuation."""
    keys = family(model).HF_NAMES[model.model_type].token_id_keys
    if not keys or not has_tokenizer(directory):
        return {}
    vocabulary = load_vocabulary(directory)
    ids = {key: getattr(vocabulary, f"{role}_id") for key, role in keys}
    return {key: i for key, i in ids.items() if i >= 0}


def _require_finite(tensors: Mapping[str, np.ndarray], out: Path) -> None:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{out}: {name} does not fit float16 (up to 65504), expected bfloat16 or float32")
