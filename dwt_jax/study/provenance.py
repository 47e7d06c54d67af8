"""Provenance of finished jobs: the teacher or the fine-tuned run that they were made from.

Finished jobs are not repeated. If the source of a job was replaced or trained again with another config,
the report would be wrong, so this is an error.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dwt_jax.config_loader import flatten_dict
from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json, read_json, write_json
from dwt_jax.hf.tensor_files import has_weights
from dwt_jax.runs.load import load_model
from dwt_jax.runs.run_dir import CADENCE_KEYS, RESUME_MUTABLE_KEYS, RUN_ID_KEY
from dwt_jax.study.sweep import Job

PROVENANCE_FILE = "source.json"


class ProvenanceChecker:
    """Checks that finished jobs were made from the current sources. Models are read once."""

    def __init__(self, by_name: Mapping[str, Job]):
        self._by_name = by_name
        self._digests: dict[Path, str] = {}

    def check(self, job: Job) -> None:
        """Raise UserError if a source of `job` has changed.

        Sources that are not finished are not checked: they may still become the same.
        """
        needs = [self._by_name[name] for name in job.needs]
        if not all(need.is_done() for need in needs):
            return
        if job.kind != "train":
            path = job.workdir / PROVENANCE_FILE
            if path.exists() and read_json(path) != _run_fingerprint(needs[0]):
                raise UserError(_changed_source_message(job, f"run of {needs[0].name!r}"))
            return
        has_config = (job.workdir / "config.json").exists()
        record = (read_intact_json(job.workdir / "run.json") if has_config else None) or {}
        model_paths = {"teacher_digest": job.config.teacher.path, "init_digest": job.config.init.from_}
        for key, model in model_paths.items():
            source_jobs = [need for need in needs if model and need.workdir == Path(model)]
            digest = self._model_digest(Path(model)) if source_jobs and record.get(key) else ""
            if digest and record[key] != digest:
                raise UserError(_changed_source_message(job, f"model than that of {source_jobs[0].name!r}"))

    def _model_digest(self, run: Path) -> str:
        """Return the digest of the model of a run, as run.json of its students has it.

        If the weights of the run were removed, as in a published study, the digest is read from summary.json;
        '' if it has none.
        """
        from dwt_jax.runs.pretrained import params_digest

        if run not in self._digests:
            if has_weights(run / "model"):
                self._digests[run] = params_digest(load_model(str(run)).params)
            else:
                self._digests[run] = read_json(run / "summary.json").get("params_digest", "")
        return self._digests[run]

    def record(self, job: Job) -> None:
        """Record the source of a job before it starts. Pre-training runs record it in their run.json."""
        if job.kind != "train" and not (job.workdir / PROVENANCE_FILE).exists():
            job.workdir.mkdir(parents=True, exist_ok=True)
            write_json(job.workdir / PROVENANCE_FILE, _run_fingerprint(self._by_name[job.needs[0]]))


def _changed_source_message(job: Job, source_description: str) -> str:
    return (
        f"{job.workdir}: was made from another {source_description}, expected the current one "
        "(remove it to run the job again, or give the arm another name)"
    )


def _run_fingerprint(run: Job) -> dict[str, str]:
    """Fingerprint everything that determines the numbers of a pre-training run."""
    config = flatten_dict(read_json(run.workdir / "config.json"))
    ignored_keys = tuple(key for key in RESUME_MUTABLE_KEYS if key not in CADENCE_KEYS)  # as always
    relevant = {key: value for key, value in config.items() if not key.startswith(ignored_keys)}
    identity = read_json(run.workdir / "run.json")
    identity.pop(RUN_ID_KEY, None)
    text = json.dumps([relevant, identity], sort_keys=True)
    return {"run": run.name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
