"""Several processes: how they find each other, that they compute what one does, and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.distributed import initialize
from dwt_jax.distributed.initialize import (
    COORDINATOR_ADDRESS_ENV,
    NUM_PROCESSES_ENV,
    PROCESS_ID_ENV,
    ProcessInfo,
    detect_processes,
)
from dwt_jax.errors import UserError
from helpers.paths import PYTHONPATH
from helpers.runs import dwt, ended, environment, free_port, prepared_project, start_several

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-04],x",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def say(monkeypatch):
    """say(NAME=value): the environment, without what this machine's own says."""
    for name in os.environ:
        if name.startswith(
            ("JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "SLURM", "OMPI", "PMI", "TPU_W", "KUBE")
        ):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_one_process_unless_something_says_otherwise(say):
    assert detect_processes() is None
    say(**{COORDINATOR_ADDRESS_ENV: "host:1", NUM_PROCESSES_ENV: "1", PROCESS_ID_ENV: "0"})
    assert detect_processes() is None


def test_explicit_variables_come_first(say):
    say(**SLURM, **{COORDINATOR_ADDRESS_ENV: "[fe80::1]:1234", NUM_PROCESSES_ENV: "16", PROCESS_ID_ENV: "15"})
    assert detect_processes() == ProcessInfo(15, 16, "[fe80::1]:1234", COORDINATOR_ADDRESS_ENV, "deactivate")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {COORDINATOR_ADDRESS_ENV: "a:1"},
            f"{NUM_PROCESSES_ENV} and {PROCESS_ID_ENV}: not set, but {COORDINATOR_ADDRESS_ENV}: "
            "expected all three or none",
        ),
        (
            {NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "1"},
            f"{COORDINATOR_ADDRESS_ENV}: not set, but {NUM_PROCESSES_ENV} and {PROCESS_ID_ENV}",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "a:1", NUM_PROCESSES_ENV: "two", PROCESS_ID_ENV: "0"},
            f"{NUM_PROCESSES_ENV}: 'two', expected a whole number",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "a:1", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "-1"},
            f"{PROCESS_ID_ENV}: '-1', expected a whole number",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "a:1", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "2"},
            rf"{PROCESS_ID_ENV}: 2, expected from 0 to {NUM_PROCESSES_ENV} - 1 \(1\)",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "a:1", NUM_PROCESSES_ENV: "0", PROCESS_ID_ENV: "0"},
            f"{PROCESS_ID_ENV}: 0, expected from 0",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "host", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"},
            f"{COORDINATOR_ADDRESS_ENV}: 'host', expected HOST:PORT",
        ),
        (
            {COORDINATOR_ADDRESS_ENV: "host:99999", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"},
            "expected HOST:PORT",
        ),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(say, given, message):
    say(**given)
    with pytest.raises(UserError, match=message):
        detect_processes()


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.2:1", "[::1]:1"])
@pytest.mark.parametrize(
    "hosts",
    [
        {"SLURM_STEP_NUM_NODES": "2"},
        {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
    ],
)
def test_loopback_is_refused_for_several_hosts(say, address, hosts):
    say(**{COORDINATOR_ADDRESS_ENV: address, NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"})
    assert detect_processes() is not None
    say(**hosts)
    with pytest.raises(UserError, match=r"is each host's own address, but .*2|is each host's .* 1 of 2"):
        detect_processes()


def test_what_jax_detects_is_told_before_anything_waits(say):
    say(**SLURM)
    port = 7 % 2**12 + 65535 - 2**12 + 1  # jax's own rule
    assert detect_processes() == ProcessInfo(3, 8, f"node01:{port}", "jax's detection of 'slurm'", "slurm")
    say(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert detect_processes() is None


def test_an_mpi_that_jax_does_not_know_is_not_taken_for_one_process(say):
    say(OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE: 4 processes .* expected the package mpi4py"):
        detect_processes()


def test_a_platform_that_jax_may_not_use_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    initialize.check_platform("any")
    initialize.check_platform("gpu")
    with pytest.raises(UserError, match="platform is 'tpu', but JAX_PLATFORMS allows 'cuda,cpu' alone"):
        initialize.check_platform("tpu")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_limit_is_a_positive_number_of_seconds(monkeypatch, value):
    monkeypatch.setenv(initialize.START_TIMEOUT_ENV, value)
    with pytest.raises(UserError, match=rf"{initialize.START_TIMEOUT_ENV}: '{value}', expected seconds"):
        initialize.env_seconds(initialize.START_TIMEOUT_ENV, 300)


def test_other_commands_run_in_one_process(say, capsys):
    say(**{COORDINATOR_ADDRESS_ENV: "localhost:1", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"})
    assert main(["evaluate", "--model=x", "--data=y"]) == 2
    assert "JAX_NUM_PROCESSES: 2, expected 1: 'dwt evaluate' runs in one process" in capsys.readouterr().err


def test_a_workdir_in_a_bucket_is_refused():
    from dwt_jax.runs.run_dir import run_lock

    with (
        pytest.raises(UserError, match=r"gs:/bucket/run begins with gs:/, expected a directory"),
        run_lock(Path("gs://bucket/run")),
    ):
        pass


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            1,
            r"process 1: after 1 s nobody answers at the coordinator localhost:\d+, expected process 0 there",
        ),
        (
            0,
            r"process 0: after 1 s not all of the 3 processes have come to the coordinator localhost:\d+,",
        ),
    ],
)
def test_waiting_ends_with_a_line_that_names_what_is_missing(tmp_path, index, message):
    variables = {
        COORDINATOR_ADDRESS_ENV: f"localhost:{free_port()}",
        NUM_PROCESSES_ENV: "3",
        PROCESS_ID_ENV: str(index),
        "DWT_START_TIMEOUT": "1",
    }
    done = dwt("train", "--config=x.py", f"--workdir={tmp_path}", variables=variables)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("dwt: ")]
    assert re.match(
        rf"dwt: process {index} of 3 \(the first is 0\), "
        rf"coordinator localhost:\d+ \(from {COORDINATOR_ADDRESS_ENV}\)",
        said[0],
    )
    assert re.match(f"dwt: {message}", said[1])
    assert "Traceback" not in done.stderr


AGREE = """
import random, sys, time
import jax
from dwt_jax.distributed import initialize, coordination
from dwt_jax.distributed.shutdown import TrainingFailed, handle_signals

def work():
    me = coordination.process_index()
    assert coordination.all_gather_objects({"n": me}) == [{"n": i} for i in range(4)]
    assert coordination.run_on_main(lambda: 10 + me) == 10

    def fail_in_process_2():
        if me == 2:
            raise coordination.UserError("bad")

    try:
        coordination.run_on_all(fail_in_process_2)
    except coordination.UserError as error:
        assert str(error) == "process 2: bad" and (type(error) is coordination.UserError) == (me == 0), error
    draw, calls = random.Random(me), 0
    with handle_signals() as stopping:
        stopping.poll()
        while True:
            calls += 1
            if me == 3 and calls == 40:
                signal.raise_signal(signal.SIGTERM)
            if stopping.is_set():
                break
            time.sleep(draw.uniform(0, 0.02))
        assert stopping.is_set()
    print("CALLS", calls, flush=True)
    return 75

import signal
sys.exit(initialize.run_distributed(work))
"""


def test_all_processes_stop_at_the_same_question_though_one_was_asked():
    """Without a device: nothing keeps them in step but the agreement."""
    done = ended(start_several(["-c", AGREE], 4, PYTHONPATH=PYTHONPATH))
    assert [status for status, _ in done] == [75] * 4, done
    calls = {int(re.search(r"CALLS (\d+)", said)[1]) for _, said in done}
    assert len(calls) == 1
    assert calls.pop() > 40


WATCHED = """
import threading, time
from dwt_jax.distributed.watchdog import hang_watchdog

def stuck():
    threading.Event().wait()

with hang_watchdog(0.5) as beat:
    for _ in range(10):
        time.sleep(0.1)
        beat()
    print("alive", flush=True)
    stuck()
"""


def test_the_watchdog_shows_where_every_thread_is_and_ends_the_process():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert 1.4 < time.monotonic() - began < 20
    assert done.stdout == "alive\n"
    assert "dwt: no step for 0.5 s (train.watchdog)" in done.stderr
    assert "in stuck" in done.stderr
    assert done.stderr.count("Thread 0x") + done.stderr.count("Current thread") >= 2


# Runs

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return prepared_project(folder), folder


def train(project, workdir: str, *more: str) -> list[str]:
    """Many steps at a small rate: a difference in rounding stays what it is."""
    keys = {"steps": 100, "eval_every": 0, "log_every": 1, "save_every": 1000}
    settings = [f"--config.train.{key}={value}" for key, value in keys.items()]
    rate = "--config.optimizer.learning_rate.value=1e-5"
    return [
        "-m",
        "dwt_jax",
        "train",
        f"--config={project[0]}",
        *settings,
        rate,
        *more,
        f"--workdir={project[1] / workdir}",
    ]


def losses(project, workdir: str) -> np.ndarray:
    lines = (project[1] / workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [record["step"] for record in found] == list(range(1, 101))
    last = json.loads((project[1] / workdir / "evaluations.jsonl").read_text())
    return np.array([*(record["loss"] for record in found), last["held_out_loss"]])


def until(process: subprocess.Popen[str], text: str) -> None:
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} was never said: {''.join(said)}")


def begin(*words, **more):
    return start_several(*words, XLA_FLAGS=QUICK, **more)


@pytest.fixture(scope="module")
def whole(project):
    """One process with four devices."""
    [(status, said)] = ended(begin(train(project, "whole"), 1, 4))
    assert status == 0, said
    return losses(project, "whole")


def test_stopped_as_two_processes_and_resumed_as_one_with_the_same_losses(project, whole):
    """2 x 2, SIGTERM to the second process alone, then 1 x 4: every loss is that of 1 x 4 throughout."""
    command = train(project, "moved", *MESH)
    two = begin(command, 2, 2)
    until(two[0], "step 2/100")
    two[1].send_signal(signal.SIGTERM)
    done = ended(two)
    assert [status for status, _ in done] == [75, 75], done
    steps = {int(re.search(r"stopped at step (\d+), saved", said)[1]) for _, said in done}
    assert len(steps) == 1
    assert "/100" not in done[1][1]  # only the first says how far it is
    [(status, said)] = ended(begin(train(project, "moved"), 1, 4))
    assert status == 0, said
    assert f"resumed at step {steps.pop()}" in said
    np.testing.assert_allclose(losses(project, "moved"), whole, rtol=1e-6)


@pytest.mark.slow
def test_two_and_four_processes_compute_what_one_does(project, whole, tmp_path):
    """2 x 2 from the beginning to the end, in fsdp; 4 x 1, begun by 1 x 4."""
    two = ended(begin(train(project, "two", "--config.mesh.fsdp=4", "--config.mesh.data=1"), 2, 2))
    assert [status for status, _ in two] == [0, 0], two
    np.testing.assert_allclose(losses(project, "two"), whole, rtol=1e-6)
    [one] = begin(train(project, "four"), 1, 4)
    until(one, "step 2/100")
    one.send_signal(signal.SIGTERM)
    assert ended([one])[0][0] == 75
    logs = tmp_path / "logs"
    four = ended(begin(train(project, "four"), 4, 1, DWT_PROCESS_LOGS=str(logs)))
    assert [status for status, _ in four] == [0] * 4, four
    np.testing.assert_allclose(losses(project, "four"), whole, rtol=1e-6)
    assert sorted(path.name for path in logs.iterdir()) == [f"process-{i}.log" for i in (1, 2, 3)]
    assert "step 100/100" in (logs / "process-3.log").read_text()
    one, other = (
        {p.relative_to(project[1] / name) for p in (project[1] / name / "model").iterdir()}
        for name in ("whole", "two")
    )
    assert one == other


def test_a_process_that_is_killed_ends_the_others(project):
    two = begin(
        train(project, "killed", *MESH, "--config.train.steps=100000"), 2, 2, DWT_HEARTBEAT_TIMEOUT="5"
    )
    until(two[0], "step 2/")
    began = time.monotonic()
    two[1].kill()
    (status, said), _ = ended(two, 60)
    assert status not in (0, 75), said
    assert time.monotonic() - began < 45


def test_another_config_in_one_process_ends_all_with_its_name(project):
    command, others = train(project, "odd"), train(project, "odd", "--config.seed=1")
    (status, said), (other, silent) = ended(begin(command, 2, others=others))
    assert (status, other) == (2, 2), (said, silent)
    assert "dwt: seed is 1 in process 1, expected 0 as in process 0" in said
    assert "expected" not in silent
    assert not (project[1] / "odd").exists()


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_by_its_watchdog(project):
    more = ["--config.train.steps=100000", "--config.train.watchdog=30"]
    two = begin(train(project, "hung", *more), 2, DWT_HEARTBEAT_TIMEOUT="300")
    until(two[0], "step 20/")
    two[1].send_signal(signal.SIGSTOP)
    [(status, said)] = ended(two[:1], 180)
    two[1].kill()
    assert status == 1
    assert "dwt: no step for 30 s (train.watchdog)" in said
    assert "in train_loop" in said
