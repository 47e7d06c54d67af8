"""launch/tpu_vm.sh against a gcloud that plays states: waiting, active, pre-empted, failed."""

import subprocess
import time

import pytest

from helpers.clouds import TPU, TRAIN

MISSING = [
    1,
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'weak' was not found",
]
STATE, ENDED = "queued-resources describe", "--worker=0 --command=cat dwt-jax/run.status"


def states(*names):
    """Answers of gcloud about the queued resource; NONE: there is none."""
    return [MISSING if name == "NONE" else [0, name] for name in names]


def ended(*words):
    """What worker 0 says of the run: its status, runs, or gone."""
    return [[0, str(word)] for word in words]


def until_done(cloud, *more, answers, **variables):
    return cloud.run("tpu_vm.sh", "until-done", *TPU, *more, "--", *TRAIN, answers=answers, **variables)


def test_a_slice_is_made_again_until_the_run_is_done(cloud):
    """Queued, lost while it trains, stopped by a signal on a slice that stays, done, given back."""
    answers = {
        STATE: states(
            *("NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"),  # made, waited for
            *("ACTIVE", "SUSPENDING"),  # trains, is lost
            *("SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"),  # made again, stopped
            *("ACTIVE", "ACTIVE", "ACTIVE"),  # as it is, done
        ),
        ENDED: ended("gone", "runs", 75, 0),
    }
    found = until_done(cloud, "--spot", answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("queued-resources create weak", "--spot")) == 2
    assert len(cloud.calls("queued-resources delete weak", "--force")) == 2
    assert len(cloud.calls("tpu-vm scp", "--worker=all")) == 3
    starts = cloud.calls("tpu-vm ssh", "setsid", "--worker=all")
    assert len(starts) == 3
    assert "/shared/my\\ run" in starts[0][-1]
    assert cloud.calls()[-1][1:5] == ["compute", "tpus", "queued-resources", "delete"]
    assert all(call[-1] == "--force" and call[5] == "weak" for call in cloud.calls("delete"))  # nothing else
    assert "weak is WAITING_FOR_RESOURCES" in found.stderr
    # What the others still run has to end before it is started again, but not before the first time.
    order = [call[-1] for call in cloud.calls("--worker=all", "--command")]
    assert ["kill -TERM" in command for command in order] == [
        False,
        False,
        True,
        False,
        False,
        True,
        *[False] * 2,
    ]


@pytest.mark.parametrize("status", [2, 3, 1])
def test_a_failure_is_not_tried_again_and_the_slice_stays_for_its_logs(cloud, status):
    found = until_done(cloud, answers={STATE: states("ACTIVE"), ENDED: ended("gone", "runs", status)})
    assert found.returncode == status
    assert len(cloud.calls("setsid")) == 1
    assert not cloud.calls("delete")
    assert "launch/tpu_vm.sh logs --name=weak" in found.stderr


def test_a_failure_because_a_host_was_taken_is_no_failure(cloud):
    """The others end with 1 before the slice's state shows it."""
    answers = {
        STATE: states("ACTIVE", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"),
        ENDED: ended("gone", 1, 0),
    }
    found = until_done(cloud, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("queued-resources create")) == 1
    assert len(cloud.calls("setsid")) == 2


def test_a_run_that_vanished_is_started_again(cloud):
    """After a restart of the machine there is neither a process nor a status: that is not waited for."""
    found = until_done(
        cloud, answers={STATE: states("ACTIVE"), ENDED: ended("gone", "runs", "gone", "runs", 0)}
    )
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("setsid")) == 2


def test_a_run_that_is_there_is_watched_and_not_touched(cloud):
    found = until_done(cloud, answers={STATE: states("ACTIVE"), ENDED: ended("runs", "runs", 0)})
    assert found.returncode == 0, found.stderr
    assert "the run is there already" in found.stderr
    assert not cloud.calls("scp")
    assert not cloud.calls("setsid")


def test_attempts_and_waiting_have_a_limit(cloud):
    found = until_done(cloud, "--attempts=3", answers={STATE: states("ACTIVE"), ENDED: ended(75)})
    assert found.returncode == 1
    assert len(cloud.calls("setsid")) == 3
    assert "not done after 3 attempts" in found.stderr
    answers = {STATE: states("WAITING_FOR_RESOURCES")}
    for verb in ("wait", "until-done"):
        found = cloud.run("tpu_vm.sh", verb, *TPU, "--", *TRAIN, answers=answers, WAIT_LIMIT="0")
        assert found.returncode == 1
        assert "still WAITING_FOR_RESOURCES after 0 s (WAIT_LIMIT), expected ACTIVE" in found.stderr
    found = until_done(cloud, answers={STATE: states("DELETING")}, WAIT_LIMIT="0")
    assert found.returncode == 1
    assert "still DELETING" in found.stderr
    assert not cloud.calls("create")


def test_a_request_that_failed_is_made_anew(cloud):
    answers = {STATE: states("FAILED", "FAILED", "FAILED", "ACTIVE"), ENDED: ended("gone", 0)}
    found = until_done(cloud, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("queued-resources create")) == 2


@pytest.mark.parametrize("what", ["create", "delete"])
def test_a_request_that_is_refused_is_not_repeated(cloud, what):
    answers = {STATE: states("NONE" if what == "create" else "FAILED"), what: [[1, "no quota"]]}
    found = until_done(cloud, answers=answers)
    assert found.returncode == 1
    assert "no quota" in found.stderr
    assert len(cloud.calls(what)) == 1


def test_a_cloud_that_does_not_answer_is_not_an_empty_one(cloud):
    """Once: asked again. For long: the end, with its message; nothing is made or deleted."""
    hiccup = [1, "ERROR: connection reset"]
    answers = {
        STATE: [[0, "ACTIVE"], hiccup, [0, "ACTIVE"], hiccup, hiccup, [0, "ACTIVE"]],
        ENDED: ended("runs", 0),
    }
    found = until_done(cloud, answers=answers)
    assert found.returncode == 0, found.stderr
    assert not cloud.calls("create")
    found = until_done(cloud, answers={STATE: [[1, "ERROR: login needed"]]})
    assert found.returncode == 1
    assert "the state of weak cannot be read: ERROR: login needed" in found.stderr
    assert not cloud.calls("create")


def test_workers_that_cannot_be_reached_are_tried_again(cloud):
    answers = {
        STATE: states("ACTIVE"),
        "tpu-vm scp": [[1, ""], [0, ""]],
        ENDED: [[255, ""], *ended("runs"), [255, ""], *ended(0)],
    }
    found = until_done(cloud, answers=answers)
    assert found.returncode == 0, found.stderr
    assert len(cloud.calls("setsid")) == 1
    assert "not all workers could be reached" in found.stderr


def on_worker(cloud, home, verb, *words):
    """The command that ssh would run, run here."""
    (cloud.folder / "calls.jsonl").unlink(missing_ok=True)
    cloud.run("tpu_vm.sh", verb, *TPU, *words)
    command = cloud.calls("tpu-vm ssh")[-1][-1].removeprefix("--command=")
    found = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def eventually(what, value):
    deadline = time.monotonic() + 30
    while what() != value and time.monotonic() < deadline:
        time.sleep(0.05)
    assert what() == value


def test_what_is_started_on_a_worker_runs_detached_once_and_leaves_its_status(cloud, tmp_path):
    """With a program in place of python, that ends with 75 at SIGTERM."""
    home = tmp_path / "home"
    (home / "dwt-jax" / "launch").mkdir(parents=True)
    (home / "dwt-jax" / "launch" / "env.sh").write_text("export SOURCED=1\n")
    python = home / "dwt-jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    log = home / "dwt-jax" / "run.log"
    says = 'printf "%s|" "$SOURCED" "$@"'
    python.write_text(f"#!/bin/bash\ntrap 'exit 75' TERM\n{says}\nfor i in $(seq 200); do sleep 0.1; done\n")
    python.chmod(0o755)
    assert on_worker(cloud, home, "status") == "gone"
    assert on_worker(cloud, home, "stop") == ""
    said = "|".join(["1", "-m", "dwt_jax", *TRAIN, ""])
    assert on_worker(cloud, home, "run", "--", *TRAIN) == ""
    eventually(log.read_text, said)
    assert on_worker(cloud, home, "status") == "runs"
    assert on_worker(cloud, home, "run", "--", *TRAIN) == "runs already"
    on_worker(cloud, home, "stop")
    eventually(lambda: on_worker(cloud, home, "status"), "75")
    on_worker(cloud, home, "run", "--", *TRAIN)
    eventually(lambda: log.read_text().count(said), 2)
    subprocess.run(
        ["kill", "-KILL", "--", f"-{(home / 'dwt-jax' / 'run.pid').read_text().strip()}"], check=True
    )
    eventually(lambda: on_worker(cloud, home, "status"), "gone")
