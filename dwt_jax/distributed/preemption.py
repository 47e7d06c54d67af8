"""All processes stop at the same moment, and none goes on without the others."""

import os
import signal
import sys
import threading

from dwt_jax.distributed import coordination, initialize

_STOP = "dwt/now/stop"


class Agreement:
    """`reached` answers True in every process from the same call on, some calls after anybody's `ask`.

    A thread listens, so an answer costs no message while nobody asks. Once somebody has, the
    thread tells how many answers its process has had and the next one waits until all have told: it is
    True from one more than the largest of those numbers on. Nobody can be past that, and whoever is
    before it takes the same further steps as the others, so no step waits for a process that
    stopped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake, self._settled, self._over = threading.Event(), threading.Event(), threading.Event()
        self._asked = self._told = False
        self._calls = self._at = 0
        threading.Thread(target=self._listen, name="agreement", daemon=True).start()

    def ask(self) -> None:
        """Stop soon. Sends nothing itself: it is called in a signal's handler."""
        self._asked = True
        self._wake.set()

    def reached(self) -> bool:
        with self._lock:
            self._calls += 1
            calls, told = self._calls, self._told
        if not told:
            return False
        while not self._settled.wait(1.0):
            for process, status in coordination.left().items():
                raise coordination.Ended(process, status)
        if calls < self._at:
            return False
        self.close()  # what is left to do takes as long as it takes: the heartbeat alone watches
        return True

    def close(self) -> None:
        """Hear nothing any more. From here on no signal comes from here."""
        with self._lock:
            self._over.set()
        self._wake.set()

    def _listen(self) -> None:
        while not self._over.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            try:
                if not self._over.is_set():
                    self._hear()
            except (RuntimeError, coordination.Ended):  # the coordinator is gone: jax ends the process itself
                continue

    def _hear(self) -> None:
        if self._asked and not self._told:
            coordination.client().key_value_set(_STOP, str(coordination.index()), True)
        found = dict(coordination.client().key_value_dir_get("dwt/now/"))
        if _STOP in found and not self._told:
            with self._lock:
                mine, self._told = self._calls, True
            self._at = max(coordination.exchange("stop", mine)) + 1
            self._settled.set()
        for process, status in coordination.left().items():
            self._end_after(process, status)

    def _end_after(self, process: int, status: int) -> None:
        """Another one ended. If this one does not follow by itself, it hangs in something that needs all."""
        with self._lock:
            if self._over.is_set():
                return
            if status == os.EX_TEMPFAIL:  # 75: stopped by a signal; before the first step that ends this one
                os.kill(os.getpid(), signal.SIGTERM)
        if self._over.wait(initialize.heartbeat()):
            return
        print(f"dwt: {coordination.Ended(process, status)}", file=sys.stderr, flush=True)
        coordination.leave(status or 1)
        coordination.part()
        os._exit(status or 1)
