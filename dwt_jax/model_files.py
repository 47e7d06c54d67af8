"""Read files of untrusted model directories.

Every file of such a directory (config, weights, tokenizer, card) is read only after `is_model_file` has
checked it: a regular file, inside of the directory, of bounded size. In the Hugging Face Hub's cache the
files of a snapshot are links to `../../blobs`, which count as inside.
"""

import re
from pathlib import Path
from typing import Any

from dwt_jax.errors import UserError
from dwt_jax.files import is_file_or_raise, read_json_object

MAX_VOCABULARY_BYTES = 2**27
"""Size limit of a file that may have an entry for each token: several times the largest in use."""

MAX_SETTINGS_BYTES = 2**24
"""Size limit of the files named in _SETTINGS_FILES."""

_SETTINGS_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "README.md",
)

_OTHER_WEIGHTS = {
    "tf_model.h5": "weights of TensorFlow",
    "*.ckpt.index": "weights of TensorFlow",
    "flax_model.msgpack": "weights of Flax",
    "rust_model.ot": "weights of Rust",
    "*.gguf": "GGUF weights",
    "*.onnx": "a graph of ONNX",
    "adapter_model.*": "weights of an adapter alone",
    "model-*-of-*.safetensors": "shards without model.safetensors.index.json",
    "pytorch_model-*-of-*.bin": "shards without pytorch_model.bin.index.json",
    "model.*.safetensors": "a variant of the weights (rename it to model.safetensors)",
    "pytorch_model.*.bin": "a variant of the weights (rename it to pytorch_model.bin)",
}
"""Patterns of files that are not read, the most specific first, and what they hold."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_model_file(path: Path, max_bytes: float | None = None) -> bool:
    """Return whether a model directory has a file, which may then be read.

    Args:
        path: the file. Its parent is the directory, which may itself be a link.
        max_bytes: size limit. None: MAX_SETTINGS_BYTES or MAX_VOCABULARY_BYTES, by its name.

    Raises:
        UserError: the path is a broken link, not a regular file (reading a FIFO would block), a link that
            leads out of the directory, or a file that is too large.
    """
    if not is_file_or_raise(path):
        if path.exists():
            raise UserError(f"{path}: not a regular file, expected one")
        return False
    directory, target = path.parent.resolve(), path.resolve()
    is_snapshot = directory.parent.name == "snapshots"
    blobs = directory.parents[1] / "blobs" if is_snapshot else directory
    if not (target.is_relative_to(directory) or target.is_relative_to(blobs)):
        raise UserError(
            f"{path}: a link to {target}, expected a file inside of the directory (put a copy in its place)"
        )
    if max_bytes is None:
        max_bytes = MAX_SETTINGS_BYTES if path.name in _SETTINGS_FILES else MAX_VOCABULARY_BYTES
    if (size := target.stat().st_size) > max_bytes:
        raise UserError(f"{path}: {size} bytes, expected at most {max_bytes:.0f}")
    return True


def read_model_json(path: Path, expected: str) -> dict[str, Any]:
    """Read a file of a model directory that holds one JSON object.

    Args:
        path: the file.
        expected: what the file should hold, for the error message.

    Raises:
        UserError: as `is_model_file`, and if the file is missing or holds anything else.
    """
    if not is_model_file(path):
        raise UserError(f"{path}: no such file, expected {expected}")
    return read_json_object(path, expected)


# What to say of a directory that is not a model's


def describe_missing_path(path: str | Path, kind: str = "directory") -> str:
    """Return 'PATH: no such directory', with a hint if it may be a name on the Hugging Face Hub."""
    name = str(path)
    text = f"{name}: no such {kind}"
    if _HUB_NAME.fullmatch(name):
        text += f" (names on the Hugging Face Hub are not looked up: hf download {name} --local-dir DIR)"
    return text


def describe_hub_cache(directory: Path) -> str:
    """Describe a folder of the Hub's cache that is not a snapshot; "" for other directories."""
    if snapshots := sorted(path for path in directory.glob("snapshots/*") if path.is_dir()):
        return f"the Hub's cache of a model, whose files are in {' or '.join(map(str, snapshots[:3]))}"
    if caches := sorted(directory.glob("models--*")):
        return f"the Hub's cache of models, whose files are in {caches[0]}/snapshots/REVISION"
    return ""


def describe_weights(directory: Path) -> str:
    """Describe what a directory without readable weights holds instead; "" if it is not recognised."""
    if cache := describe_hub_cache(directory):
        return cache
    if checkpoint := _describe_checkpoint(directory.absolute()):
        return checkpoint
    for pattern, kind in _OTHER_WEIGHTS.items():
        if files := sorted(directory.glob(pattern)):
            return f"has {files[0].name}, {kind}"
    for pattern in ("*/model.safetensors*", "*/pytorch_model.bin*"):
        if files := sorted(directory.glob(pattern)):
            return f"no weights except in its folder {files[0].parent.name}"
    return ""


def _describe_checkpoint(directory: Path) -> str:
    """Name the run of a checkpoint directory, and the command that exports its model; "" for others."""
    step = directory.name if directory.name.isdigit() else ""
    checkpoints = directory.parent if step else directory
    run = checkpoints.parent
    if checkpoints.name != "checkpoints" or not (run / "config.json").exists():
        return ""
    if not step:
        return f"the checkpoints of the run in {run}"
    command = f"dwt export --model={run} --step={step} --out=DIR"
    return f"a checkpoint of the run in {run} ({command} writes its model)"
