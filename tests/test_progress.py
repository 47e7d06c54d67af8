"""Messages and progress on a terminal, in a pipe, and of one process among several."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from dwt_jax import logs, progress
from dwt_jax.config import Train
from dwt_jax.logs import logger
from dwt_jax.progress import Progress
from dwt_jax.runs.metric_writer import MetricWriter
from helpers.runs import environment

PROGRAM = """
import time
from dwt_jax.config import Train
from dwt_jax.logs import logger
from dwt_jax.progress import Progress
from dwt_jax.runs.metric_writer import MetricWriter
with Progress("student", 40, always=True) as progress:
    for i in range(4):
        time.sleep(0.2)
        progress.advance(10, lambda: f"loss {4 - i}")
        if i == 1:
            logger.info("student: step 20: held-out loss 2.0000")
print("model in run/model")
"""


@pytest.fixture
def clock(monkeypatch):
    """seconds[0] is the time of time.perf_counter()."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


@pytest.fixture
def as_process():
    yield logs.set_process
    logs.set_process(0, False)
    logs._handler.process = ""


def on_terminal(program: str) -> str:
    """What a program prints whose standard streams are a terminal."""
    terminal, stream = pty.openpty()
    fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment())
    os.close(stream)
    printed = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
        if not part:
            break
        printed += part
    os.close(terminal)
    assert process.wait() == 0, printed
    return printed.decode()


def test_a_terminal_shows_a_bar_and_messages_above_it():
    lines = on_terminal(PROGRAM).replace("\r\n", "\n").split("\n")
    bars = lines[0].split("\r") + lines[1].split("\r")
    assert any(re.search(r"student:\s+25%\|.*\| 10/40 \[.*loss 4\]", bar) for bar in bars), lines
    assert re.search(r"^student: step 20: held-out loss 2.0000$", lines[0].split("\r")[-1]), lines
    assert re.search(r"student: 100%\|.*\| 40/40 \[.*loss 1\]", lines[1].split("\r")[-1]), lines
    assert lines[2] == "model in run/model"


def test_a_pipe_gets_lines_on_standard_error_and_results_on_standard_output():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout == "model in run/model\n"
    lines = [re.sub(r"ETA \d:\d\d$", "ETA", line) for line in done.stderr.splitlines()]
    assert lines == [
        "student: step 10/40  loss 4  ETA",
        "student: step 20/40  loss 3  ETA",
        "student: step 20: held-out loss 2.0000",
        "student: step 30/40  loss 2  ETA",
        "student: step 40/40  loss 1  ETA",
    ]


def test_lines_come_every_ten_seconds_with_speed_and_time_left(clock, log_lines):
    with Progress("predict", 300, "texts", done=100) as shown:
        for _ in range(20):
            clock[0] += 3
            shown.advance(6)
    assert log_lines == [
        f"predict: texts {100 + 2 * seconds}/300  2 texts/s  ETA {(200 - 2 * seconds) // 120}:"
        f"{(100 - seconds) % 60:02}"
        for seconds in (12, 24, 36, 48, 60)
    ]


def test_bytes_are_shown_as_a_share_and_without_a_total_as_the_status_alone(clock, log_lines):
    for total in (1000, 0):
        shown = Progress("prepare", total, "B", always=True)
        clock[0] += 5
        shown.advance(250, lambda: "2.0 MB of text")
        shown.close()
    assert log_lines == ["prepare: 25%  2.0 MB of text  ETA 0:15", "prepare: 2.0 MB of text"]


def test_status_is_computed_only_when_it_is_shown(clock):
    with Progress("train", 100) as shown:
        shown.advance(1, lambda: pytest.fail("too early"))


def test_levels_have_their_beginnings(capsys, as_process):
    for index, has_own_log in ((0, False), (3, False), (3, True)):
        as_process(index, has_own_log)
        logger.info("a message")
        logger.warning("a warning")
        logger.error("an error")
        first = f"process {index}: " if index else ""
        message = [] if index and not has_own_log else ["a message"]
        expected = [*message, f"{first}a warning", f"dwt: {first}an error"]
        captured = capsys.readouterr()
        assert (captured.out, captured.err.splitlines()) == ("", expected)


SHORT = """
import sys, time
from dwt_jax.logs import above_bars
from dwt_jax.progress import Progress
from dwt_jax.runs.metric_writer import MetricWriter
with Progress("predict", 64, "texts") as progress:
    for i in range(4):
        time.sleep(DELAY)
        progress.advance(16)
        with above_bars(sys.stdout):
            print("row", i, flush=True)
"""


def test_results_are_written_above_the_bar_which_ends_complete():
    lines = on_terminal(SHORT.replace("DELAY", "0.4")).replace("\r\n", "\n").split("\n")
    assert [line.split("\r")[-1].strip() for line in lines[:4]] == [f"row {i}" for i in range(4)]
    assert re.search(r"predict: 100%\|.*\| 64/64 ", lines[4].split("\r")[-1]), lines


def test_outputs_that_cannot_be_opened_leave_no_bar(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        MetricWriter(tmp_path, Train(steps=2, tensorboard=False), 0, "run")
    assert not logs.shown_bars
