"""Signals at several moments of commands that start workers: no traceback, no process left, and 105 where Python can choose.

The moments are counted in processor time of the command and its workers, so that they are the same on a busy machine: while
modules are imported, while workers start and import theirs, while they work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("heeds_interrupts")

SWEEP = ("simulate", "sweep", "--vary", "devices=400:4000:200", "--jobs", "2")
CHAOS = ("simulate", "chaos", "--seeds", "2000", "--jobs", "2")
FIGURE = ("simulate", "fig4a", "--seeds", "40", "--jobs", "2")
BENCH = ("loadgen", "bench", "simulator", "--tasks", "400000")
PATIENCE_S = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


def session(leader: int) -> Iterator[tuple[int, float]]:
    """The living processes of a session and the processor time that each has used, its ended children's with it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[3]) == leader and fields[0] != "Z":
                yield int(entry.name), sum(map(int, fields[11:15])) / TICKS


@pytest.mark.parametrize(
    ("words", "number", "after_s"),
    [
        *((SWEEP, signal.SIGINT, after_s) for after_s in (0.3, 0.8, 1.5, 2.5, 5.0)),
        *((words, signal.SIGINT, 2.5) for words in (CHAOS, FIGURE, BENCH)),
        *((SWEEP, signal.SIGTERM, after_s) for after_s in (0.8, 3.0)),
        (CHAOS, signal.SIGTERM, 2.5),
        (SWEEP, signal.SIGKILL, 5.0),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else str(getattr(value, "name", value)),
)
def test_an_interrupt_leaves_nothing_behind(
    words: tuple[str, ...], number: signal.Signals, after_s: float, tmp_path: Path
) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "deepar", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until_s = time.monotonic() + PATIENCE_S
    try:
        while sum(used for _, used in session(command.pid)) < after_s:
            assert command.poll() is None, "it was over too soon for this test"
            assert time.monotonic() < until_s
            time.sleep(0.02)
        if number is signal.SIGINT:
            os.killpg(command.pid, number)  # as a terminal does: to everyone in the foreground
        else:
            command.send_signal(number)
        said, _ = command.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in said
        assert command.returncode == (-number if number is signal.SIGKILL else 105), said
        # The resource tracker of `multiprocessing` ends when it notices that we have.
        while left := list(session(command.pid)):
            assert time.monotonic() < until_s, left
            time.sleep(0.05)
    finally:
        for pid, _ in session(command.pid):
            os.kill(pid, signal.SIGKILL)
        command.wait()
