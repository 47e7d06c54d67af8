"""What a finished job was made of: its teacher, the run that was fine-tuned.

What is done is never done again, so a job whose source is another one in the grid now, or was
made anew of another config since, would be reported as what it is not.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dwt_jax.config_loader import flatten
from dwt_jax.errors import UserError
from dwt_jax.runs.run_dir import MAY_CHANGE, load_model, read_json, write_json
from dwt_jax.study.sweep import Job

NAME = "source.json"


class Sources:
    """Looks at finished jobs; models are read once."""

    def __init__(self, by_name: Mapping[str, Job]):
        self._by_name = by_name
        self._digests: dict[str, str] = {}

    def look(self, job: Job) -> None:
        """Raises UserError where `job` was made of something else. A source that is not done is not
        judged: it may yet become the one that was there."""
        needs = [self._by_name[name] for name in job.needs]
        if not all(need.is_done() for need in needs):
            return
        if job.kind != "train":
            path = job.workdir / NAME
            if path.exists() and read_json(path) != _record(needs[0]):
                raise UserError(_another(job, f"run of {needs[0].name!r}"))
            return
        record = read_json(job.workdir / "run.json") if (job.workdir / "config.json").exists() else {}
        borrowed = {"teacher_digest": job.config.teacher.path, "init_digest": job.config.init.from_}
        for key, model in borrowed.items():
            mine = [need for need in needs if model and need.workdir == Path(model)]
            if mine and record.get(key) and record[key] != self._digest(model):
                raise UserError(_another(job, f"model than that of {mine[0].name!r}"))

    def _digest(self, path: str) -> str:
        """Of the model in a run's directory, as a run that borrows it writes it down."""
        from dwt_jax.runs.pretrained import digest

        if path not in self._digests:
            self._digests[path] = digest(load_model(path).params)
        return self._digests[path]

    def note(self, job: Job) -> None:
        """Before a job begins: what it is made of. Of pre-training its own run.json tells that."""
        if job.kind != "train" and not (job.workdir / NAME).exists():
            job.workdir.mkdir(parents=True, exist_ok=True)
            write_json(job.workdir / NAME, _record(self._by_name[job.needs[0]]))


def _another(job: Job, what: str) -> str:
    return (
        f"{job.workdir}: was made of another {what}, expected the one that is there now "
        "(remove it, and it is done again; or give the arm another name)"
    )


def _record(run: Job) -> dict[str, str]:
    """What decides the numbers of a pre-training run: done again with the same config, it is the same."""
    config = flatten(read_json(run.workdir / "config.json"))
    kept = {key: value for key, value in config.items() if not key.startswith(MAY_CHANGE)}
    text = json.dumps([kept, read_json(run.workdir / "run.json")], sort_keys=True)
    return {"run": run.name, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}
