"""The fold of a region's decisions into task states."""

from __future__ import annotations

from typing import Any

import pytest

from bus.messages import (
    Admitted,
    BandwidthGrant,
    Decision,
    Ended,
    Moved,
    NodeLost,
    Overran,
    Placed,
    Rerouted,
    Retried,
    SeedInput,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.region_tasks import KnownTask, RegionTasks
from bus.snapshots import STATE_VERSION
from bus.values import Execution, Kind, Objective, Parts, Placement
from tests.known import known

TASK = TaskSubmitted(task_id="t", device="d", model="m", samples=2, input=SeedInput(seed=1))
WHERE = Placement(kind=Kind.DEVICE, cut1=1, cut2=1, cut1_name="a", cut2_name="a")


def placed(attempt: int, start_s: float = 5.0, task_id: str = "t") -> Placed:
    return Placed(
        task_id=task_id, attempt=attempt, device="d", model="m", sha256="0" * 64, samples=2, policy="p", wait_s=0.0,
        objective=Objective.PIPELINED, execution=Execution.STREAMING, placement=WHERE, start_s=start_s, delay_s=2.0,
        parts=Parts(),
    )  # fmt: skip


def rerouted(from_s: float, samples: int, delay_s: float, device_s: float = 0.0) -> Rerouted:
    return Rerouted(
        task_id="t", attempt=1, device="d", placement=WHERE.model_copy(update={"cut1": 1, "cut1_name": "a"}),
        from_s=from_s, samples=samples, delay_s=delay_s, parts=Parts(device_s=device_s),
    )  # fmt: skip


def test_the_delay_and_the_parts_of_a_rerouted_task_are_those_of_the_whole_task() -> None:
    region = RegionTasks()
    begun = placed(1).model_copy(update={"parts": Parts(edge_s=2.0), "samples": 8})
    apply(region, Admitted(task=TASK), begun, Start(task_id="t", attempt=1, device="d", at_s=6.0))
    apply(region, rerouted(7.0, 4, 0.5, 0.4))  # half of its samples are left
    now = known(region.tasks["t"].placed)
    assert (now.delay_s, now.placement.cut1, now.samples) == (1.5, 1, 8)
    assert (now.parts.edge_s, now.parts.device_s) == pytest.approx((1.0, 0.4))
    apply(region, rerouted(7.25, 2, 0.1, 0.3))  # half of the rest
    now = known(region.tasks["t"].placed)
    assert now.delay_s == pytest.approx(1.35)
    assert (now.parts.edge_s, now.parts.device_s) == pytest.approx((1.0, 0.2 + 0.3))
    assert known(now.rest).reroutes == 2
    assert region.tasks["t"].end_s == pytest.approx(7.35)


def apply(region: RegionTasks, *changes: Any, now_s: float = 1.0) -> list[KnownTask | None]:
    decision = Decision(region=0, epoch=1, nonce="n", seq=1, now_s=now_s, inputs={}, changes=changes, ledger_hash="h")
    return [task for _, task in region.apply(decision)]


def test_each_change_is_given_with_the_task_as_it_is_after_that_change() -> None:
    region = RegionTasks()
    ended = Ended(task_id="t", attempt=2, state=TaskState.FAILED, cause="why")
    changes = [
        (Admitted(task=TASK), (TaskState.WAITING, 0, None, None)),
        (placed(1), (TaskState.SCHEDULED, 1, 5.0, 7.0)),
        (BandwidthGrant(task_id="t", attempt=1, edge="e", link=1, bps=1, from_s=5.0), (TaskState.SCHEDULED, 1, 5.0, 7.0)),
        (Start(task_id="t", attempt=1, device="d", at_s=6.0), (TaskState.RUNNING, 1, 6.0, 8.0)),
        (Overran(task_id="t", attempt=1, from_s=8.0, to_s=9.0), (TaskState.RUNNING, 1, 6.0, 9.0)),
        (rerouted(7.0, 1, 0.5), (TaskState.RUNNING, 1, 6.0, 7.5)),
        (Retried(task_id="t", attempt=2, cause="node_lost"), (TaskState.WAITING, 2, None, None)),
        (placed(2, 9.0), (TaskState.SCHEDULED, 2, 9.0, 11.0)),
        (ended, (TaskState.FAILED, 2, 9.0, 3.0)),
    ]  # fmt: skip
    decision = Decision(
        region=0, epoch=1, nonce="n", seq=1, now_s=3.0, inputs={}, ledger_hash="h", changes=tuple(c for c, _ in changes)
    )
    found = []
    for change, task in region.apply(decision):
        assert task is not None
        found.append((change, (task.state, task.attempt, task.start_s, task.end_s)))
    assert found == changes
    assert (region.tasks, region.placed) == ({}, {})


def test_moves_tell_the_start_before_the_move_and_reservations_stand_in_order_of_placement() -> None:
    region = RegionTasks()
    apply(region, Admitted(task=TASK), placed(1, task_id="u"), placed(1), Moved(task_ids=("t",), starts_s=(6.0,)))
    task = region.tasks["t"]
    assert (task.moved_from_s, task.start_s, task.end_s) == (5.0, 6.0, 8.0)
    assert list(region.placed) == ["u", "t"]
    apply(region, Retried(task_id="u", attempt=2, cause="node_lost"), placed(2, task_id="u"))
    assert list(region.placed) == ["t", "u"]


def test_a_reader_that_ignores_moves_keeps_the_first_start() -> None:
    region = RegionTasks(follow_moves=False)
    apply(region, Admitted(task=TASK), placed(1), Moved(task_ids=("t",), starts_s=(6.0,)))
    assert region.tasks["t"].start_s == 5.0


def test_a_change_of_a_node_has_no_task_and_a_reader_that_joins_late_learns_from_any_change() -> None:
    region = RegionTasks()
    lost, started = apply(
        region, NodeLost(node="e", incarnation="i", cause="left"), Start(task_id="t", attempt=3, device="d", at_s=2.0)
    )
    assert lost is None
    assert started is not None
    assert (started.submitted, started.state, started.start_s) == (None, TaskState.RUNNING, 2.0)
    region.retain(())
    assert region.tasks == {}


def test_a_snapshot_restores_live_tasks() -> None:
    region = RegionTasks()
    entry = {"submitted": TASK.model_dump(), "attempt": 3, "placed": placed(3).model_dump(), "state": "RUNNING"}
    region.restore({"version": STATE_VERSION, "tasks": [entry | {"start_s": 4.0, "end_s": 6.0}]})
    known = KnownTask("t", TASK, None, TaskState.RUNNING, 3, placed(3), 4.0, 6.0)
    assert region.tasks == region.placed == {"t": known}
    with pytest.raises(ValueError, match="version"):
        region.restore({"version": STATE_VERSION + 1})
