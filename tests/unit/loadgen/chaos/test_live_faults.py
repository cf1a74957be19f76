"""Which faults `deepar loadgen chaos` brings, in which order, and how recovery is summed up."""

from __future__ import annotations

import pytest

from bus.errors import ConfigError
from loadgen.chaos.live.campaign import CampaignLoad
from loadgen.chaos.live.faults import (
    Fault,
    FaultKind,
    FaultRecord,
    Findings,
    Target,
    every_fault,
    parse_faults,
    percentiles,
    pick,
)


def test_every_kind_hits_every_target_once_in_the_seeds_order() -> None:
    faults = every_fault(1)
    assert len(faults) == len(set(faults)) == 15
    assert faults == every_fault(1) != every_fault(2)


def test_faults_are_chosen_by_kind_target_or_both() -> None:
    assert parse_faults("all", 3) == every_fault(3)
    assert set(parse_faults("kill", 0)) == {Fault(FaultKind.KILL, target) for target in Target}
    assert set(parse_faults("broker, stop:edge", 0)) == {
        *(Fault(kind, Target.BROKER) for kind in FaultKind),
        Fault(FaultKind.STOP, Target.EDGE),
    }


@pytest.mark.parametrize("text", ["", "explode", "kill:moon", "kill:stop", "kill:edge:cloud", "edge:cloud"])
def test_a_fault_that_does_not_exist_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown fault"):
        parse_faults(text, 0)


def test_the_seed_picks_among_several() -> None:
    names = ("e1", "e2", "e3")
    fault = Fault(FaultKind.KILL, Target.EDGE)
    picked = [pick(names, fault, seed) for seed in range(20)]
    assert picked == [pick(names, fault, seed) for seed in range(20)]
    assert set(picked) == set(names)


def test_percentiles_leave_out_what_was_not_measured() -> None:
    assert percentiles([3.0, None, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0}
    assert percentiles([None]) == {"p50": None, "p99": None}


def test_the_summary_has_what_scripts_read() -> None:
    edge = FaultRecord(Fault(FaultKind.STOP, Target.EDGE), "e1", 1.0, recovered_s=0.5, lost_after_s=3.0)
    kill = FaultRecord(Fault(FaultKind.KILL, Target.BROKER), "broker", 9.0, 7.0, None, 6.0, 1.0)
    late = FaultRecord(Fault(FaultKind.STOP, Target.BROKER), "broker", 20.0, 2.0, None, 0.5, 1.5)
    findings = Findings(7, [edge, kill, late], {"tasks": 1, "lost": 0})
    summary = findings.summary()
    first = {"kind": "stop", "target": "edge", "name": "e1", "at_s": 1.0, "recovered_s": 0.5, "lost_after_s": 3.0}
    assert summary["faults"][0] == first
    assert summary["faults"][1]["flow_after_ready_s"] == 1.0
    assert summary["recovery_s"] == {"p50": 2.0, "p99": 7.0}
    assert summary["flow_after_ready_s"] == {"p50": 1.0, "p99": 1.5}
    assert (summary["seed"], summary["tasks"], summary["lost"]) == (7, 1, 0)
    assert findings.flows_late == [late]


def test_a_devices_tasks_come_from_the_seed_without_end() -> None:
    load = CampaignLoad(tasks=3, samples=10, in_flight=1)
    coming, again = load.of("d1", 5, "run"), load.of("d1", 5, "run")
    tasks = [next(coming) for _ in range(8)]
    assert tasks == [next(again) for _ in range(8)]
    assert {task.samples for task in tasks} == {4}
    assert len({task.task_id for task in tasks}) == 8
    assert {task.device for task in tasks} == {"d1"}
