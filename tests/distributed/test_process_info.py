"""Detection of the processes of a run from the environment."""

import pytest

from dwt_jax.distributed.process_info import (
    COORDINATOR_ADDRESS_ENV,
    NUM_PROCESSES_ENV,
    PROCESS_ID_ENV,
    ProcessInfo,
    detect_processes,
)
from dwt_jax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-04],x",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def explicit(address, num_processes, process_id):
    """The three variables."""
    return {
        COORDINATOR_ADDRESS_ENV: address,
        NUM_PROCESSES_ENV: num_processes,
        PROCESS_ID_ENV: process_id,
    }


def test_detect_processes_is_none_for_a_single_process(set_env):
    assert detect_processes() is None
    set_env(**explicit("host:1", "1", "0"))
    assert detect_processes() is None


def test_detect_processes_prefers_the_variables(set_env):
    set_env(**SLURM, **explicit("[fe80::1]:1234", "16", "15"))
    assert detect_processes() == ProcessInfo(15, 16, "[fe80::1]:1234", COORDINATOR_ADDRESS_ENV, "deactivate")


@pytest.mark.parametrize(
    ("variables", "message"),
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
        (explicit("a:1", "two", "0"), f"{NUM_PROCESSES_ENV}: 'two', expected a whole number"),
        (explicit("a:1", "2", "-1"), f"{PROCESS_ID_ENV}: '-1', expected a whole number"),
        (
            explicit("a:1", "2", "2"),
            rf"{PROCESS_ID_ENV}: 2, expected from 0 to {NUM_PROCESSES_ENV} - 1 \(1\)",
        ),
        (explicit("a:1", "0", "0"), f"{PROCESS_ID_ENV}: 0, expected from 0"),
        (explicit("host", "2", "0"), f"{COORDINATOR_ADDRESS_ENV}: 'host', expected HOST:PORT"),
        (explicit("host:99999", "2", "0"), "expected HOST:PORT"),
    ],
)
def test_detect_processes_refuses_invalid_variables_by_name(set_env, variables, message):
    set_env(**variables)
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
def test_detect_processes_refuses_loopback_with_several_hosts(set_env, address, hosts):
    set_env(**explicit(address, "2", "0"))
    assert detect_processes() is not None
    set_env(**hosts)
    with pytest.raises(UserError, match=r"is each host's own address, but .*2|is each host's .* 1 of 2"):
        detect_processes()


def test_detect_processes_uses_slurm_without_connecting(set_env):
    set_env(**SLURM)
    port = 7 % 2**12 + 65535 - 2**12 + 1  # jax's own rule
    assert detect_processes() == ProcessInfo(3, 8, f"node01:{port}", "jax's detection of 'slurm'", "slurm")
    set_env(SLURM_NTASKS="1", SLURM_PROCID="0")
    assert detect_processes() is None


def test_detect_processes_refuses_an_mpi_unknown_to_jax_without_mpi4py(set_env):
    set_env(OMPI_COMM_WORLD_SIZE="4")
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE: 4 processes .* expected the package mpi4py"):
        detect_processes()
