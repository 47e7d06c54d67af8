"""Detection of the processes of a run, before any of them connects. See docs/processes.md."""

import os
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

from dwt_jax.errors import UserError

COORDINATOR_ADDRESS_ENV, NUM_PROCESSES_ENV, PROCESS_ID_ENV = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
_OTHER_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by MPIs that jax does not know by itself


class ProcessInfo(NamedTuple):
    """One process of several.

    Attributes:
        process_id: its index.
        num_processes: their number.
        coordinator: HOST:PORT of process 0; empty where jax finds it when it connects.
        source: where these values come from, for messages.
        method: jax's cluster_detection_method; "deactivate" if the variables are set.
    """

    process_id: int
    num_processes: int
    coordinator: str
    source: str
    method: str


def detect_processes() -> ProcessInfo | None:
    """Detect this process among several, from the three variables, or else as jax does.

    Returns:
        None for a single process.

    Raises:
        UserError: the variables are incomplete or invalid, or the coordinator is on the loopback
            interface while the processes are on several hosts.
    """
    info = process_info_from_env() or _process_info_from_jax()
    if info is None or info.num_processes == 1:
        return None
    if info.coordinator and is_loopback_address(info.coordinator) and (evidence := _multi_host_evidence()):
        raise UserError(
            f"{COORDINATOR_ADDRESS_ENV}: {info.coordinator} is each host's own address, but {evidence}, "
            "expected the name of the host of process 0"
        )
    return info


def process_info_from_env() -> ProcessInfo | None:
    """Read the three variables; None if none of them is set.

    Raises:
        UserError: some are missing or invalid.
    """
    env = {
        name: os.environ.get(name, "").strip()
        for name in (COORDINATOR_ADDRESS_ENV, NUM_PROCESSES_ENV, PROCESS_ID_ENV)
    }
    set_names = [name for name, value in env.items() if value]
    if not set_names:
        return None
    if missing := [name for name in env if name not in set_names]:
        raise UserError(
            f"{' and '.join(missing)}: not set, but {' and '.join(set_names)}: expected all three or none"
        )
    for name in (NUM_PROCESSES_ENV, PROCESS_ID_ENV):
        if not env[name].isdecimal():
            raise UserError(f"{name}: {env[name]!r}, expected a whole number")
    count, index = int(env[NUM_PROCESSES_ENV]), int(env[PROCESS_ID_ENV])
    if not index < count:
        raise UserError(
            f"{PROCESS_ID_ENV}: {index}, expected from 0 to {NUM_PROCESSES_ENV} - 1 ({count - 1})"
        )
    host, _, port = env[COORDINATOR_ADDRESS_ENV].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{COORDINATOR_ADDRESS_ENV}: {env[COORDINATOR_ADDRESS_ENV]!r}, expected HOST:PORT")
    return ProcessInfo(index, count, env[COORDINATOR_ADDRESS_ENV], COORDINATOR_ADDRESS_ENV, "deactivate")


def _process_info_from_jax() -> ProcessInfo | None:
    """Detect processes as jax.distributed.initialize() does, with jax's private classes.

    Unlike that function this does not connect, so the result can be reported before anything waits.
    mpi4py is used where an MPI that jax does not know reports several processes.
    """
    from jax._src.clusters import ClusterEnv

    cluster_types: list[Any] = list(ClusterEnv._cluster_types)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Kubernetes without its package: most pods are single processes
        cluster = next(
            (env for env in cluster_types if not env.opt_in_only_method and _is_cluster_present(env)), None
        )
    if cluster is None:
        mpi_variable = next((name for name in _OTHER_MPI if _env_int(name) > 1), None)
        if mpi_variable is None:
            return None
        cluster = next(env for env in cluster_types if env.name == "mpi4py")
        if not cluster.is_env_present():
            raise UserError(
                f"{mpi_variable}: {os.environ[mpi_variable]} processes of an MPI that jax does not know by "
                f"itself, expected the package mpi4py, or {COORDINATOR_ADDRESS_ENV}, {NUM_PROCESSES_ENV} and "
                f"{PROCESS_ID_ENV}"
            )
    try:
        count, index = cluster.get_process_count(), cluster.get_process_id()
    except Exception as error:  # of any type, depending on the cluster
        raise UserError(
            f"{cluster.name}: {describe_exception(error)}, expected {COORDINATOR_ADDRESS_ENV}, "
            f"{NUM_PROCESSES_ENV}, {PROCESS_ID_ENV}"
        ) from None
    coordinator = ""
    if count > 1:
        with suppress(Exception):  # on TPUs this waits until a host name resolves: left to jax
            coordinator = cluster.get_coordinator_address(
                timeout_secs=0, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
    return ProcessInfo(index, count, coordinator, f"jax's detection of {cluster.name!r}", cluster.name)


def _is_cluster_present(cluster: Any) -> bool:
    """Whether jax's cluster is present. On Kubernetes only the pods of an indexed job have an index."""
    if "k8s" in cluster.__name__.lower() and "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    return bool(cluster.is_env_present())


def _env_int(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def is_loopback_address(address: str) -> bool:
    """Return whether HOST:PORT is on the loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _multi_host_evidence() -> str:
    """Which variable of the environment shows several hosts, in words; empty if none does."""
    if (nodes := _env_int("SLURM_STEP_NUM_NODES")) > 1:
        return f"SLURM_STEP_NUM_NODES says {nodes} hosts"
    local, size = _env_int("OMPI_COMM_WORLD_LOCAL_SIZE"), _env_int("OMPI_COMM_WORLD_SIZE")
    if 0 < local < size:
        return f"OMPI_COMM_WORLD_LOCAL_SIZE says that {local} of {size} processes are on this host"
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return f"TPU_WORKER_HOSTNAMES names {len(names)} hosts" if len(names) > 1 else ""


def describe_exception(error: Exception) -> str:
    """Return the type and message of an exception as one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
