"""The watchdog of a process that hangs."""

import subprocess
import sys
import time

from helpers.runs import environment

PROGRAM = """
import threading, time
from dwt_jax.distributed.watchdog import hang_watchdog

def stuck():
    threading.Event().wait()

with hang_watchdog(0.5) as heartbeat:
    for _ in range(10):
        time.sleep(0.1)
        heartbeat()
    print("alive", flush=True)
    stuck()
"""


def test_hang_watchdog_prints_the_stack_of_every_thread_and_ends_the_process():
    start_time = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert 1.4 < time.monotonic() - start_time < 20
    assert done.stdout == "alive\n"
    assert "dwt: no step for 0.5 s (train.watchdog)" in done.stderr
    assert "in stuck" in done.stderr
    assert done.stderr.count("Thread 0x") + done.stderr.count("Current thread") >= 2
