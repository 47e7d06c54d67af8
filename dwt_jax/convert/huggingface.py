"""A model directory in Hugging Face's layout ↔ (params, Model).

One table pairs the names; how a leaf is stored there follows from its roles: a kernel is
[out, in] with heads flattened, a layer axis is one tensor a layer, the padding of the
vocabulary is cut off.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.config import Model
from dwt_jax.config_file import build
from dwt_jax.errors import UserError
from dwt_jax.files import building
from dwt_jax.model.functional import Params, abstract
from dwt_jax.model.layers import padded_vocabulary
from dwt_jax.model.roles import ROLES, path_name

_LAYER = "bert.encoder.layer.{layer}."

MODULES = {
    "embeddings/word": "bert.embeddings.word_embeddings",
    "embeddings/position": "bert.embeddings.position_embeddings",
    "embeddings/type": "bert.embeddings.token_type_embeddings",
    "embeddings/norm": "bert.embeddings.LayerNorm",
    "layers/attention/query": _LAYER + "attention.self.query",
    "layers/attention/key": _LAYER + "attention.self.key",
    "layers/attention/value": _LAYER + "attention.self.value",
    "layers/attention/output": _LAYER + "attention.output.dense",
    "layers/attention/norm": _LAYER + "attention.output.LayerNorm",
    "layers/mlp/input": _LAYER + "intermediate.dense",
    "layers/mlp/output": _LAYER + "output.dense",
    "layers/mlp/norm": _LAYER + "output.LayerNorm",
    "mlm/transform": "cls.predictions.transform.dense",
    "mlm/norm": "cls.predictions.transform.LayerNorm",
    "mlm": "cls.predictions",
}

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

_SAME_NAME = [field.name for field in dataclasses.fields(Model)]


def tensor_name(path: str) -> str:
    """'layers/mlp/input/kernel' → 'bert.encoder.layer.{layer}.intermediate.dense.weight'"""
    module, _, leaf = path.rpartition("/")
    return f"{MODULES[module]}.{LEAVES[leaf]}"


def to_tensors(params: Params, model: Model) -> dict[str, np.ndarray]:
    """The tensors of a BertForMaskedLM, fp32, by name."""
    import jax

    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, array = path_name(path), np.asarray(leaf, np.float32)
        if ROLES[name][0].name == "layer":
            for i, one in enumerate(array):
                tensors[tensor_name(name).format(layer=i)] = _to_tensor(one, name, model)
        else:
            tensors[tensor_name(name)] = _to_tensor(array, name, model)
    return tensors


def _axes(name: str) -> list[Any]:
    return [axis for axis in ROLES[name] if axis.name != "layer"]


def _to_tensor(array: np.ndarray, name: str, model: Model) -> np.ndarray:
    axes = _axes(name)
    if axes[0].name == "vocab":
        array = array[: model.vocab_size]
    inputs = int(np.prod([n for n, axis in zip(array.shape, axes, strict=True) if axis.side == "in"]))
    if any(axis.side == "in" for axis in axes):
        array = array.reshape(inputs, -1).T
    elif all(axis.side == "out" for axis in axes):
        array = array.reshape(-1)
    return np.ascontiguousarray(array)


def _from_tensor(tensor: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse; `shape` without the layer axis."""
    axes = _axes(name)
    if axes[0].name == "vocab":
        return np.pad(tensor, [(0, shape[0] - len(tensor))] + [(0, 0)] * (tensor.ndim - 1))
    return (tensor.T if any(axis.side == "in" for axis in axes) else tensor).reshape(shape)


def _tensor_shape(shape: tuple[int, ...], name: str, model: Model) -> tuple[int, ...]:
    axes = _axes(name)
    if axes[0].name == "vocab":
        return (model.vocab_size, *shape[1:])
    if all(axis.side == "out" for axis in axes):
        return (int(np.prod(shape)),)
    if any(axis.side == "in" for axis in axes):
        sides = {
            side: [n for n, a in zip(shape, axes, strict=True) if a.side == side] for side in ("out", "in")
        }
        return int(np.prod(sides["out"])), int(np.prod(sides["in"]))
    return shape


def from_tensors(tensors: Mapping[str, np.ndarray], model: Model, where: str) -> Params:
    """Parameters (host fp32 arrays) from the tensors of a BertForMaskedLM.

    Raises UserError naming every missing, unexpected and mismatched tensor at once.
    """
    import jax

    used: set[str] = set()
    wrong: list[str] = []

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        layered = ROLES[name][0].name == "layer"
        shape = like.shape[1:] if layered else like.shape
        arrays = []
        for i in range(like.shape[0] if layered else 1):
            key, expected = tensor_name(name).format(layer=i), _tensor_shape(shape, name, model)
            used.add(key)
            if key not in tensors:
                wrong.append(f"missing {key} {list(expected)}")
            elif tensors[key].shape != expected:
                wrong.append(f"{key} is {list(tensors[key].shape)}, expected {list(expected)}")
            else:
                arrays.append(_from_tensor(np.asarray(tensors[key], np.float32), name, shape))
        if wrong:
            return np.zeros(())
        return np.stack(arrays) if layered else arrays[0]

    params = jax.tree_util.tree_map_with_path(leaf, abstract(model))
    wrong += [f"unexpected {key}" for key in sorted(set(tensors) - used)]
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}")
    return params


def model_config(model: Model) -> dict[str, Any]:
    """What `config.json` of the directory says."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        **{name: getattr(model, name) for name in _SAME_NAME},
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def save(params: Params, model: Model, tokenizer: Path, out: Path) -> None:
    """Write the directory whole or not at all: config.json, model.safetensors and the files
    of the `tokenizer` directory. An `out` of an earlier call is replaced."""
    from safetensors.numpy import save_file

    with building(out) as partial:
        for file in sorted(tokenizer.iterdir()):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        save_file(to_tensors(params, model), partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(model_config(model), indent=2) + "\n")
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


def load_config(path: Path) -> Model:
    """The sizes that `config.json` of a model directory gives."""
    try:
        found = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'}: {error}, expected a Hugging Face model config") from None
    where = path / "config.json"
    if not isinstance(found, dict) or found.get("model_type") != "bert":
        kind = found.get("model_type") if isinstance(found, dict) else found
        raise UserError(f"{where}: model_type is {kind!r}, expected 'bert'")
    missing = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if name not in found]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}, expected the sizes of a BERT")
    sizes = {"model": {name: found[name] for name in _SAME_NAME if name in found}}
    try:  # the checks of a config file are those of a model's sizes too
        return build({**sizes, "train": {"steps": 1}, "data": {"sequence_length": 8}}).model
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None


def load(path: Path) -> tuple[Params, Model]:
    """Parameters (host fp32) and sizes of a directory that `save` wrote."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    model = load_config(path)
    try:
        tensors = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / 'model.safetensors'}: {error}, expected a model in safetensors") from None
    params = from_tensors(tensors, model, str(path / "model.safetensors"))
    assert params["mlm"]["bias"].shape == (padded_vocabulary(model.vocab_size),)
    return params, model
