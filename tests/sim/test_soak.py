"""An hour in virtual time: nothing grows, every task ends; what is planted to grow is seen."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bus.messages import Decision, Ended
from deploy.commands.simulate import figures
from loadgen.chaos.soak.slow_cloud import slow_cloud
from loadgen.chaos.soak.soak import ALLOWED, soak
from loadgen.chaos.soak.soak_region import SoakScenario
from loadgen.sim.programs import Programs
from stages.devices.device import Device
from tests.sim.canaries import canary


def test_an_hour_of_arrivals_and_churn_leaves_nothing_behind() -> None:
    told: list[tuple[float, float]] = []
    result = soak(SoakScenario(hours=1.0, looks=24), progress=lambda done, total: told.append((done, total)))
    assert result.flat, result.verdict()
    assert result.states == {"COMPLETED": result.submitted}
    assert result.submitted > 500
    assert sum(result.churn.values()) > 5
    assert told[-1] == pytest.approx((1.0, 1.0))


def test_planted_a_device_that_keeps_its_tasks_is_seen() -> None:
    class KeepingDevice(Device):
        def on_decision(self, decision: Decision, fenced: Iterable[str]) -> None:
            changes = tuple(change for change in decision.changes if not isinstance(change, Ended))
            super().on_decision(decision.model_copy(update={"changes": changes}), fenced)

    result = soak(SoakScenario(hours=0.5, looks=16, churn_every_s=1e6), programs=Programs(device=KeepingDevice))
    assert not result.flat
    grown = [row["measure"] for row in result.verdict() if not row["flat"]]
    assert "stage_tasks" in grown


def test_a_slow_cloud_makes_the_device_slow_and_no_buffer_grow() -> None:
    found = slow_cloud(10.0, samples=120)
    assert found["within"], found
    assert found["under_way"] == found["window"]
    assert found["samples_per_s"]["slow"] < found["samples_per_s"]["as_said"] / 5


def test_planted_a_device_that_does_not_wait_fills_the_buffers() -> None:
    assert not slow_cloud(10.0, samples=120, programs=canary("window ignored").programs)["within"]


def test_the_command_writes_a_plot_and_the_numbers(tmp_path: Path) -> None:
    result = CliRunner().invoke(figures.app, ["soak", "--hours", "0.25", "--out", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code in (0, 99), result.output  # so short a soak need not be flat
    assert {row["measure"] for row in found["measures"]} == set(ALLOWED)
    assert found["unended"] == 0
    assert found["slow_cloud"]["within"]
    assert {Path(path).name for path in found["files"]} == {"soak.json", "soak.png"}
    assert all(Path(path).stat().st_size > 1000 for path in found["files"])
    assert len(json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))["looks"]) == 24
