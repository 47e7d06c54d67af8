"""Training in several processes: the losses of one process, and how the processes end."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dwt_jax.errors import UserError
from dwt_jax.runs.run_dir import run_lock
from helpers.paths import PYTHONPATH
from helpers.quick_compile import COMPILE_QUICKLY
from helpers.runs import ended, prepared_project, start_several

MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """(config, folder for work directories)"""
    folder = tmp_path_factory.mktemp("several")
    return prepared_project(folder), folder


def train_command(project, workdir: str, *overrides: str) -> list[str]:
    """Many steps at a small learning rate, so that a difference in rounding does not grow."""
    train = {"steps": 100, "eval_every": 0, "log_every": 1, "save_every": 1000}
    return [
        "-m",
        "dwt_jax",
        "train",
        f"--config={project[0]}",
        *(f"--config.train.{key}={value}" for key, value in train.items()),
        "--config.optimizer.learning_rate.value=1e-5",
        *overrides,
        f"--workdir={project[1] / workdir}",
    ]


def losses(project, workdir: str) -> np.ndarray:
    """float [101]: the loss of each step, and the held-out loss at the end."""
    lines = (project[1] / workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 101))
    evaluation = json.loads((project[1] / workdir / "evaluations.jsonl").read_text())
    return np.array([*(record["loss"] for record in records), evaluation["held_out_loss"]])


def wait_for_output(process: subprocess.Popen[str], text: str) -> None:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    pytest.fail(f"no {text!r} in the output: {''.join(lines)}")


def start(*args, **kwargs):
    return start_several(*args, XLA_FLAGS=" ".join(COMPILE_QUICKLY), **kwargs)


@pytest.fixture(scope="module")
def expected(project):
    """The losses of one process with four devices."""
    [(status, output)] = ended(start(train_command(project, "expected"), 1, 4))
    assert status == 0, output
    return losses(project, "expected")


def test_a_run_preempted_as_two_processes_resumes_as_one_with_the_same_losses(project, expected):
    """2 x 2 devices, SIGTERM to the second process only, then 1 x 4."""
    processes = start(train_command(project, "resumed", *MESH), 2, 2)
    wait_for_output(processes[0], "step 2/100")
    processes[1].send_signal(signal.SIGTERM)
    done = ended(processes)
    assert [status for status, _ in done] == [75, 75], done
    steps = {int(re.search(r"stopped at step (\d+)", output)[1]) for _, output in done}
    assert len(steps) == 1
    assert "/100" not in done[1][1]  # only process 0 logs steps
    [(status, output)] = ended(start(train_command(project, "resumed"), 1, 4))
    assert status == 0, output
    assert f"resumed at step {steps.pop()}" in output
    np.testing.assert_allclose(losses(project, "resumed"), expected, rtol=1e-6)


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(project, expected, tmp_path):
    """2 x 2 throughout, with fsdp; 4 x 1 for a run that 1 x 4 started."""
    fsdp = ("--config.mesh.fsdp=4", "--config.mesh.data=1")
    done = ended(start(train_command(project, "two", *fsdp), 2, 2))
    assert [status for status, _ in done] == [0, 0], done
    np.testing.assert_allclose(losses(project, "two"), expected, rtol=1e-6)

    [process] = start(train_command(project, "four"), 1, 4)
    wait_for_output(process, "step 2/100")
    process.send_signal(signal.SIGTERM)
    assert ended([process])[0][0] == 75
    logs = tmp_path / "logs"
    done = ended(start(train_command(project, "four"), 4, 1, DWT_PROCESS_LOGS=str(logs)))
    assert [status for status, _ in done] == [0] * 4, done
    np.testing.assert_allclose(losses(project, "four"), expected, rtol=1e-6)
    assert sorted(path.name for path in logs.iterdir()) == [f"process-{i}.log" for i in (1, 2, 3)]
    assert "step 100/100" in (logs / "process-3.log").read_text()
    assert model_files(project, "expected") == model_files(project, "two")


def model_files(project, workdir: str) -> set[str]:
    return {path.name for path in (project[1] / workdir / "model").iterdir()}


def test_a_killed_process_ends_the_others(project):
    command = train_command(project, "killed", *MESH, "--config.train.steps=100000")
    processes = start(command, 2, 2, DWT_HEARTBEAT_TIMEOUT="5")
    wait_for_output(processes[0], "step 2/")
    start_time = time.monotonic()
    processes[1].kill()
    (status, output), _ = ended(processes, 60)
    assert status not in (0, 75), output
    assert time.monotonic() - start_time < 45


def test_a_different_config_in_one_process_ends_all_with_its_key(project):
    command = train_command(project, "different")
    others = train_command(project, "different", "--config.seed=1")
    (status, output), (other_status, other_output) = ended(start(command, 2, others=others))
    assert (status, other_status) == (2, 2), (output, other_output)
    assert "dwt: seed is 1 in process 1, expected 0 as in process 0" in output
    assert "expected" not in other_output
    assert not (project[1] / "different").exists()


@pytest.mark.slow
def test_the_watchdog_ends_a_run_that_hangs(project):
    overrides = ["--config.train.steps=100000", "--config.train.watchdog=30"]
    processes = start(train_command(project, "hung", *overrides), 2, DWT_HEARTBEAT_TIMEOUT="300")
    wait_for_output(processes[0], "step 20/")
    processes[1].send_signal(signal.SIGSTOP)
    [(status, output)] = ended(processes[:1], 180)
    processes[1].kill()
    assert status == 1
    assert "dwt: no step for 30 s (train.watchdog)" in output
    assert "in train_loop" in output


def test_a_workdir_in_a_bucket_is_refused():
    with (
        pytest.raises(UserError, match=r"gs:/bucket/run begins with gs:/, expected a directory"),
        run_lock(Path("gs://bucket/run")),
    ):
        pass


SAVE_WITH_A_FULL_DISK = """
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


@pytest.mark.parametrize("failing", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path, failing):
    """They end at once: the barriers of Orbax's threads would wait for 20 minutes."""
    command = ["-c", SAVE_WITH_A_FULL_DISK, str(tmp_path / "checkpoints"), str(failing)]
    start_time = time.monotonic()
    done = ended(start_several(command, 2, PYTHONPATH=PYTHONPATH, DWT_HEARTBEAT_TIMEOUT="100"))
    assert [status for status, _ in done] == [1, 1], done
    assert "File too large" in done[failing][1]
    message = f"process {failing} ended with status 1, so process {1 - failing} ends too"
    assert message in done[1 - failing][1]
    assert time.monotonic() - start_time < 90
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert sorted(steps) == ["1", "2"]
