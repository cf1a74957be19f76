"""`deepar loadgen chaos`: what its exit codes mean, and that stdout holds one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bus.errors import ConfigError
from deploy.commands.loadgen import chaos, replay
from deploy.services.live_region import RegionOptions
from loadgen.chaos.live.faults import Fault, FaultKind, FaultRecord, Findings, Target

GOOD: dict[str, Any] = {
    "tasks": 2, "samples": 20, "lost": 0, "visible_duplicates": 0, "suppressed_duplicates": 5, "ledger_violations": 0,
    "violations": [], "unreadable_frames": 0, "wrong_results": 0, "ends": {"COMPLETED": 2},
}  # fmt: skip


def run(tmp_path: Path, findings: Findings) -> tuple[int, dict[str, Any]]:
    """The command on a region that was broken already; its exit code and what it printed."""

    def inject(*given: Any) -> Findings:
        return findings

    result = CliRunner().invoke(replay.app, ["chaos", "--json", "--out", str(tmp_path)], obj=chaos.Injector(inject))
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(result.stdout)
    return result.exit_code, json.loads(result.stdout)


def findings(recovered_s: float | None = 6.0, flow_s: float | None = 0.4, **verdict: Any) -> Findings:
    record = FaultRecord(Fault(FaultKind.KILL, Target.BROKER), "broker", 3.0, recovered_s, None, 5.6, flow_s)
    return Findings(1, [record], GOOD | verdict)


def test_a_region_that_held_is_fine(tmp_path: Path) -> None:
    code, printed = run(tmp_path, findings())
    assert code == 0
    wanted = {"faults", "tasks", "samples", "lost", "visible_duplicates", "suppressed_duplicates", "ledger_violations"}
    assert wanted <= printed.keys()
    assert printed["faults"][0].keys() >= {"kind", "target", "at_s", "recovered_s"}


@pytest.mark.parametrize(
    "broken",
    [
        {"lost": 1},
        {"visible_duplicates": 1},
        {"ledger_violations": 1, "violations": ["t1 has no end"]},
        {"unreadable_frames": 1},
        {"wrong_results": 1},
        {"ends": {"COMPLETED": 1, "FAILED": 1}},
        {"recovered_s": None, "flow_s": None},
    ],
)
def test_a_promise_that_did_not_hold_is_a_failure(tmp_path: Path, broken: dict[str, Any]) -> None:
    assert run(tmp_path, findings(**broken))[0] == 1
    assert run(tmp_path, findings(**({"flow_s": 2.0} | broken)))[0] == 1  # worse than an aim that was missed


def test_results_that_flow_late_are_an_aim_that_was_missed(tmp_path: Path) -> None:
    assert run(tmp_path, findings(flow_s=1.01))[0] == 99
    assert run(tmp_path, findings(flow_s=1.0))[0] == 0


def test_the_results_of_another_run_are_not_judged_again(tmp_path: Path) -> None:
    (tmp_path / "d1.jsonl").touch()
    result = CliRunner().invoke(replay.app, ["chaos", "--out", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)


def test_a_region_has_the_processes_that_were_asked_for(tmp_path: Path) -> None:
    commands = RegionOptions(planners=2, devices=3, edges=1, lease_s=2.5).commands(tmp_path)
    names = {target: [name for name, (of, _) in commands.items() if of is target] for target in Target}
    assert names == {
        Target.PLANNER: ["p1", "p2"],
        Target.DEVICE: ["d1", "d2", "d3"],
        Target.EDGE: ["e1"],
        Target.CLOUD: ["c1"],
        Target.BROKER: [],
    }
    assert commands["e1"][1][-2:] == ["--lease", "2.5s"]
