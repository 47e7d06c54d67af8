"""Signals in a single process."""

import signal
import subprocess
import sys

import pytest

from dwt_jax.distributed.shutdown import Preempted, defer_signals, handle_signals
from helpers.paths import PYTHONPATH
from helpers.runs import environment


def test_defer_signals_holds_a_signal_until_handle_signals():
    with defer_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match="nothing was changed"), handle_signals():
            pytest.fail("went on")
    with handle_signals() as shutdown_flag:
        assert not shutdown_flag.is_set()
    with defer_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_under_nohup_a_closed_terminal_stops_nothing():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with defer_signals(), handle_signals() as shutdown_flag:
            signal.raise_signal(signal.SIGHUP)
            assert not shutdown_flag.is_set()
    finally:
        signal.signal(signal.SIGHUP, previous)
    with pytest.raises(Preempted), handle_signals():
        signal.raise_signal(signal.SIGHUP)


SIGNAL_BEFORE_JAX = """
import signal, sys
sys.modules["jax"] = None  # the command must handle a signal before this import fails
from dwt_jax import config_loader

def load(*_):
    signal.raise_signal(signal.SIGTERM)
    from dwt_jax.distributed.shutdown import handle_signals
    with handle_signals():
        pass

config_loader.load_config = load
from dwt_jax.cli import main
from dwt_jax.cli.exit_status import EXIT_RESUMABLE
from dwt_jax.distributed.shutdown import Preempted
try:
    main(["train", "--config=x.py", "--workdir=x"])
except Preempted:
    sys.exit(EXIT_RESUMABLE)
"""


def test_train_handles_signals_before_jax_is_imported():
    command = [sys.executable, "-c", SIGNAL_BEFORE_JAX]
    done = subprocess.run(command, env=environment(PYTHONPATH=PYTHONPATH), check=False)
    assert done.returncode == 75
