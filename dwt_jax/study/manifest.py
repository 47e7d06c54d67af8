"""The manifest of a study (grid.json): its config and jobs, so that a report needs no config files."""

from dataclasses import fields
from pathlib import Path

from dwt_jax.config_loader import build_dataclass, config_to_dict
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.study.sweep import Job, JobRecord, Study, study_problems

MANIFEST_NAME = "grid.json"


def write_manifest(study: Study, jobs: tuple[Job, ...], workdir: Path) -> None:
    """Write the manifest of a study to its directory."""
    records = [{f.name: getattr(job, f.name) for f in fields(JobRecord)} for job in jobs]
    for record in records:
        record["workdir"] = record["workdir"].relative_to(workdir).as_posix()
    write_json(workdir / MANIFEST_NAME, {"grid": config_to_dict(study), "jobs": records})


def read_manifest(workdir: Path) -> tuple[Study, tuple[JobRecord, ...]]:
    """Read a manifest. Raises UserError if `write_manifest` did not write it."""
    path = workdir / MANIFEST_NAME
    manifest = read_json(path)
    try:
        records = tuple(
            JobRecord(
                **{
                    **job,
                    "workdir": workdir / job["workdir"],
                    "tasks": tuple(job["tasks"]),
                    "needs": tuple(job.get("needs", ())),
                }
            )
            for job in manifest["jobs"]
        )
        study = build_dataclass(Study, manifest["grid"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {error!r}, expected a file that dwt study wrote (run it again)") from None
    for problem in study_problems(study):
        raise UserError(f"{path}: {problem}")
    unknown_arms = {record.arm for record in records} - {arm.name for arm in study.arms}
    if unknown_arms:
        raise UserError(f"{path}: a run of arm {min(unknown_arms)!r}, expected one of the study's arms")
    return study, records
