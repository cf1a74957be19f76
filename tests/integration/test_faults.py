"""Real processes on Kafka, broken in every way while tasks run: nothing is lost, nothing shows twice (G1, G2, G5, G6, G9).

It is `deepar loadgen chaos` as a user runs it, with shorter leases and stops. Its oracle shares no code with what it judges.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kafka_broker import apache_required, choose

LEASE_S, STOP_S = 3.0, 6.5
SAMPLES = 20_000
WITHIN_S = 280.0
PLAYERS = ("planner", "device", "edge", "cloud", "broker")
PACE = ("--lease", f"{LEASE_S}s", "--planner-lease", f"{LEASE_S}s", "--stop-for", f"{STOP_S}s", "--grace", "2s")


pytestmark = pytest.mark.usefixtures("heeds_interrupts")


@pytest.fixture(autouse=True)
def apache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command starts Apache Kafka itself, whichever broker other tests use."""
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    if choose().how != "apache":
        (pytest.fail if apache_required() else pytest.skip)(f"needs Apache Kafka: {choose().text}")


def chaos(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`deepar loadgen chaos WORDS`, its progress in a file."""
    with (folder / "progress.log").open("w") as progress:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "loadgen", "chaos", "--out", str(folder / "out"), "--json", *words],
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=progress,
            text=True,
        )


def told(folder: Path) -> str:
    """The progress, and the ends of the processes' logs."""
    logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in sorted(folder.rglob("*.log"))]
    return "\n".join(logs)


def running_in(folder: Path) -> list[str]:
    """Processes that still have something to do with a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = str((entry / "cwd").readlink())
        except OSError:
            continue  # it has ended
        if str(folder) in words or str(folder) in where:
            found.append(words)
    return found


def test_each_process_and_the_broker_is_killed_stopped_and_terminated_and_nothing_is_lost_or_shown_twice(
    tmp_path: Path,
) -> None:
    command = chaos(tmp_path, *PACE, "--pause", "500ms", "--samples", str(SAMPLES), "--tasks", "100")
    try:
        output, _ = command.communicate(timeout=WITHIN_S)
    finally:
        command.terminate()
        command.wait(60)
    assert command.returncode in (0, 99), told(tmp_path)  # 99: an aim was missed, as it may be on a busy machine
    found: dict[str, Any] = json.loads(output)
    faults = {(fault["kind"], fault["target"]): fault for fault in found["faults"]}
    assert faults.keys() == {(kind, player) for kind in ("kill", "stop", "terminate") for player in PLAYERS}
    assert len(found["faults"]) == 15
    assert all(fault["recovered_s"] is not None for fault in faults.values()), found["faults"]
    for player in ("device", "edge", "cloud"):  # G9, and a bound that holds on a busy machine
        assert LEASE_S * 0.7 < faults["stop", player]["lost_after_s"] < LEASE_S + 3.0, found["faults"]
    assert found["samples"] >= SAMPLES
    assert found["tasks"] >= 100
    assert found["ends"] == {"COMPLETED": found["tasks"]}
    assert (found["lost"], found["visible_duplicates"], found["ledger_violations"]) == (0, 0, 0), found
    assert (found["wrong_results"], found["unreadable_frames"]) == (0, 0), found
    assert found["suppressed_duplicates"] > 0
    assert found["retries"]["node_lost"] > 0, "nobody was hit"
    assert 0 < found["recovery_s"]["p50"] <= found["recovery_s"]["p99"]
    assert running_in(tmp_path) == []


def test_an_interrupt_leaves_no_process_behind_not_even_one_that_is_stopped(tmp_path: Path) -> None:
    command = chaos(tmp_path, *PACE, "--faults", "stop:edge", "--pause", "0s", "--stop-for", "100s")
    progress = tmp_path / "progress.log"
    until_s = time.monotonic() + 90.0
    while "stop e" not in progress.read_text():
        assert command.poll() is None, told(tmp_path)
        assert time.monotonic() < until_s, told(tmp_path)
        time.sleep(0.1)
    assert len(running_in(tmp_path)) > 6
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=60)
    assert (command.returncode, output) == (105, ""), told(tmp_path)
    assert running_in(tmp_path) == []
