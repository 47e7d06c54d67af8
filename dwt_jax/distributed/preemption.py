"""All processes stop at the same moment, and none goes on without the others."""

import os
import signal
import sys
import threading

from dwt_jax.distributed import coordination, initialize

_STOP_KEY = "dwt/now/stop"


class PreemptionSync:
    """`reached` answers True in every process from the same call on, some calls after anybody's `ask`.

    A thread listens, so an answer costs no message while nobody asks. Once somebody has, the
    thread tells how many answers its process has had and the next one waits until all have told: it is
    True from one more than the largest of those numbers on. Nobody can be past that, and whoever is
    before it takes the same further steps as the others, so no step waits for a process that
    stopped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake, self._agreed, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._requested = self._announced = False
        self._calls = self._stop_call = 0
        threading.Thread(target=self._listen, name="agreement", daemon=True).start()

    def request_stop(self) -> None:
        """Stop soon. Sends nothing itself: it is called in a signal's handler."""
        self._requested = True
        self._wake.set()

    def reached_sync_point(self) -> bool:
        with self._lock:
            self._calls += 1
            calls, announced = self._calls, self._announced
        if not announced:
            return False
        while not self._agreed.wait(1.0):
            for process, status in coordination.exited_processes().items():
                raise coordination.PeerExited(process, status)
        if calls < self._stop_call:
            return False
        self.close()  # what is left to do takes as long as it takes: the heartbeat alone watches
        return True

    def close(self) -> None:
        """Hear nothing any more. From here on no signal comes from here."""
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
            except (
                RuntimeError,
                coordination.PeerExited,
            ):  # the coordinator is gone: jax ends the process itself
                continue

    def _poll(self) -> None:
        if self._requested and not self._announced:
            coordination.coordination_client().key_value_set(
                _STOP_KEY, str(coordination.process_index()), True
            )
        entries = dict(coordination.coordination_client().key_value_dir_get("dwt/now/"))
        if _STOP_KEY in entries and not self._announced:
            with self._lock:
                num_calls, self._announced = self._calls, True
            self._stop_call = max(coordination.all_gather_with_key("stop", num_calls)) + 1
            self._agreed.set()
        for process, status in coordination.exited_processes().items():
            self._exit_after_peer(process, status)

    def _exit_after_peer(self, process: int, status: int) -> None:
        """Another one ended. If this one does not follow by itself, it hangs in something that needs all."""
        with self._lock:
            if self._closed.is_set():
                return
            if status == os.EX_TEMPFAIL:  # 75: stopped by a signal; before the first step that ends this one
                os.kill(os.getpid(), signal.SIGTERM)
        if self._closed.wait(initialize.heartbeat_timeout()):
            return
        print(f"dwt: {coordination.PeerExited(process, status)}", file=sys.stderr, flush=True)
        coordination.report_exit(status or 1)
        coordination.final_barrier()
        os._exit(status or 1)
