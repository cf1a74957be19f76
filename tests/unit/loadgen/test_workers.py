"""Worker processes, apart from how they end (`tests/unit/deploy/test_interrupts.py`)."""

from __future__ import annotations

import pytest
import structlog

from loadgen.workers import Worker


def _warn() -> None:
    structlog.get_logger().warning("late heartbeat")


def test_the_log_of_a_worker_leaves_stdout_to_the_result_of_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker(target=_warn)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert "late heartbeat" in said.err
