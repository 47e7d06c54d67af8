"""Agreement of several processes on the step to stop at, without any device."""

import re
import time

from helpers.paths import PYTHONPATH
from helpers.runs import ended, start_several

STOP_AT_ONE_STEP = """
import random, signal, sys, time
import jax
from dwt_jax.distributed import initialize, coordination
from dwt_jax.distributed.shutdown import handle_signals

def work():
    index = coordination.process_index()
    assert coordination.all_gather_objects({"n": index}) == [{"n": i} for i in range(4)]
    assert coordination.run_on_main(lambda: 10 + index) == 10

    def fail_in_process_2():
        if index == 2:
            raise coordination.UserError("bad")

    try:
        coordination.run_on_all(fail_in_process_2)
    except coordination.UserError as error:
        assert str(error) == "process 2: bad", error
        assert (type(error) is coordination.UserError) == (index == 0), error
    rng, num_calls = random.Random(index), 0
    with handle_signals() as shutdown_flag:
        shutdown_flag.arm()
        while True:
            num_calls += 1
            if index == 3 and num_calls == 40:
                signal.raise_signal(signal.SIGTERM)
            if shutdown_flag.is_set():
                break
            time.sleep(rng.uniform(0, 0.02))
        assert shutdown_flag.is_set()
    print("CALLS", num_calls, flush=True)
    return 75

sys.exit(initialize.run_distributed(work))
"""


def test_all_processes_stop_at_the_same_call_after_a_signal_to_one():
    """No device is used, so nothing synchronises the processes but the agreement."""
    done = ended(start_several(["-c", STOP_AT_ONE_STEP], 4, PYTHONPATH=PYTHONPATH))
    assert [status for status, _ in done] == [75] * 4, done
    num_calls = {int(re.search(r"CALLS (\d+)", output)[1]) for _, output in done}
    assert len(num_calls) == 1
    assert num_calls.pop() > 40


HANG_WHEN_PEER_STOPS = """
import sys
from dwt_jax.distributed import initialize, coordination
from dwt_jax.distributed.shutdown import Preempted, handle_signals

def work():
    try:
        with handle_signals():
            coordination.all_gather_objects("")
            if coordination.process_index() == 0:
                client = coordination.coordination_client()
                client.wait_at_barrier("nobody else comes here", 300_000)  # blocks signal handlers
            raise Preempted("")
    except Preempted:
        return 75

sys.exit(initialize.run_distributed(work))
"""


def test_a_process_that_hangs_after_a_peer_stopped_exits_with_the_same_status():
    """The peer, which loses the coordinator with it, must not end by jax's abort."""
    start_time = time.monotonic()
    command = ["-c", HANG_WHEN_PEER_STOPS]
    done = ended(start_several(command, 2, PYTHONPATH=PYTHONPATH, DWT_HEARTBEAT_TIMEOUT="6"))
    assert [status for status, _ in done] == [75, 75], done
    assert time.monotonic() - start_time < 60
