"""A run's work directory: whose it is, and the model in it.

`config.json` is the resolved config, `run.json` what it was run on, `tokenizer/` the
tokenizer; then metrics, checkpoints, and at the end `model/` and `summary.json`.
"""

import fcntl
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dwt_jax.config import Config, Model
from dwt_jax.config_loader import build, flatten, to_dict
from dwt_jax.data.tokenizer import copy_files
from dwt_jax.errors import UserError
from dwt_jax.files import building, json_text, read_object, whole_file

MAY_CHANGE = (
    "mesh.",
    "platform",
    "data.prefetch",
    "data.path",
    "teacher.path",
    "init.from",
    "train.tensorboard",
    "train.wandb",
    "train.watchdog",
)
"""Keys that a resumed run may change: they do not change what is computed (data,
teacher and the source of init are compared by their digests, wherever they lie)."""


class Loaded(NamedTuple):
    """A model for whatever wants one."""

    params: Any  # host fp32 arrays
    model: Model
    tokenizer: Path
    labels: tuple[str, ...] = ()  # of a classifier
    dtype: str = "float32"  # that its weights are stored in
    step: int | None = None  # of the checkpoint it was taken from
    kept: Mapping[str, Any] = {}  # of its config.json, see convert.configuration.KEPT
    ignored: tuple[str, ...] = ()  # tensors that were left out


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json_text(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The object in a JSON file of ours; UserError for anything else."""
    return read_object(path, "JSON that dwt wrote")


class Kind(NamedTuple):
    """A kind of run, as its directory tells it."""

    record: str  # the file of what it was run on
    config_of: Callable[[Path], Any]  # its resolved config, from the directory
    may_change: tuple[str, ...]  # beginnings of keys, see MAY_CHANGE


def claim(
    workdir: Path, config: Any, tokenizer: Path, identity: Mapping[str, Any], kind: Kind | None = None
) -> None:
    """Make `workdir` the directory of this run, or raise UserError if it is another's.

    `identity`: digests of what is not in the config (data, teacher); kind: of pre-training if None. A
    directory that holds other files but no run is refused too.
    """
    pretraining = kind is None
    kind = kind or Kind("run.json", config_of, MAY_CHANGE)
    ours = (workdir / "config.json").exists()
    if ours:
        there = kind.config_of(workdir), read_json(workdir / kind.record)
        _refuse_another(workdir, _told(*there), _told(config, identity), kind.may_change)
    else:
        cut_short = {"tokenizer", kind.record}  # of a claim that was killed
        if any(child.name not in cut_short and not child.name.startswith(".") for child in workdir.iterdir()):
            raise UserError(f"{workdir}: holds files but no run, expected an empty or new --workdir")
    if pretraining:
        claim_checkpoints(workdir, config, identity)
    if ours:
        return
    with building(workdir / "tokenizer") as partial:
        copy_files(tokenizer, partial)  # it may be a model's directory
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
        partial.rename(workdir / "tokenizer")
    write_json(workdir / kind.record, dict(identity))
    write_json(workdir / "config.json", to_dict(config))  # last: its presence says that the claim is whole


def _told(config: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that makes a run what it is; keys that are newer than its record at their defaults."""
    return {**flatten(to_dict(config)), **{f"run.{key}": value for key, value in identity.items()}}


def _refuse_another(
    place: Any, theirs: Mapping[str, Any], mine: Mapping[str, Any], may_change: tuple[str, ...]
) -> None:
    different = [
        f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in {**theirs, **mine}
        if not key.startswith(may_change) and theirs.get(key) != mine.get(key)
    ]
    if different:
        raise UserError(f"{place}: holds a run of another config, expected the same: {'; '.join(different)}")


def checkpoint_place(workdir: Path, config: Config) -> Any:
    """Where the run in `workdir` keeps its checkpoints: a path of etils, which may be one of gs://."""
    from etils import epath

    said = config.train.checkpoint_path
    if said.startswith("gs://"):
        return epath.Path(said)
    return epath.Path(Path(said).expanduser().absolute() if said else workdir.absolute() / "checkpoints")


def claim_checkpoints(workdir: Path, config: Config, identity: Mapping[str, Any]) -> None:
    """Make `train.checkpoint_path` this run's, or raise UserError if it is another's or cannot be reached.

    Its `run.json` says whose it is: a run whose work directory is lost goes on from there, in a new
    one with the same config. Nothing to do where checkpoints lie in the work directory.
    """
    if not config.train.checkpoint_path:
        return
    place = checkpoint_place(workdir, config)
    record = place / "run.json"
    with reached(place):
        there = json.loads(record.read_text()) if record.exists() else None
        if there is not None:  # even if it saved nothing yet: it may be running
            theirs = _told(build(there["config"]), there["run"])
            _refuse_another(place, theirs, _told(config, identity), MAY_CHANGE)
            return
        if (workdir / "config.json").exists():
            raise UserError(
                f"{place}: has nothing of the run in {workdir} any more, expected its checkpoints"
            )
        if place.exists() and any(place.iterdir()):
            raise UserError(f"{place}: holds files but no run, expected an empty train.checkpoint_path")
        told = {"config": to_dict(config), "run": dict(identity)}
        place.mkdir(parents=True, exist_ok=True)
        if "://" in str(place):  # where a file is whole or absent by itself
            record.write_text(json.dumps(told, indent=2) + "\n")
        else:
            write_json(Path(record), told)


@contextmanager
def reached(place: Any) -> Iterator[None]:
    """What goes wrong with a `train.checkpoint_path` inside the block is a UserError."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        raise UserError(
            f"config: train.checkpoint_path is {place}, expected the package gcsfs installed ({error})"
        ) from None
    except Exception as error:  # no permission, no bucket, no network: each library has its own
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"config: train.checkpoint_path: {place} cannot be used: {reason}") from None


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """No second process trains here: UserError at once. The lock ends with its process."""
    if url := re.match(r"[a-z0-9]{2,}:/", str(workdir)):
        raise UserError(
            f"--workdir: {workdir} begins with {url[0]}, expected a directory, of a file system that all "
            "processes see"
        )
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir}: is a file, expected a directory for --workdir")
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    before = {child.name for child in workdir.iterdir()}
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{workdir}: another process trains here, expected one at a time") from None
        try:
            yield
        finally:
            if {child.name for child in workdir.iterdir()} == before | {".lock"} != before:  # refused
                (workdir / ".lock").unlink()
                if made:
                    workdir.rmdir()


def wait_for(path: Path) -> None:
    """Until a file that process 0 wrote is seen here. Raises UserError if it is not: a network's file
    system may take its time, another disk never shows it."""
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path.parent}: not the directory that process 0 writes, expected one that all share"
            )
        time.sleep(0.5)


def config_of(workdir: Path) -> Config:
    """The resolved config of a run."""
    return build(read_json(workdir / "config.json"))


def load_model(path: str, heads: Sequence[str] | None = ("mlm",), step: int | None = None) -> Loaded:
    """The model of a Hugging Face directory, or of a run: its `model/`, or while that has no
    weights its newest checkpoint; or the checkpoint of `step`.

    heads: those that must be there; others are left out. None: all that are there. Raises
    UserError for anything else.
    """
    from dwt_jax.hf import checkpoint
    from dwt_jax.hf.tensor_files import has_weights

    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{path}: no such directory, expected a model or run directory")
    pretrained = (directory / "run.json").exists()
    run = pretrained or (directory / "model").is_dir()
    if step is not None and not pretrained:
        raise UserError(f"--step: {path} is no run with checkpoints, expected one for --step={step}")
    if step is None and not has_weights(directory) and has_weights(directory / "model"):
        directory = directory / "model"
    if step is None and has_weights(directory):
        found = checkpoint.load(directory)
        if found.ignored:
            print(
                f"{directory}: left out, no part of the models here: {', '.join(found.ignored)}",
                file=sys.stderr,
            )
        loaded = Loaded(
            found.params,
            found.model,
            directory,
            found.labels,
            found.dtype,
            kept=found.kept,
            ignored=found.ignored,
        )
    elif run and (directory / "config.json").exists():
        loaded = _from_checkpoint(directory, step)
    else:
        raise UserError(
            f"{path}: neither weights (model.safetensors, pytorch_model.bin) nor a run's checkpoints, "
            "expected a model or run directory"
        )
    if heads is None:
        return loaded
    if missing := [head for head in heads if head not in loaded.params]:
        there = [head for head in loaded.params if head not in ("embeddings", "layers")]
        raise UserError(
            f"{path}: a model without {_HEAD_NAMES[missing[0]]} (it has "
            f"{', '.join(_HEAD_NAMES[head] for head in there) or 'no head'}), expected one with it"
        )
    kept = {name: loaded.params[name] for name in ("embeddings", "layers", *heads)}
    return loaded._replace(params=kept)


_HEAD_NAMES = {
    "mlm": "a masked-LM head",
    "pooler": "a pooler",
    "next_sentence": "a next-sentence head",
    "classifier": "a classifier",
}


def _from_checkpoint(workdir: Path, step: int | None) -> Loaded:
    import jax

    from dwt_jax.remap.gates import anneal, has_annealed, settled, share_after
    from dwt_jax.runs.checkpoint import Checkpoints
    from dwt_jax.train.step import abstract_state

    config = config_of(workdir)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = abstract_state(config.model, config.optimizer)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    place = checkpoint_place(workdir, config)
    with reached(place):
        checkpoints = Checkpoints(place, config.train.keep_checkpoints, read_only=True)
    try:
        kept = checkpoints.steps()
        if step is not None and step not in kept:
            those = ", ".join(map(str, kept)) or "none"
            raise UserError(f"--step is {step}, expected a checkpoint that {workdir} keeps: {those}")
        found = checkpoints.restore(like, lambda text: print(text, file=sys.stderr), step)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"{workdir}: a run without a checkpoint yet, expected one to take the model from")
    params, step = jax.device_get(found[0]["params"]), found[1]
    model = config.model
    if has_annealed(model):  # the model that this step computes with
        share = share_after(step, config.train.steps, config.init.anneal, config.init.step)
        params = jax.device_get(anneal(params, share))
        if share == 1:
            params, model = settled(params, model)
    return Loaded(params, model, workdir / "tokenizer", step=step)
