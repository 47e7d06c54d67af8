"""Several processes, one of which is told something else, is stopped early, or cannot write."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from dwt_jax.distributed.coordination import PROCESS_LOGS_ENV
from dwt_jax.distributed.initialize import COORDINATOR_ADDRESS_ENV, NUM_PROCESSES_ENV, PROCESS_ID_ENV
from dwt_jax.distributed.shutdown import Preempted, defer_signals, handle_signals
from helpers.paths import PYTHONPATH
from helpers.runs import dwt, ended, environment, free_port, start_several


def test_a_signal_before_there_is_anything_to_save_is_kept_until_then():
    with defer_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match="nothing was changed"), handle_signals():
            pytest.fail("went on")
    with handle_signals() as stopping:
        assert not stopping.is_set()
    with defer_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


EARLY = """
import signal, sys
sys.modules["jax"] = None  # the command must hear a signal before this fails
from dwt_jax import config_loader

def load(*_):
    signal.raise_signal(signal.SIGTERM)
    from dwt_jax.distributed.shutdown import handle_signals
    with handle_signals():
        pass

config_loader.load_config = load
from dwt_jax.cli import main
from dwt_jax.cli.exit_status import EXIT_RESUMABLE
from dwt_jax.distributed.shutdown import Preempted
try:
    main(["train", "--config=x.py", "--workdir=x"])
except Preempted:
    sys.exit(EXIT_RESUMABLE)
"""


def test_training_hears_signals_before_jax_is_imported():
    done = subprocess.run([sys.executable, "-c", EARLY], env=environment(PYTHONPATH=PYTHONPATH), check=False)
    assert done.returncode == 75


START = """
import sys
from dwt_jax.distributed import initialize
sys.exit(initialize.run_distributed(lambda: 0))
"""


def begun(variables: list[dict[str, str]]) -> list[tuple[int, str]]:
    """START in processes with the same coordinator, and variables of their own."""
    address = {
        COORDINATOR_ADDRESS_ENV: f"localhost:{free_port()}",
        "PYTHONPATH": PYTHONPATH,
        "DWT_START_TIMEOUT": "60",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**address, **each),
        )
        for each in variables
    ]
    return ended(started)


def test_processes_that_count_differently_are_refused():
    done = begun(
        [{NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: "0"}, {NUM_PROCESSES_ENV: "3", PROCESS_ID_ENV: "1"}]
    )
    assert [status for status, _ in done] == [2, 2], done
    assert f"dwt: {NUM_PROCESSES_ENV} is 3 in process 1, expected 2 as in process 0" in done[0][1]
    assert "expected 2" not in done[1][1]


def test_a_log_that_cannot_be_written_ends_all(tmp_path):
    (tmp_path / "file").touch()
    done = begun(
        [
            {NUM_PROCESSES_ENV: "2", PROCESS_ID_ENV: str(i), PROCESS_LOGS_ENV: str(tmp_path / "file")}
            for i in range(2)
        ]
    )
    assert [status for status, _ in done] == [2, 2], done
    assert "process 1 ended with status 2, so process 0 ends too" in done[0][1]
    assert f"dwt: {PROCESS_LOGS_ENV}: {tmp_path / 'file'}" in done[1][1]
    assert "Traceback" not in done[0][1] + done[1][1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_coordinators_port_that_is_taken_is_refused(host):
    with socket.create_server((host, 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        variables = {
            COORDINATOR_ADDRESS_ENV: f"localhost:{port}",
            NUM_PROCESSES_ENV: "2",
            PROCESS_ID_ENV: "0",
        }
        done = dwt("train", "--config=x.py", "--workdir=x", variables=variables)
    assert done.returncode == 2
    assert (
        f"dwt: {COORDINATOR_ADDRESS_ENV}: port {port} is taken on this host, expected a free one"
        in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


HANGS = """
import sys
from dwt_jax.distributed import initialize, coordination
from dwt_jax.distributed.shutdown import Preempted, handle_signals

def work():
    try:
        with handle_signals():
            coordination.all_gather_objects("")
            if coordination.process_index() == 0:
                client = coordination.coordination_client()
                client.wait_at_barrier("nobody else comes here", 300_000)  # hears no signal
            raise Preempted("")
    except Preempted:
        return 75

sys.exit(initialize.run_distributed(work))
"""


def test_a_process_that_hangs_when_another_was_stopped_ends_as_that_one():
    """Nor does the other, for which the coordinator is lost with it, end by jax's abort."""
    began = time.monotonic()
    done = ended(start_several(["-c", HANGS], 2, PYTHONPATH=PYTHONPATH, DWT_HEARTBEAT_TIMEOUT="6"))
    assert [status for status, _ in done] == [75, 75], done
    assert time.monotonic() - began < 60


WRITES = """
import resource, sys
from pathlib import Path
import numpy as np
from dwt_jax.distributed import initialize, coordination

def work():
    from dwt_jax.config import Mesh
    from dwt_jax.distributed.mesh import make_mesh, to_global, replicated_sharding
    from dwt_jax.runs.checkpoint import Checkpoints
    from dwt_jax.distributed.shutdown import handle_signals

    with handle_signals():
        x = np.random.default_rng(0).normal(size=(200, 200))
        state = {"x": to_global(x, replicated_sharding(make_mesh(Mesh(), 2)))}
        checkpoints = Checkpoints(Path(sys.argv[1]), 3)
        for step in (1, 2):
            checkpoints.save(step, state)
        checkpoints.wait()
        if coordination.process_index() == int(sys.argv[2]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # bytes: as if the disk were full
        checkpoints.save(3, state)
        checkpoints.wait()
    return 0

sys.exit(initialize.run_distributed(work))
"""


@pytest.mark.parametrize("unable", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path, unable):
    """At once: the barriers of Orbax's threads would wait for 20 minutes."""
    command = ["-c", WRITES, str(tmp_path / "checkpoints"), str(unable)]
    began = time.monotonic()
    done = ended(start_several(command, 2, PYTHONPATH=PYTHONPATH, DWT_HEARTBEAT_TIMEOUT="100"))
    assert [status for status, _ in done] == [1, 1], done
    assert "File too large" in done[unable][1]
    assert f"process {unable} ended with status 1, so process {1 - unable} ends too" in done[1 - unable][1]
    assert time.monotonic() - began < 90
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert sorted(kept) == ["1", "2"]
