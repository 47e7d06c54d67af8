"""Connecting the processes of a run, and their shutdown. See docs/processes.md."""

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dwt_jax.distributed import coordination
from dwt_jax.distributed.coordination import env_seconds, heartbeat_timeout
from dwt_jax.distributed.process_info import (
    COORDINATOR_ADDRESS_ENV,
    NUM_PROCESSES_ENV,
    ProcessInfo,
    describe_exception,
    detect_processes,
    is_loopback_address,
    process_info_from_env,
)
from dwt_jax.distributed.shutdown import Preempted, handle_signals
from dwt_jax.errors import ReportedElsewhere, UserError
from dwt_jax.logs import logger, set_process
from dwt_jax.runtime_env import backend_problem

START_TIMEOUT_ENV = "DWT_START_TIMEOUT"
_PLATFORMS = {"cpu": {"cpu"}, "gpu": {"gpu", "cuda", "rocm"}, "tpu": {"tpu"}}


def check_platform(platform: str) -> None:
    """Check the config's platform against JAX_PLATFORMS, before any work is done.

    Raises:
        UserError: JAX_PLATFORMS excludes `platform`.
    """
    allowed = os.environ.get("JAX_PLATFORMS", "").replace(" ", "").lower()
    if platform != "any" and allowed and not _PLATFORMS[platform] & set(allowed.split(",")):
        raise UserError(f"config: platform is {platform!r}, but JAX_PLATFORMS allows only {allowed!r}")


def require_single_process(command: str) -> None:
    """Check that the three variables do not request several processes.

    Raises:
        UserError: they do; the message names `command`.
    """
    info = process_info_from_env()
    if info and info.num_processes > 1:
        raise UserError(
            f"{NUM_PROCESSES_ENV}: {info.num_processes}, expected 1: 'dwt {command}' runs in one process"
        )


def run_distributed(work: Callable[[], int]) -> int:
    """Call `work`, connected to the other processes if there are any.

    With several processes jax is connected first, and this process exits together with the others.
    If one of them does not exit in time, this process exits without waiting for threads that may hang.

    Args:
        work: returns an exit status.

    Returns:
        The exit status of this process.

    Raises:
        UserError: as in `detect_processes`, or the coordinator's port is in use.
    """
    info = detect_processes()
    if info is None:
        return work()
    _check_port_free(info)
    _connect(info)
    status = 1
    try:
        _redirect_output(info.process_id)
        set_process(info.process_id, bool(os.environ.get(coordination.PROCESS_LOGS_ENV)))
        _check_same_process_count(info)
        status = work()
    except ReportedElsewhere:
        status = 2
    except UserError as error:
        logger.error(error)
        status = 2
    except coordination.PeerExited as peer_exit:
        logger.error(peer_exit)
        status = peer_exit.status or 1
    except BaseException as error:
        if problem := backend_problem(error):
            logger.error(problem)
            status = 2
        else:
            traceback.print_exc()
    return _shutdown(status)


def _check_port_free(info: ProcessInfo) -> None:
    """Check that nothing listens on the coordinator's port yet.

    gRPC would share the port with another process 0, and the other processes would connect to either.
    """
    if info.process_id or info.method != "deactivate":
        return
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{info.coordinator.rpartition(':')[2]}"
    host, _, port = address.rpartition(":")
    try:
        for family, *_, socket_address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family) as probe:
                # A connection that is closing does not count as a listener.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(socket_address)
    except (OSError, ValueError) as error:  # jax reports all others
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"{COORDINATOR_ADDRESS_ENV}: port {port} is in use on this host, expected a free one; does "
                "another process 0 run on it?"
            ) from None


def _check_same_process_count(info: ProcessInfo) -> None:
    """Check that all processes were given the same number of processes."""
    counts = coordination.all_gather_objects(info.num_processes)
    different = next((i for i, count in enumerate(counts) if count != counts[0]), None)
    if different is not None:
        error_type = ReportedElsewhere if coordination.process_index() else UserError
        raise error_type(
            f"{NUM_PROCESSES_ENV} is {counts[different]} in process {different}, expected {counts[0]} as in "
            "process 0"
        )


def _connect(info: ProcessInfo) -> None:
    """Connect jax in a thread: it blocks where no signal is handled, and aborts at its own timeout."""
    import jax

    timeout, heartbeat = env_seconds(START_TIMEOUT_ENV, 300), heartbeat_timeout()
    # The handler of jax's preemption service would replace that of handle_signals for SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    label = f"{info.process_id} of {info.num_processes} (the first is 0)"
    logger.info(
        f"process {label}, coordinator {info.coordinator or 'found by jax'} (from {info.source}); "
        f"waits up to {timeout:g} s for the others"
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
                initialization_timeout=int(timeout) + 3600,  # the join below times out first
                heartbeat_timeout_seconds=max(1, int(heartbeat)),
                shutdown_timeout_seconds=max(1, int(heartbeat)),
            )
        except Exception as error:
            problems.append(describe_exception(error))

    thread = threading.Thread(target=connect, name="connect", daemon=True)
    try:
        with handle_signals():
            thread.start()
            thread.join(timeout)
    except Preempted as preempted:
        logger.error(preempted)
        _flush_and_exit(os.EX_TEMPFAIL)
    if problems:
        logger.error(
            f"process {label} cannot connect to {info.coordinator or 'its coordinator'}: {problems[0]}"
        )
        _flush_and_exit(1)
    if thread.is_alive():
        logger.error(_timeout_message(info, timeout))
        _flush_and_exit(1)


def _timeout_message(info: ProcessInfo, timeout: float) -> str:
    """Why the processes could not connect, as far as one of them can tell."""
    prefix = f"process {info.process_id}: after {timeout:g} s"
    if info.process_id and info.coordinator and not _is_reachable(info.coordinator):
        hint = "; that is this host's own address, do all processes run on this host?"
        return (
            f"{prefix} no answer from the coordinator {info.coordinator}, expected process 0 at that address"
            f"{hint if is_loopback_address(info.coordinator) else ''}"
        )
    return (
        f"{prefix} not all of the {info.num_processes} processes have connected to the coordinator "
        f"{info.coordinator or 'that jax found'}, expected one for each index below {info.num_processes}"
    )


def _is_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _redirect_output(process_id: int) -> None:
    """Redirect stdout and stderr to a file of this process if DWT_PROCESS_LOGS is set; not on process 0."""
    if process_id == 0 or not (folder := os.environ.get(coordination.PROCESS_LOGS_ENV)):
        return
    path = Path(folder) / f"process-{process_id}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{coordination.PROCESS_LOGS_ENV}: {error.filename}: {error.strerror}, expected a directory to "
            "write to"
        ) from None
    with file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _shutdown(status: int) -> int:
    """Publish the exit status, wait for the other processes and disconnect; → the exit status."""
    import jax

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends anyway, within a bounded time
    coordination.report_exit(status)
    deadline = time.monotonic() + heartbeat_timeout() + 5
    while time.monotonic() < deadline:
        if coordination.all_exited():
            coordination.final_barrier()
            if any(coordination.exited_processes(include_self=True).values()):
                _flush_and_exit(status)  # jax's shutdown would wait for all, also for a process that died
            jax.distributed.shutdown()
            return status
        time.sleep(0.05)
    logger.error(f"exits with status {status} before all other processes have exited")
    _flush_and_exit(status or 1)
    return status


def _flush_and_exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
