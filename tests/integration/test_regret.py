"""`deepar loadgen bench regret` as a user runs it, with one quick cell: it starts Kafka and eight processes, and ends all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka_broker import apache_required, choose

KEYS = {
    *("network", "model", "samples", "regret", "regret_se", "regret_s"),
    *("regret_first", "regret_first_se", "regret_first_s"),
    *("error_first", "error", "error_s", "best_policy", "tasks"),
}


@pytest.fixture(autouse=True)
def apache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command starts Apache Kafka itself, whichever broker other tests use."""
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    if choose().how != "apache":
        (pytest.fail if apache_required() else pytest.skip)(f"needs Apache Kafka: {choose().text}")


def test_a_cell_is_measured_live(tmp_path: Path) -> None:
    cell = ("--network", "lan", "--model", "lenet", "--samples", "3", "--tasks", "6")
    done = subprocess.run(
        [sys.executable, "-m", "deepar", "loadgen", "bench", "regret", *cell, "--json"],
        env=os.environ | {"NO_COLOR": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180.0,
        check=False,
    )
    assert done.returncode in (0, 99), done.stderr  # whether the aims are reached depends on the machine
    found = json.loads(done.stdout)
    (row,) = found["results"]
    assert row.keys() == KEYS
    assert (row["network"], row["model"], row["samples"], row["tasks"]) == ("lan", "lenet", 3, 6)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert row["regret"] > 0
    policies = {policy["policy"]: policy for policy in found["policies"]}
    assert row["best_policy"] in policies
    ours, best = policies["deepar"], policies[row["best_policy"]]
    assert row["regret"] == pytest.approx(ours["mean_delay_s"] / best["mean_delay_s"])
    assert policies["device-only"]["where"] == "device 7/7"
    assert policies["edge-only"]["where"] == "edge 0/7"
    assert policies["cloud-only"]["where"] == "cloud 0/0"
    for policy in policies.values():
        assert policy["mean_ended_s"] > policy["mean_delay_s"] > 0
    assert done.returncode == (0 if all(aim["pass"] for aim in found["aims"]) else 99)
    assert not list(tmp_path.glob("deepar-regret-*"))  # nothing is left behind
