"""Signals in a single process."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

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


@contextmanager
def piped_output(monkeypatch):
    """Make standard output the end of a pipe, and yield the number of its other end."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield reader
        monkeypatch.undo()


def test_a_closed_pipe_stops_as_a_signal_does(monkeypatch):
    with piped_output(monkeypatch) as pipe, handle_signals() as shutdown_flag:
        shutdown_flag.arm()
        print("read", flush=True)
        assert os.read(pipe, 10) == b"read\n"
        assert not shutdown_flag.is_set()
        os.close(pipe)
        for _ in range(2):
            print("not read", flush=True)
            assert shutdown_flag.is_set()


def test_a_pipe_that_is_closed_before_anything_can_be_lost(monkeypatch):
    with piped_output(monkeypatch) as pipe:
        os.close(pipe)
        with pytest.raises(Preempted, match="nothing was changed"), handle_signals():
            print("not read", flush=True)


def test_other_errors_of_output_are_raised(monkeypatch):
    """A full disk, for example."""
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OSError, match="No space left"), handle_signals():
            print("x", flush=True)
        monkeypatch.undo()
        with suppress(OSError):
            stream.close()


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch):
    """If it is to stop the run, SIGHUP says so."""
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with handle_signals() as shutdown_flag:
            shutdown_flag.arm()
            os.close(controller)
            print("x", flush=True)
            assert not shutdown_flag.is_set()
        monkeypatch.undo()


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
