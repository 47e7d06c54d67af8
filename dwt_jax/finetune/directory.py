"""The directory of a fine-tuning: check that it belongs to a config, model and data; allow additions."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.config_loader import config_to_dict
from dwt_jax.data.hf_tokenizer import LoadedTokenizer
from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json, write_json
from dwt_jax.finetune.collate import EncodedExamples
from dwt_jax.finetune.config import FinetuneConfig, read_finetune_config
from dwt_jax.finetune.datasets import TaskData
from dwt_jax.runs import run_dir
from dwt_jax.runs.pretrained import params_digest

FINETUNE_MUTABLE_KEYS = ("examples.path", "examples.train", "examples.dev", "examples.test")
"""Keys that a resumed run may change. The data is compared by its digest instead of its path."""


def data_digest(workdir: Path, data: TaskData, encoded: Mapping[str, EncodedExamples]) -> str:
    """Return the digest of the training and dev data of a directory. Test splits may be added later."""

    def digest(names: Sequence[str]) -> str:
        ids = [np.array(data.splits[name].ids) for name in names]
        return params_digest([*(encoded[name] for name in names), np.array(data.labels), *ids])

    record = read_intact_json(workdir / "finetune.json")
    if record and record["data_digest"] == digest([*encoded]):
        return digest([*encoded])  # of an earlier version, whose digest was that of all splits
    return digest([name for name in encoded if not name.startswith("test")])


def init_finetune_dir(
    workdir: Path, config: FinetuneConfig, tokenizer: LoadedTokenizer, identity: Mapping[str, Any]
) -> FinetuneConfig:
    """Initialize the directory, or check that it belongs to this fine-tuning. Seeds may be added to it.

    Returns:
        The config with the directory's seeds first.

    Raises:
        UserError: the directory holds another run, or a seed that is not in the config.
    """
    run_kind = run_dir.RunKind("finetune.json", read_finetune_config, FINETUNE_MUTABLE_KEYS)
    if not (workdir / "config.json").exists():
        run_dir.init_run_dir(workdir, config, tokenizer, identity, run_kind)
        return config
    saved, requested = read_finetune_config(workdir), config.recipe.seeds
    if not set(saved.recipe.seeds) <= set(requested):
        raise UserError(
            f"{workdir}: recipe.seeds is {[*requested]}, expected those of the run there, "
            f"{[*saved.recipe.seeds]}, and possibly more"
        )
    config = _replace_seeds(config, saved.recipe.seeds)
    run_dir.init_run_dir(workdir, config, tokenizer, identity, run_kind)
    config = _replace_seeds(config, tuple(dict.fromkeys((*saved.recipe.seeds, *requested))))
    if config != saved:
        write_json(workdir / "config.json", config_to_dict(config))
    return config


def _replace_seeds(config: FinetuneConfig, seeds: tuple[int, ...]) -> FinetuneConfig:
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, seeds=seeds))


def test_digests(data: TaskData, encoded: Mapping[str, EncodedExamples]) -> dict[str, str]:
    """Return {test split: digest of its examples}."""
    return {
        name: params_digest([split, np.array(data.splits[name].ids)])
        for name, split in encoded.items()
        if name.startswith("test")
    }
