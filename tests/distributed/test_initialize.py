"""Checks before processes connect, and failures while they do."""

import re
import socket
import subprocess
import sys

import pytest

from dwt_jax.cli import main
from dwt_jax.distributed import initialize
from dwt_jax.distributed.coordination import PROCESS_LOGS_ENV, env_seconds
from dwt_jax.distributed.initialize import START_TIMEOUT_ENV
from dwt_jax.distributed.process_info import COORDINATOR_ADDRESS_ENV, NUM_PROCESSES_ENV, PROCESS_ID_ENV
from dwt_jax.errors import UserError
from helpers.paths import PYTHONPATH
from helpers.runs import dwt, ended, environment, free_port


def test_check_platform_refuses_a_platform_excluded_by_jax_platforms(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    initialize.check_platform("any")
    initialize.check_platform("gpu")
    with pytest.raises(UserError, match="platform is 'tpu', but JAX_PLATFORMS allows only 'cuda,cpu'"):
        initialize.check_platform("tpu")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_env_seconds_refuses_all_but_positive_numbers(monkeypatch, value):
    monkeypatch.setenv(START_TIMEOUT_ENV, value)
    with pytest.raises(UserError, match=rf"{START_TIMEOUT_ENV}: '{value}', expected a number of seconds"):
        env_seconds(START_TIMEOUT_ENV, 300)


def test_commands_of_a_single_process_refuse_several(set_env, capsys):
    set_env(**{COORDINATOR_ADDRESS_ENV: "localhost:1", NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"})
    assert main(["evaluate", "--model=x", "--data=y"]) == 2
    assert "JAX_NUM_PROCESSES: 2, expected 1: 'dwt evaluate' runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (1, r"process 1: after 1 s no answer from the coordinator localhost:\d+, expected process 0"),
        (
            0,
            r"process 0: after 1 s not all of the 3 processes have connected to the coordinator "
            r"localhost:\d+,",
        ),
    ],
)
def test_timeout_while_connecting_is_one_line_with_the_missing_part(tmp_path, index, message):
    variables = {
        COORDINATOR_ADDRESS_ENV: f"localhost:{free_port()}",
        NUM_PROCESSES_ENV: "3",
        PROCESS_ID_ENV: str(index),
        START_TIMEOUT_ENV: "1",
    }
    done = dwt("train", "--config=x.py", f"--workdir={tmp_path}", variables=variables)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith(("dwt: ", "process "))]
    assert re.match(
        rf"process {index} of 3 \(the first is 0\), "
        rf"coordinator localhost:\d+ \(from {COORDINATOR_ADDRESS_ENV}\)",
        lines[0],
    )
    assert re.match(f"dwt: {message}", lines[1])
    assert "Traceback" not in done.stderr


CONNECT = """
import sys
from dwt_jax.distributed import initialize
sys.exit(initialize.run_distributed(lambda: 0))
"""


def connect(variables: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Run CONNECT in processes with the same coordinator, each with its variables: (status, output)."""
    shared = {
        COORDINATOR_ADDRESS_ENV: f"localhost:{free_port()}",
        "PYTHONPATH": PYTHONPATH,
        START_TIMEOUT_ENV: "60",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONNECT],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**shared, **extra),
        )
        for extra in variables
    ]
    return ended(processes)


def test_different_process_counts_are_refused():
    done = connect(
        [{NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"}, {NUM_PROCESSES_ENV: "3", PROCESS_ID_ENV: "1"}]
    )
    assert [status for status, _ in done] == [2, 2], done
    assert f"dwt: {NUM_PROCESSES_ENV} is 3 in process 1, expected 2 as in process 0" in done[0][1]
    assert "expected 2" not in done[1][1]


def test_a_log_that_cannot_be_written_ends_all_processes(tmp_path):
    (tmp_path / "file").touch()
    logs = {PROCESS_LOGS_ENV: str(tmp_path / "file")}
    done = connect([{NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: str(i), **logs} for i in range(2)])
    assert [status for status, _ in done] == [2, 2], done
    assert "process 1 ended with status 2, so process 0 ends too" in done[0][1]
    assert f"dwt: {PROCESS_LOGS_ENV}: {tmp_path / 'file'}" in done[1][1]
    assert "Traceback" not in done[0][1] + done[1][1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_coordinator_port_in_use_is_refused(host):
    with socket.create_server((host, 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        variables = {
            COORDINATOR_ADDRESS_ENV: f"localhost:{port}",
            NUM_PROCESSES_ENV: "2",
            PROCESS_ID_ENV: "0",
        }
        done = dwt("train", "--config=x.py", "--workdir=x", variables=variables)
    assert done.returncode == 2
    message = f"dwt: {COORDINATOR_ADDRESS_ENV}: port {port} is in use on this host, expected a free one"
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
