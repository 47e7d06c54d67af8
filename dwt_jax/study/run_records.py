"""The finished runs below a directory, read from their own files."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dwt_jax.config import Config, Schedule
from dwt_jax.config_loader import config_to_dict, flatten_dict
from dwt_jax.errors import UserError
from dwt_jax.files import list_directory, read_intact_json, read_json
from dwt_jax.runs.metrics_file import read_jsonl, restore_nans
from dwt_jax.runs.run_dir import RUN_ID_KEY

_DEFAULT_SETTINGS = {
    key: value
    for key, value in flatten_dict(config_to_dict(Config())).items()
    if not key.startswith("model.")  # these depend on the family
}
"""What a setting is that the config of an older version lacks."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run, read from its directory."""

    name: str  # path of its directory, relative to the study's
    label: str
    role: str  # teacher or student
    # Name of the teacher's run if it is in the study, else the config's path; several are joined by " + ".
    teacher: str
    path: Path
    config: Mapping[str, Any]
    identity: Mapping[str, Any]  # run.json
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]  # empty if they were not asked for
    evaluations: Sequence[Mapping[str, Any]]  # by step, including the last
    documents: tuple[np.ndarray, np.ndarray] | None  # sums of the loss and predictions by held-out document

    @property
    def loss(self) -> float:
        """Final held-out loss in nats."""
        return self.summary["held_out"]["held_out_loss"]

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        """Paths of the teachers in the config."""
        return teacher_paths(self.config)

    @property
    def is_distilled(self) -> bool:
        """Whether it is a student with a teacher."""
        return self.role == "student" and bool(self.teacher_paths)

    @property
    def is_grown(self) -> bool:
        """Whether it was initialized from a smaller model."""
        return bool(self.config.get("init", {}).get("method"))

    def settings(self) -> dict[str, Any]:
        """Return config, data and environment by dotted key."""
        identity = {f"run.{key}": value for key, value in self.identity.items() if key != RUN_ID_KEY}
        return {
            **_DEFAULT_SETTINGS,
            "run.precision_environment": "",  # older runs have no record of it
            "run.attention": "reference",  # older runs have no other
            **flatten_dict(self.config),
            **identity,
            "held-out predictions": self.summary["held_out"].get("predictions"),
            "computed in": self.summary.get("compute", self.config["precision"]["compute_dtype"]),
        }


def find_run_directories(workdir: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the run directories at most two levels below `workdir`.

    Subdirectories of a run are not searched: `model/` has a config.json too.

    Raises:
        UserError: `workdir` is no directory, or is itself a run.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such directory, expected one whose sub-directories are runs")
    if _is_run(workdir):
        raise UserError(f"{workdir}: is itself a run, expected the directory that holds the runs")
    for child in sorted(list_directory(workdir)):
        if not child.is_dir() or child.name.startswith("."):
            continue
        run_dirs = [child] if _is_run(child) else sorted(path for path in child.iterdir() if _is_run(path))
        yield from ((path.relative_to(workdir).as_posix(), path) for path in run_dirs)


def _is_run(path: Path) -> bool:
    """Whether a directory is a pre-training run (other jobs write a summary too)."""
    if not path.is_dir() or path.name.startswith(".") or not (path / "config.json").exists():
        return False
    config, summary = (read_intact_json(path / name) for name in ("config.json", "summary.json"))
    if config is not None and summary is not None:
        return {"distill", "model"} <= set(config) and {"held_out", "flops"} <= set(summary)
    return (path / "run.json").exists()


def read_finished_run(name: str, path: Path, with_metrics: bool = True) -> RunRecord:
    """Read a finished run as a student that is labelled with its name.

    Args:
        name: path of its directory, relative to the study's.
        path: its directory.
        with_metrics: read the training losses too, which takes time for a long run.
    """
    summary = read_json(path / "summary.json")
    last = summary["held_out"] = restore_nans(summary["held_out"])
    by_step = {record["step"]: record for record in read_jsonl(path / "evaluations.jsonl")}
    by_step.setdefault(summary["steps"], {**last, "step": summary["steps"]})
    return RunRecord(
        name=name,
        label=name,
        role="student",
        teacher="",
        path=path,
        config=_read_config(path / "config.json"),
        identity=read_json(path / "run.json") if (path / "run.json").exists() else {},
        summary=summary,
        metrics=read_jsonl(path / "metrics.jsonl") if with_metrics else (),
        evaluations=[by_step[step] for step in sorted(by_step)],
        documents=read_document_losses(path / "documents.npz"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """Read a run's config; the masking rate of an older version is a number."""
    config = read_json(path)
    if not isinstance(rate := config["mlm"]["probability"], Mapping):
        config["mlm"]["probability"] = config_to_dict(Schedule(value=rate))
    return config


def read_document_losses(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Read loss sums and predictions by document, [D] each; None if the file does not exist.

    Raises:
        UserError: for another kind of file.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return arrays["loss"].astype(np.float64), arrays["count"].astype(np.float64)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {error}, expected the arrays loss and count") from None


def last_logged_step(path: Path | None) -> int:
    """Return the last step in the metrics of a run's directory, 0 without any or without a directory."""
    records = read_jsonl(path / "metrics.jsonl") if path else []
    return records[-1]["step"] if records else 0


def teacher_paths(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of the teachers in a run's config as JSON has it; earlier versions know one."""
    keys = config["teacher"]
    return (keys["path"],) if keys["path"] else tuple(keys.get("paths", ()))


def refers_to_run(path: Path, run: RunRecord) -> bool:
    """Whether a teacher's path is the directory of `run` or its model.

    Paths are relative to the student's working directory, and directories may have moved: if the path
    does not exist, its last parts are compared with the run's name.
    """
    if path.name == "model":
        path = path.parent
    if path.exists():
        return path.resolve() == run.path.resolve()
    name_parts = Path(run.name).parts
    return path.parts[-len(name_parts) :] == name_parts
