"""How many processes a run has, how they find each other, and how they end. See docs/processes.md."""

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dwt_jax.distributed import coordination
from dwt_jax.errors import ReportedElsewhere, UserError

COORDINATOR_ADDRESS_ENV, NUM_PROCESSES_ENV, PROCESS_ID_ENV = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
START_TIMEOUT_ENV, HEARTBEAT_TIMEOUT_ENV = "DWT_START_TIMEOUT", "DWT_HEARTBEAT_TIMEOUT"
_OTHER_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by MPIs that jax does not know by itself
_PLATFORMS = {"cpu": {"cpu"}, "gpu": {"gpu", "cuda", "rocm"}, "tpu": {"tpu"}}


class ProcessInfo(NamedTuple):
    """A process among several."""

    process_id: int
    num_processes: int
    coordinator: str  # host:port; empty: jax finds it when it connects
    source: str  # what said so
    method: str  # jax's cluster_detection_method


def detect_processes() -> ProcessInfo | None:
    """What the environment says of this process: the explicit variables, else what jax detects; None
    for a process that runs alone.

    Raises UserError for variables that say half of it, and for a coordinator on the loopback
    interface with processes on several hosts.
    """
    info = process_info_from_env() or _process_info_from_jax()
    if info is None or info.num_processes == 1:
        return None
    if info.coordinator and _is_loopback(info.coordinator) and (evidence := _multi_host_evidence()):
        raise UserError(
            f"{COORDINATOR_ADDRESS_ENV}: {info.coordinator} is each host's own address, but {evidence}, expected the name "
            "of the host of process 0"
        )
    return info


def process_info_from_env() -> ProcessInfo | None:
    """What the three variables say, if they are there."""
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
    """As jax.distributed.initialize() does it, but to be told before anything waits: hence a private name
    of jax. mpi4py is asked where an MPI that jax does not know says that there are several."""
    from jax._src.clusters import ClusterEnv

    cluster_types: list[Any] = list(ClusterEnv._cluster_types)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Kubernetes without its package: most pods are alone
        cluster = next(
            (each for each in cluster_types if not each.opt_in_only_method and _is_cluster_present(each)),
            None,
        )
    if cluster is None:
        mpi_variable = next((name for name in _OTHER_MPI if _env_int(name) > 1), None)
        if mpi_variable is None:
            return None
        cluster = next(each for each in cluster_types if each.name == "mpi4py")
        if not cluster.is_env_present():
            raise UserError(
                f"{mpi_variable}: {os.environ[mpi_variable]} processes of an MPI that jax does not know by itself, expected "
                f"the package mpi4py, or {COORDINATOR_ADDRESS_ENV}, {NUM_PROCESSES_ENV} and {PROCESS_ID_ENV}"
            )
    try:
        count, index = cluster.get_process_count(), cluster.get_process_id()
    except Exception as error:  # each has its own kinds
        raise UserError(
            f"{cluster.name}: {_format_error(error)}, expected {COORDINATOR_ADDRESS_ENV}, {NUM_PROCESSES_ENV}, {PROCESS_ID_ENV}"
        ) from None
    coordinator = ""
    if count > 1:
        with suppress(Exception):  # those of TPUs wait for a name to be known: left to jax
            coordinator = cluster.get_coordinator_address(
                timeout_secs=0, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
    return ProcessInfo(index, count, coordinator, f"jax's detection of {cluster.name!r}", cluster.name)


def _is_cluster_present(cluster: Any) -> bool:
    """On Kubernetes only an indexed job has processes that are numbered."""
    if "k8s" in cluster.__name__.lower() and "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    return bool(cluster.is_env_present())


def _env_int(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _multi_host_evidence() -> str:
    """What of the environment says that the processes are on several hosts; empty if nothing does."""
    if (nodes := _env_int("SLURM_STEP_NUM_NODES")) > 1:
        return f"SLURM_STEP_NUM_NODES says {nodes} hosts"
    local, size = _env_int("OMPI_COMM_WORLD_LOCAL_SIZE"), _env_int("OMPI_COMM_WORLD_SIZE")
    if 0 < local < size:
        return f"OMPI_COMM_WORLD_LOCAL_SIZE says that {local} of {size} processes are on this host"
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return f"TPU_WORKER_HOSTNAMES names {len(names)} hosts" if len(names) > 1 else ""


def env_seconds(name: str, default: float) -> float:
    """A setting of the environment. Raises UserError for anything but a positive number."""
    text = os.environ.get(name, "").strip()
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}: {text!r}, expected seconds, more than 0")
    return value


def heartbeat_timeout() -> float:
    """Seconds after which a process that does not answer counts as dead."""
    return env_seconds(HEARTBEAT_TIMEOUT_ENV, 60)


def check_platform(platform: str) -> None:
    """Raises UserError where JAX_PLATFORMS rules out the config's platform: nothing is prepared first."""
    allowed = os.environ.get("JAX_PLATFORMS", "").replace(" ", "").lower()
    if platform != "any" and allowed and not _PLATFORMS[platform] & set(allowed.split(",")):
        raise UserError(f"config: platform is {platform!r}, but JAX_PLATFORMS allows {allowed!r} alone")


def require_single_process(command: str) -> None:
    """Raises UserError where the explicit variables ask for several processes and `verb` is for one."""
    info = process_info_from_env()
    if info and info.num_processes > 1:
        raise UserError(
            f"{NUM_PROCESSES_ENV}: {info.num_processes}, expected 1: 'dwt {command}' runs in one process"
        )


def run_distributed(work: Callable[[], int]) -> int:
    """The exit status of `work()`, in this process and with the others that there are.

    Where there are others, jax is connected to them first, and this process ends only once they do;
    if one of them does not, it ends all the same, without waiting for threads that may hang.
    """
    info = detect_processes()
    if info is None:
        return work()
    _check_port_free(info)
    _connect(info)
    status = 1
    try:
        _redirect_output(info.process_id)
        _check_same_process_count(info)
        status = work()
    except ReportedElsewhere:
        status = 2
    except UserError as error:
        _log_stderr(str(error))
        status = 2
    except coordination.PeerExited as peer_exit:
        _log_stderr(str(peer_exit))
        status = peer_exit.status or 1
    except BaseException:
        traceback.print_exc()
    return _shutdown(status)


def _check_port_free(info: ProcessInfo) -> None:
    """Raises UserError where something listens at the coordinator's port already. gRPC would share the port
    with another process 0, and the others would come to either of the two."""
    if info.process_id or info.method != "deactivate":
        return
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{info.coordinator.rpartition(':')[2]}"
    host, _, port = address.rpartition(":")
    try:
        for family, *_, socket_address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family) as probe:
                probe.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # an old connection is no listener
                probe.bind(socket_address)
    except (OSError, ValueError) as error:  # all but one are left to jax
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"{COORDINATOR_ADDRESS_ENV}: port {port} is taken on this host, expected a free one; does another process 0 "
                "run here?"
            ) from None


def _check_same_process_count(info: ProcessInfo) -> None:
    """Raises UserError, in words of process 0, where another was told another number of processes."""
    counts = coordination.all_gather_objects(info.num_processes)
    different = next((i for i, count in enumerate(counts) if count != counts[0]), None)
    if different is not None:
        error_type, count = (
            ReportedElsewhere if coordination.process_index() else UserError,
            counts[different],
        )
        raise error_type(
            f"{NUM_PROCESSES_ENV} is {count} in process {different}, expected {counts[0]} as in process 0"
        )


def _connect(info: ProcessInfo) -> None:
    """In a thread: jax waits where no signal is heard, and aborts when its time is up."""
    import jax

    from dwt_jax.distributed.shutdown import Preempted, handle_signals

    limit, heartbeat_limit = env_seconds(START_TIMEOUT_ENV, 300), heartbeat_timeout()
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from ours
    label = f"{info.process_id} of {info.num_processes} (the first is 0)"
    _log_stderr(
        f"process {label}, coordinator {info.coordinator or 'found by jax'} (from {info.source}); "
        f"waits up to {limit:g} s for the others"
    )
    problems: list[str] = []

    def connect() -> None:
        is_explicit = info.method == "deactivate"
        try:
            jax.distributed.initialize(
                info.coordinator if is_explicit else None,
                info.num_processes if is_explicit else None,
                info.process_id if is_explicit else None,
                cluster_detection_method=info.method,
                initialization_timeout=int(limit) + 3600,  # ours comes first
                heartbeat_timeout_seconds=max(1, int(heartbeat_limit)),
                shutdown_timeout_seconds=max(1, int(heartbeat_limit)),
            )
        except Exception as error:
            problems.append(_format_error(error))

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    try:
        with handle_signals():
            thread.start()
            thread.join(limit)
    except Preempted as stop:
        _log_stderr(str(stop))
        _flush_and_exit(os.EX_TEMPFAIL)
    if problems:
        _log_stderr(
            f"process {label} cannot connect to {info.coordinator or 'its coordinator'}: {problems[0]}"
        )
        _flush_and_exit(1)
    if thread.is_alive():
        _log_stderr(_timeout_message(info, limit))
        _flush_and_exit(1)


def _timeout_message(info: ProcessInfo, limit: float) -> str:
    """Why nothing came of the waiting, as far as one process can tell."""
    prefix = f"process {info.process_id}: after {limit:g} s"
    if info.process_id and info.coordinator and not _is_reachable(info.coordinator):
        hint = "; that is this host's own address, do all processes run here?"
        return (
            f"{prefix} nobody answers at the coordinator {info.coordinator}, expected process 0 there"
            f"{hint if _is_loopback(info.coordinator) else ''}"
        )
    return (
        f"{prefix} not all of the {info.num_processes} processes have come to the coordinator "
        f"{info.coordinator or 'that jax found'}, expected one for each number below {info.num_processes}"
    )


def _is_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _redirect_output(index: int) -> None:
    """What this process says from now on goes to its own file, if that was asked for; process 0 keeps to
    where it writes."""
    if index == 0 or not (folder := os.environ.get(coordination.PROCESS_LOGS_ENV)):
        return
    path = Path(folder) / f"process-{index}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(
            f"{coordination.PROCESS_LOGS_ENV}: {error.filename}: {error.strerror}, expected a directory to write to"
        ) from None
    with file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _shutdown(status: int) -> int:
    """Say goodbye, and wait for that of the others."""
    import jax

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, within a bounded time
    coordination.report_exit(status)
    deadline = time.monotonic() + heartbeat_timeout() + 5
    while time.monotonic() < deadline:
        if coordination.all_exited():
            coordination.final_barrier()
            if any(coordination.exited_processes(include_self=True).values()):
                _flush_and_exit(status)  # jax's goodbye waits for all, also for one that had to be ended
            jax.distributed.shutdown()
            return status
        time.sleep(0.05)
    _log_stderr(f"process {coordination.process_index()} ends with status {status}, before all others did")
    _flush_and_exit(status or 1)
    return status


def _log_stderr(text: str) -> None:
    print(f"dwt: {text}", file=sys.stderr, flush=True)


def _format_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _flush_and_exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
