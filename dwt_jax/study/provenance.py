"""What a finished job was made of: its teacher, the run that was fine-tuned.

What is done is never done again, so a job whose source is another one in the grid now, or was
made anew of another config since, would be reported as what it is not.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dwt_jax.config_loader import flatten_dict
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.runs.load import load_model
from dwt_jax.runs.run_dir import RESUME_MUTABLE_KEYS
from dwt_jax.study.sweep import Job

PROVENANCE_FILE = "source.json"


class ProvenanceChecker:
    """Looks at finished jobs; models are read once."""

    def __init__(self, by_name: Mapping[str, Job]):
        self._by_name = by_name
        self._digests: dict[str, str] = {}

    def check(self, job: Job) -> None:
        """Raises UserError where `job` was made of something else. A source that is not done is not
        judged: it may yet become the one that was there."""
        needs = [self._by_name[name] for name in job.needs]
        if not all(need.is_done() for need in needs):
            return
        if job.kind != "train":
            path = job.workdir / PROVENANCE_FILE
            if path.exists() and read_json(path) != _run_fingerprint(needs[0]):
                raise UserError(_changed_source_message(job, f"run of {needs[0].name!r}"))
            return
        record = read_json(job.workdir / "run.json") if (job.workdir / "config.json").exists() else {}
        model_paths = {"teacher_digest": job.config.teacher.path, "init_digest": job.config.init.from_}
        for key, model in model_paths.items():
            source_jobs = [need for need in needs if model and need.workdir == Path(model)]
            if source_jobs and record.get(key) and record[key] != self._model_digest(model):
                raise UserError(_changed_source_message(job, f"model than that of {source_jobs[0].name!r}"))

    def _model_digest(self, path: str) -> str:
        """Of the model in a run's directory, as a run that borrows it writes it down."""
        from dwt_jax.runs.pretrained import params_digest

        if path not in self._digests:
            self._digests[path] = params_digest(load_model(path).params)
        return self._digests[path]

    def record(self, job: Job) -> None:
        """Before a job begins: what it is made of. Of pre-training its own run.json tells that."""
        if job.kind != "train" and not (job.workdir / PROVENANCE_FILE).exists():
            job.workdir.mkdir(parents=True, exist_ok=True)
            write_json(job.workdir / PROVENANCE_FILE, _run_fingerprint(self._by_name[job.needs[0]]))


def _changed_source_message(job: Job, source_description: str) -> str:
    return (
        f"{job.workdir}: was made of another {source_description}, expected the one that is there now "
        "(remove it, and it is done again; or give the arm another name)"
    )


def _run_fingerprint(run: Job) -> dict[str, str]:
    """What decides the numbers of a pre-training run: done again with the same config, it is the same."""
    config = flatten_dict(read_json(run.workdir / "config.json"))
    relevant = {key: value for key, value in config.items() if not key.startswith(RESUME_MUTABLE_KEYS)}
    text = json.dumps([relevant, read_json(run.workdir / "run.json")], sort_keys=True)
    return {"run": run.name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
