"""Make all processes stop at the same step, and exit if another process has exited."""

import os
import signal
import threading

from dwt_jax.distributed import coordination
from dwt_jax.logs import logger

_STOP_KEY = "dwt/now/stop"


class PreemptionSync:
    """Make all processes stop at the same step after any of them requests it.

    A thread polls the coordination service, so a step sends no message while no stop is requested.
    After a stop request every process publishes its step count; all stop one step after the largest.
    No process can be past that step, and a process before it takes the same further steps as the
    others, so no step waits for a process that has stopped.

    JAX's own preemption sync manager stops at a common step too, but only for SIGTERM: here Ctrl-C and
    a request from the program count as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake, self._agreed, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._requested = self._announced = False
        self._step_count = self._stop_step = 0  # calls of reached_sync_point
        threading.Thread(target=self._listen, name="agreement", daemon=True).start()

    def request_stop(self) -> None:
        """Request a stop. Sends nothing itself, since it is called from a signal handler."""
        self._requested = True
        self._wake.set()

    def reached_sync_point(self) -> bool:
        """Count a call and return whether all processes stop at it. All must call it equally often.

        Raises:
            coordination.PeerExited: another process exited before the stop step was agreed on.
        """
        with self._lock:
            self._step_count += 1
            step, announced = self._step_count, self._announced
        if not announced:
            return False
        while not self._agreed.wait(1.0):
            for process, status in coordination.exited_processes().items():
                raise coordination.PeerExited(process, status)
        if step < self._stop_step:
            return False
        self.close()  # what remains has no time limit: only the heartbeat watches it
        return True

    def close(self) -> None:
        """Stop polling. No signal is raised by this object afterwards."""
        with self._lock:
            self._closed.set()
        self._wake.set()

    def _listen(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            try:
                if not self._closed.is_set():
                    self._poll()
            except (RuntimeError, coordination.PeerExited):
                continue  # the coordinator is unreachable: jax ends this process itself

    def _poll(self) -> None:
        client = coordination.coordination_client()
        if self._requested and not self._announced:
            client.key_value_set(_STOP_KEY, str(coordination.process_index()), True)
        entries = dict(client.key_value_dir_get("dwt/now/"))
        if _STOP_KEY in entries and not self._announced:
            with self._lock:
                step_count, self._announced = self._step_count, True
            self._stop_step = max(coordination.all_gather_with_key("stop", step_count)) + 1
            self._agreed.set()
        for process, status in coordination.exited_processes().items():
            self._exit_after_peer(process, status)

    def _exit_after_peer(self, process: int, status: int) -> None:
        """Exit because another process did, unless the main thread closes this object in time.

        A process that does not end by itself hangs in a collective that needs all processes.
        """
        with self._lock:
            if self._closed.is_set():
                return
            if status == os.EX_TEMPFAIL:  # 75, preempted: SIGTERM also ends a process before its first step
                os.kill(os.getpid(), signal.SIGTERM)
        if self._closed.wait(coordination.heartbeat_timeout()):
            return
        logger.error(f"{coordination.PeerExited(process, status)}")
        coordination.report_exit(status or 1)
        coordination.final_barrier()
        os._exit(status or 1)
