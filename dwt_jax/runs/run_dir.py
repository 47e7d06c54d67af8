"""The directory of a run: its identity, its lock and the location of its checkpoints.

`config.json` is the resolved config, `run.json` has digests of the inputs, `tokenizer/` is the
tokenizer; then come metrics, checkpoints, and at the end `model/` and `summary.json`.
"""

import contextlib
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from dwt_jax.config import Config
from dwt_jax.config_loader import build_config, config_to_dict, flatten_dict
from dwt_jax.data.hf_tokenizer import LoadedTokenizer
from dwt_jax.data.tokenizer import copy_tokenizer
from dwt_jax.data.tokenizer_files import has_tokenizer
from dwt_jax.errors import UserError, out_of_space_reason
from dwt_jax.files import (
    acquire_lock,
    atomic_dir,
    list_directory,
    read_intact_json,
    read_json,
    sync,
    user_path,
    write_json,
)
from dwt_jax.logs import logger

CADENCE_KEYS = ("train.log_every", "train.save_every", "train.keep_checkpoints", "train.eval_every")
"""When a run logs, saves and evaluates."""

RESUME_MUTABLE_KEYS = (
    *CADENCE_KEYS,
    "mesh.",
    "platform",
    "data.prefetch",
    "data.max_lost_share",
    "data.path",
    "teacher.path",
    "teacher.paths",
    "teacher.cache",
    "init.from",
    "train.tensorboard",
    "train.wandb_project",
    "train.watchdog",
)
"""Keys that a resumed run may change: they do not change what is computed (data,
teacher and the source of init are compared by their digests, wherever they lie)."""

_INPUT_PATHS = ("data.sources.*.path", "data.sources.*.data_dir", "data.tokenizer.path")
"""Patterns of more such keys: the digest of the rows is that of what they name."""

RUN_ID_KEY = "run_id"
"""In run.json: a random name that tells a run from another one in the same directory, for trackers."""


class RunKind(NamedTuple):
    """A kind of run: pre-training or fine-tuning."""

    identity_file: str  # name of the file with the digests of the inputs
    read_config: Callable[[Path], Any]  # reads the resolved config from the directory
    mutable_keys: tuple[str, ...]  # beginnings of keys, or patterns of them


def init_run_dir(
    workdir: Path,
    config: Any,
    tokenizer: Path | LoadedTokenizer,
    identity: Mapping[str, Any],
    kind: RunKind | None = None,
    changed_keys: tuple[str, ...] = (),
) -> None:
    """Initialise the directory of a run, or check that it belongs to this run.

    Args:
        workdir: an existing directory.
        config: resolved config.
        tokenizer: a tokenizer or its directory, which is copied.
        identity: digests of the inputs that are not in the config (data, teacher).
        kind: default: pre-training.
        changed_keys: keys of the config that this run may change; the new values are recorded.

    A damaged config or identity is not compared but rewritten, like a lost tokenizer.

    Raises:
        UserError: the directory holds another run, or files but no run.
    """
    is_pretraining = kind is None
    kind = kind or RunKind("run.json", read_run_config, (*RESUME_MUTABLE_KEYS, *_INPUT_PATHS))
    is_existing = (workdir / "config.json").exists()
    if is_pretraining:
        known_id = (read_run_record(workdir, config) or {}).get(RUN_ID_KEY)
        identity = {**identity, RUN_ID_KEY: known_id or secrets.token_hex(8)}
    has_config = read_intact_json(workdir / "config.json") is not None
    record = read_intact_json(workdir / kind.identity_file)
    if is_existing:
        saved_config = kind.read_config(workdir) if has_config else None
        compared = config if has_config else None, identity if record else None
        _check_same_run(
            workdir,
            _run_identity(saved_config, record),
            _run_identity(*compared),
            (*kind.mutable_keys, *changed_keys),
        )
    else:
        leftover_names = {"tokenizer", kind.identity_file}  # of an interrupted initialisation
        if any(
            child.name not in leftover_names and not child.name.startswith(".")
            for child in list_directory(workdir)
        ):
            raise UserError(f"{workdir}: holds files but no run, expected an empty or new --workdir")
    if is_pretraining:
        init_checkpoint_dir(workdir, config, identity, changed_keys)
    if is_existing and changed_keys:
        (workdir / "summary.json").unlink(missing_ok=True)  # of a run that was complete
        write_json(workdir / "config.json", config_to_dict(config))
    if is_existing:
        for name, is_intact, value in (
            (kind.identity_file, record, dict(identity)),
            ("config.json", has_config, config_to_dict(config)),
        ):
            if not is_intact:
                logger.warning(f"{workdir}: {name} is damaged; it is rewritten")
                write_json(workdir / name, value)
        if not has_tokenizer(workdir / "tokenizer"):  # else its model would be written without one
            logger.warning(f"{workdir}: tokenizer/ is damaged; it is rewritten")
            _write_tokenizer(workdir, tokenizer)
        return
    _write_tokenizer(workdir, tokenizer)
    write_json(workdir / kind.identity_file, dict(identity))
    # Last: its presence marks a complete initialisation.
    write_json(workdir / "config.json", config_to_dict(config))


def _write_tokenizer(workdir: Path, tokenizer: Path | LoadedTokenizer) -> None:
    with atomic_dir(workdir / "tokenizer") as partial:
        copy_tokenizer(tokenizer, partial)  # complete, and checked
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
        sync(partial)
        partial.rename(workdir / "tokenizer")


def _run_identity(config: Any, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that identifies a run. Keys that an older record lacks have their defaults.

    None stands for a damaged part.
    """
    return {
        **(flatten_dict(config_to_dict(config)) if config is not None else {}),
        **{f"run.{key}": value for key, value in (identity or {}).items() if key != RUN_ID_KEY},
    }


def _check_same_run(
    directory: Any,
    saved_identity: Mapping[str, Any],
    requested_identity: Mapping[str, Any],
    mutable_keys: tuple[str, ...],
) -> None:
    differences = [
        f"{key} is {saved_identity.get(key)!r} there, {requested_identity.get(key)!r} here"
        for key in {**saved_identity, **requested_identity}
        if saved_identity.get(key) != requested_identity.get(key)
        and not any(fnmatchcase(key, f"{pattern}*") for pattern in mutable_keys)
    ]
    if differences:
        raise UserError(
            f"{directory}: holds a run of another config, expected the same: {'; '.join(differences)}"
        )


def checkpoint_dir(workdir: Path, config: Config) -> Any:
    """Return the etils path of a run's checkpoints, which may be on gs://."""
    from etils import epath

    configured_path = config.train.checkpoint_path
    if configured_path.startswith("gs://"):
        return epath.Path(configured_path)
    return epath.Path(
        user_path(configured_path).absolute() if configured_path else workdir.absolute() / "checkpoints"
    )


def init_checkpoint_dir(
    workdir: Path, config: Config, identity: Mapping[str, Any], changed_keys: tuple[str, ...] = ()
) -> None:
    """Initialise `train.checkpoint_path`, or check that it belongs to this run.

    Its `run.json` identifies the run. If the work directory is lost, the run continues from there in a new
    one with the same config. Nothing is done if checkpoints are in the work directory.

    Raises:
        UserError: the directory holds another run, or cannot be accessed.
    """
    if not config.train.checkpoint_path:
        return
    directory = checkpoint_dir(workdir, config)
    record_path = directory / "run.json"
    with wrap_storage_errors(directory):
        saved_record = _read_checkpoint_record(record_path)
        if saved_record is not None:  # even without checkpoints: that run may be in progress
            saved_identity = _run_identity(build_config(saved_record["config"]), saved_record["run"])
            mutable_keys = (*RESUME_MUTABLE_KEYS, *_INPUT_PATHS, *changed_keys)
            _check_same_run(directory, saved_identity, _run_identity(config, identity), mutable_keys)
            if not changed_keys:
                return
        if (workdir / "config.json").exists() and not record_path.exists():
            raise UserError(f"{directory}: has no files of the run in {workdir}, expected its checkpoints")
        if not record_path.exists() and directory.exists() and list_directory(directory):
            raise UserError(f"{directory}: holds files but no run, expected an empty train.checkpoint_path")
        new_record = {"config": config_to_dict(config), "run": dict(identity)}
        directory.mkdir(parents=True, exist_ok=True)
        if "://" in str(directory):  # object stores write files atomically
            record_path.write_text(json.dumps(new_record, indent=2) + "\n", encoding="utf-8")
        else:
            write_json(Path(record_path), new_record)


def _read_checkpoint_record(path: Any) -> dict[str, Any] | None:
    """Read the `run.json` of a `train.checkpoint_path`; None if it does not exist or is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except ValueError:
        return None


def read_run_record(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Return the digests of an existing run, from its work directory or else its `train.checkpoint_path`.

    Raises:
        UserError: the checkpoint path cannot be accessed.
    """
    if (workdir / "config.json").exists() and (record := read_intact_json(workdir / "run.json")):
        return record
    if not config.train.checkpoint_path:
        return None
    directory = checkpoint_dir(workdir, config)
    with wrap_storage_errors(directory):
        saved_record = _read_checkpoint_record(directory / "run.json")
        return dict(saved_record["run"]) if saved_record else None


@contextmanager
def wrap_storage_errors(directory: Any) -> Iterator[None]:
    """Convert exceptions of a `train.checkpoint_path` to a UserError."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises, with a traceback
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        raise UserError(
            f"config: train.checkpoint_path is {directory}, expected the package gcsfs installed ({error})"
        ) from None
    except Exception as error:  # no permission, bucket or network: each library has its own exceptions
        if out_of_space_reason(error):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"config: train.checkpoint_path: {directory} cannot be used: {reason}") from None


@contextmanager
def run_lock(workdir: Path) -> Iterator[None]:
    """Lock a run's directory, which is created if needed, against other processes.

    Raises:
        UserError: another process has the lock, or `workdir` cannot be a directory.
    """
    if scheme_match := re.match(r"[a-z0-9]{2,}:/", str(workdir)):
        raise UserError(
            f"--workdir: {workdir} begins with {scheme_match[0]}, expected a directory on a file system "
            "that all processes see"
        )
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir}: is a file, expected a directory for --workdir")
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    names_before = {child.name for child in workdir.iterdir()}
    with contextlib.ExitStack() as stack:
        try:
            lock = acquire_lock(workdir / ".lock")
        except Timeout:
            raise UserError(f"{workdir}: another process trains here, expected one at a time") from None
        if lock is None:
            logger.warning(
                f"{workdir}: cannot be locked against other processes (no locks on its file system)"
            )
        else:
            stack.callback(lock.release)
        try:
            yield
        finally:
            names = {child.name for child in workdir.iterdir()}
            if names == names_before | {".lock"} != names_before:  # refused
                (workdir / ".lock").unlink()
                if is_new:
                    workdir.rmdir()


def wait_for_file(path: Path) -> None:
    """Wait for a file that process 0 wrote to appear, since a network file system may have a delay.

    Raises:
        UserError: it did not appear within a minute; the directory is probably not shared.
    """
    deadline = time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path.parent}: not the directory that process 0 writes, expected one that all share"
            )
        time.sleep(0.5)


def read_run_config(workdir: Path) -> Config:
    """Read the resolved config of a run."""
    return build_config(read_json(workdir / "config.json"))
