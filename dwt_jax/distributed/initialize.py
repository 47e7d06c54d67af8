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
from dwt_jax.errors import SaidElsewhere, UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
START_TIMEOUT, HEARTBEAT_TIMEOUT = "DWT_START_TIMEOUT", "DWT_HEARTBEAT_TIMEOUT"
_OTHER_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by MPIs that jax does not know by itself
_PLATFORMS = {"cpu": {"cpu"}, "gpu": {"gpu", "cuda", "rocm"}, "tpu": {"tpu"}}


class Found(NamedTuple):
    """A process among several."""

    process: int
    processes: int
    coordinator: str  # host:port; empty: jax finds it when it connects
    source: str  # what said so
    method: str  # jax's cluster_detection_method


def find() -> Found | None:
    """What the environment says of this process: the explicit variables, else what jax detects; None
    for a process that runs alone.

    Raises UserError for variables that say half of it, and for a coordinator on the loopback
    interface with processes on several hosts.
    """
    found = explicit() or _detected()
    if found is None or found.processes == 1:
        return None
    if found.coordinator and _loopback(found.coordinator) and (what := _several_hosts()):
        raise UserError(
            f"{ADDRESS}: {found.coordinator} is each host's own address, but {what}, expected the name "
            "of the host of process 0"
        )
    return found


def explicit() -> Found | None:
    """What the three variables say, if they are there."""
    given = {name: os.environ.get(name, "").strip() for name in (ADDRESS, COUNT, INDEX)}
    present = [name for name, value in given.items() if value]
    if not present:
        return None
    if missing := [name for name in given if name not in present]:
        raise UserError(
            f"{' and '.join(missing)}: not set, but {' and '.join(present)}: expected all three or none"
        )
    for name in (COUNT, INDEX):
        if not given[name].isdecimal():
            raise UserError(f"{name}: {given[name]!r}, expected a whole number")
    count, index = int(given[COUNT]), int(given[INDEX])
    if not index < count:
        raise UserError(f"{INDEX}: {index}, expected from 0 to {COUNT} - 1 ({count - 1})")
    host, _, port = given[ADDRESS].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{ADDRESS}: {given[ADDRESS]!r}, expected HOST:PORT")
    return Found(index, count, given[ADDRESS], ADDRESS, "deactivate")


def _detected() -> Found | None:
    """As jax.distributed.initialize() does it, but to be told before anything waits: hence a private name
    of jax. mpi4py is asked where an MPI that jax does not know says that there are several."""
    from jax._src.clusters import ClusterEnv

    every: list[Any] = list(ClusterEnv._cluster_types)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Kubernetes without its package: most pods are alone
        cluster = next((each for each in every if not each.opt_in_only_method and _present(each)), None)
    if cluster is None:
        said = next((name for name in _OTHER_MPI if _number(name) > 1), None)
        if said is None:
            return None
        cluster = next(each for each in every if each.name == "mpi4py")
        if not cluster.is_env_present():
            raise UserError(
                f"{said}: {os.environ[said]} processes of an MPI that jax does not know by itself, expected "
                f"the package mpi4py, or {ADDRESS}, {COUNT} and {INDEX}"
            )
    try:
        count, index = cluster.get_process_count(), cluster.get_process_id()
    except Exception as error:  # each has its own kinds
        raise UserError(f"{cluster.name}: {_line(error)}, expected {ADDRESS}, {COUNT}, {INDEX}") from None
    coordinator = ""
    if count > 1:
        with suppress(Exception):  # those of TPUs wait for a name to be known: left to jax
            coordinator = cluster.get_coordinator_address(
                timeout_secs=0, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
    return Found(index, count, coordinator, f"jax's detection of {cluster.name!r}", cluster.name)


def _present(cluster: Any) -> bool:
    """On Kubernetes only an indexed job has processes that are numbered."""
    if "k8s" in cluster.__name__.lower() and "JOB_COMPLETION_INDEX" not in os.environ:
        return False
    return bool(cluster.is_env_present())


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def _loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _several_hosts() -> str:
    """What of the environment says that the processes are on several hosts; empty if nothing does."""
    if (nodes := _number("SLURM_STEP_NUM_NODES")) > 1:
        return f"SLURM_STEP_NUM_NODES says {nodes} hosts"
    local, size = _number("OMPI_COMM_WORLD_LOCAL_SIZE"), _number("OMPI_COMM_WORLD_SIZE")
    if 0 < local < size:
        return f"OMPI_COMM_WORLD_LOCAL_SIZE says that {local} of {size} processes are on this host"
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return f"TPU_WORKER_HOSTNAMES names {len(names)} hosts" if len(names) > 1 else ""


def seconds(name: str, default: float) -> float:
    """A setting of the environment. Raises UserError for anything but a positive number."""
    text = os.environ.get(name, "").strip()
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name}: {text!r}, expected seconds, more than 0")
    return value


def heartbeat() -> float:
    """Seconds after which a process that does not answer counts as dead."""
    return seconds(HEARTBEAT_TIMEOUT, 60)


def refuse_platform(platform: str) -> None:
    """Raises UserError where JAX_PLATFORMS rules out the config's platform: nothing is prepared first."""
    allowed = os.environ.get("JAX_PLATFORMS", "").replace(" ", "").lower()
    if platform != "any" and allowed and not _PLATFORMS[platform] & set(allowed.split(",")):
        raise UserError(f"config: platform is {platform!r}, but JAX_PLATFORMS allows {allowed!r} alone")


def refuse_several(verb: str) -> None:
    """Raises UserError where the explicit variables ask for several processes and `verb` is for one."""
    found = explicit()
    if found and found.processes > 1:
        raise UserError(f"{COUNT}: {found.processes}, expected 1: 'dwt {verb}' runs in one process")


def run(work: Callable[[], int]) -> int:
    """The exit status of `work()`, in this process and with the others that there are.

    Where there are others, jax is connected to them first, and this process ends only once they do;
    if one of them does not, it ends all the same, without waiting for threads that may hang.
    """
    found = find()
    if found is None:
        return work()
    _refuse_taken(found)
    _connect(found)
    status = 1
    try:
        _open_log(found.process)
        _same_count(found)
        status = work()
    except SaidElsewhere:
        status = 2
    except UserError as error:
        _tell(str(error))
        status = 2
    except coordination.Ended as ended:
        _tell(str(ended))
        status = ended.status or 1
    except BaseException:
        traceback.print_exc()
    return _leave(status)


def _refuse_taken(found: Found) -> None:
    """Raises UserError where something listens at the coordinator's port already. gRPC would share the port
    with another process 0, and the others would come to either of the two."""
    if found.process or found.method != "deactivate":
        return
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{found.coordinator.rpartition(':')[2]}"
    host, _, port = address.rpartition(":")
    try:
        for family, *_, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
            with socket.socket(family) as tried:
                tried.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # an old connection is no listener
                tried.bind(place)
    except (OSError, ValueError) as error:  # all but one are left to jax
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"{ADDRESS}: port {port} is taken on this host, expected a free one; does another process 0 "
                "run here?"
            ) from None


def _same_count(found: Found) -> None:
    """Raises UserError, in words of process 0, where another was told another number of processes."""
    counts = coordination.gather(found.processes)
    different = next((i for i, count in enumerate(counts) if count != counts[0]), None)
    if different is not None:
        kind, count = SaidElsewhere if coordination.index() else UserError, counts[different]
        raise kind(f"{COUNT} is {count} in process {different}, expected {counts[0]} as in process 0")


def _connect(found: Found) -> None:
    """In a thread: jax waits where no signal is heard, and aborts when its time is up."""
    import jax

    from dwt_jax.distributed.shutdown import Stopped, signals

    limit, alive = seconds(START_TIMEOUT, 300), heartbeat()
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from ours
    whom = f"{found.process} of {found.processes} (the first is 0)"
    _tell(
        f"process {whom}, coordinator {found.coordinator or 'found by jax'} (from {found.source}); "
        f"waits up to {limit:g} s for the others"
    )
    problems: list[str] = []

    def connect() -> None:
        explicit = found.method == "deactivate"
        try:
            jax.distributed.initialize(
                found.coordinator if explicit else None,
                found.processes if explicit else None,
                found.process if explicit else None,
                cluster_detection_method=found.method,
                initialization_timeout=int(limit) + 3600,  # ours comes first
                heartbeat_timeout_seconds=max(1, int(alive)),
                shutdown_timeout_seconds=max(1, int(alive)),
            )
        except Exception as error:
            problems.append(_line(error))

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    try:
        with signals():
            thread.start()
            thread.join(limit)
    except Stopped as stopped:
        _tell(str(stopped))
        _exit(os.EX_TEMPFAIL)
    if problems:
        _tell(f"process {whom} cannot connect to {found.coordinator or 'its coordinator'}: {problems[0]}")
        _exit(1)
    if thread.is_alive():
        _tell(_missing(found, limit))
        _exit(1)


def _missing(found: Found, limit: float) -> str:
    """Why nothing came of the waiting, as far as one process can tell."""
    who = f"process {found.process}: after {limit:g} s"
    if found.process and found.coordinator and not _answers(found.coordinator):
        here = "; that is this host's own address, do all processes run here?"
        return (
            f"{who} nobody answers at the coordinator {found.coordinator}, expected process 0 there"
            f"{here if _loopback(found.coordinator) else ''}"
        )
    return (
        f"{who} not all of the {found.processes} processes have come to the coordinator "
        f"{found.coordinator or 'that jax found'}, expected one for each number below {found.processes}"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _open_log(index: int) -> None:
    """What this process says from now on goes to its own file, if that was asked for; process 0 keeps to
    where it writes."""
    if index == 0 or not (folder := os.environ.get(coordination.LOGS)):
        return
    path = Path(folder) / f"process-{index}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(
            f"{coordination.LOGS}: {error.filename}: {error.strerror}, expected a directory to write to"
        ) from None
    with file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _leave(status: int) -> int:
    """Say goodbye, and wait for that of the others."""
    import jax

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway, within a bounded time
    coordination.leave(status)
    deadline = time.monotonic() + heartbeat() + 5
    while time.monotonic() < deadline:
        if coordination.all_left():
            coordination.part()
            if any(coordination.left(itself=True).values()):
                _exit(status)  # jax's goodbye waits for all, also for one that had to be ended
            jax.distributed.shutdown()
            return status
        time.sleep(0.05)
    _tell(f"process {coordination.index()} ends with status {status}, before all others did")
    _exit(status or 1)
    return status


def _tell(text: str) -> None:
    print(f"dwt: {text}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
