"""Processes that divide the jobs of one study."""

import fcntl
import json
import re
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from dwt_jax.files import write_json
from dwt_jax.study import runner
from dwt_jax.study.job_lock import job_lock
from dwt_jax.study.sweep import load_study
from helpers.runs import ended, prepared_project, start


@pytest.fixture
def study_spec(tmp_path):
    """The spec of a study: a teacher, and students with and without it, of two seeds."""
    config = prepared_project(tmp_path)
    arm = {"config": config, "set": ["train.steps=4", "train.save_every=4", "train.eval_every=4"]}
    distilled = {**arm, "set": [*arm["set"], "distill.preset=paper_normal"], "teacher": "teacher"}
    study = {
        "title": "A study for two",
        "baseline": "alone",
        "arms": [
            {"name": "teacher", "role": "teacher", **arm},
            {"name": "alone", **arm, "seeds": [0, 1]},
            {"name": "distilled", **distilled, "seeds": [0, 1]},
        ],
    }
    path = tmp_path / "study.py"
    path.write_text(
        f"import json\ndef get_config():\n    return json.loads({json.dumps(json.dumps(study))})\n"
    )
    return str(path)


@pytest.mark.parametrize("is_done", [False, True])
def test_a_job_is_locked_against_others(tmp_path, is_done):
    """A lock file outlives a job that is not done, since another process may wait for that very file."""
    job = SimpleNamespace(workdir=tmp_path / "runs" / "alone", is_done=lambda: is_done)
    with job_lock(job) as is_locked:
        assert is_locked
        with job_lock(job) as is_locked_twice:
            assert not is_locked_twice
    assert [path.name for path in job.workdir.parent.iterdir()] == ([] if is_done else [".alone.lock"])
    with job_lock(job) as is_locked:
        assert is_locked


def test_processes_of_one_distributed_run_have_every_job(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    job = SimpleNamespace(workdir=tmp_path / "alone", is_done=lambda: False)
    with job_lock(job) as first, job_lock(job) as second:
        assert (first, second) == (True, True)


@pytest.mark.parametrize("other_finishes", [True, False], ids=["finishes", "is interrupted"])
def test_what_another_process_runs_is_waited_for(study_spec, tmp_path, monkeypatch, capsys, other_finishes):
    """The teacher is left to the other process, and runs here if that one ends early; its students wait."""
    workdir, started, other = tmp_path / "study", [], ExitStack()

    def finish(job):
        started.append(job.name)
        for path in job._last_files():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {})

    def other_process_ends(seconds):
        assert seconds > 0
        assert started == ["alone-seed0", "alone-seed1"]
        if other_finishes:
            write_json(workdir / "runs" / "teacher-seed0" / "summary.json", {})
        other.close()

    monkeypatch.setattr(runner, "_run_job", lambda study, job, *others: finish(job))
    monkeypatch.setattr(runner.time, "sleep", other_process_ends)
    (workdir / "runs" / "teacher-seed0").mkdir(parents=True)
    file = other.enter_context(open(workdir / "runs" / ".teacher-seed0.lock", "w"))
    fcntl.flock(file, fcntl.LOCK_EX)
    assert runner.run_study(load_study(study_spec), workdir)
    taught = ["distilled-seed0", "distilled-seed1"]
    assert started[2:] == (taught if other_finishes else ["teacher-seed0", *taught])
    waiting = "study: waiting for teacher-seed0, which another process runs"
    assert capsys.readouterr().err.splitlines().count(waiting) == 1


@pytest.mark.slow
def test_two_processes_run_every_job_once(study_spec, tmp_path):
    command = ("study", f"--config={study_spec}", f"--workdir={tmp_path / 'study'}")
    outputs = ended([start(*command), start(*command)])
    assert [status for status, _ in outputs] == [0, 0]
    begun = [re.findall(r"^study: \d of 5, (\S+)$", output, re.MULTILINE) for _, output in outputs]
    assert sorted(begun[0] + begun[1]) == [
        *("alone-seed0", "alone-seed1", "distilled-seed0", "distilled-seed1", "teacher-seed0")
    ]
    assert all(begun)
    for _, output in outputs:
        assert output.splitlines()[-1] == f"report in {tmp_path / 'study' / 'report.html'}"
    assert "5 of 5 runs are finished" in (tmp_path / "study" / "report.md").read_text()


def test_a_lock_file_that_cannot_be_opened_is_no_lack_of_locks(tmp_path):
    """A directory in its place here; a file of another user elsewhere. Only a file system may lack locks."""
    job = SimpleNamespace(workdir=tmp_path / "runs" / "alone", is_done=lambda: False)
    (tmp_path / "runs" / ".alone.lock").mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"), job_lock(job):
        pytest.fail("entered without a lock")


def test_a_lock_file_that_is_a_link_is_followed(tmp_path):
    job = SimpleNamespace(workdir=tmp_path / "runs" / "alone", is_done=lambda: False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".alone.lock").symlink_to(tmp_path / "elsewhere")
    with job_lock(job) as first, job_lock(job) as second:
        assert (first, second) == (True, False)
