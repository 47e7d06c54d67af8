"""A model that a run takes from elsewhere: its teacher, or what its student is grown from."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Model
from dwt_jax.data.tokenizer import Vocabulary, vocabulary
from dwt_jax.errors import UserError
from dwt_jax.models.common.layers import padded_vocabulary
from dwt_jax.models.common.logical_axes import Axis, map_with_roles
from dwt_jax.runs.metric_writer import total
from dwt_jax.runs.run_dir import load_model, read_json


class Borrowed(NamedTuple):
    params: Any  # host fp32 arrays
    model: Model
    digest: str  # of its parameters
    training_flops: float | None  # what its own pre-training cost, where it says so


def borrow(
    key: str, path: str, words: Vocabulary, growing: bool = False, step: int | None = None
) -> Borrowed:
    """The model in `path`, a model or run directory, that `key` of the config names. Rows that no
    token owns are cut off.

    growing: it may have fewer tokens than `words`, as long as those are the first ones. step: of a run,
    the kept checkpoint to take. Raises UserError if its vocabulary differs from the data's,
    naming the first difference.
    """
    loaded = load_model(path, step=step)
    theirs = vocabulary(loaded.tokenizer)
    _same_vocabulary(key, path, theirs, words, growing)
    size = len(theirs.tokens)
    if loaded.model.vocab_size < size:
        raise UserError(
            f"{key}: {path} has vocab_size {loaded.model.vocab_size}, expected at least the "
            f"tokenizer's {size}"
        )
    params, model = _cut_vocabulary(loaded.params, loaded.model, size)
    return Borrowed(params, model, digest(loaded.params), _training_flops(Path(path).expanduser()))


def digest(params: Any) -> str:
    """Of all weights, in order."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]


def _cut_vocabulary(params: Any, model: Model, size: int) -> tuple[Any, Model]:
    """Without the rows that no token owns: many checkpoints pad their tables."""
    rows = padded_vocabulary(size)

    def cut(axes: tuple[Axis, ...], leaf: np.ndarray) -> np.ndarray:
        return leaf[:rows] if axes[0].name == "vocab" else leaf

    return map_with_roles(cut, params), dataclasses.replace(model, vocab_size=size)


def _same_vocabulary(key: str, path: str, theirs: Vocabulary, ours: Vocabulary, growing: bool) -> None:
    pairs = zip(theirs.tokens, ours.tokens, strict=False)
    for i, (their, our) in enumerate(pairs):
        if their != our:
            raise UserError(f"{key}: {path} has another vocabulary, token {i} is {their!r}, expected {our!r}")
    found, wanted = len(theirs.tokens), len(ours.tokens)
    if found > wanted or (found < wanted and not growing):
        raise UserError(
            f"{key}: {path} has another vocabulary, of {found} tokens, expected "
            f"{'at most ' * growing}the data's {wanted}"
        )


def _training_flops(path: Path) -> float | None:
    """Of its own run and of what that had borrowed, None where that is not known."""
    summary = (path.parent if path.name == "model" else path) / "summary.json"
    if not summary.exists():
        return None
    found = read_json(summary).get("flops") or {}
    return total(found.get("total"), found.get("teacher_training"), found.get("source_training", 0.0))
