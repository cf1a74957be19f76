"""Sessions in the planner's core: placed at once, booked by load, without an end, and exactly replayed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bus.messages import (
    Change,
    Decision,
    Ended,
    NodeHeartbeat,
    Overran,
    Placed,
    SessionTerms,
    Start,
    TaskState,
    TaskSubmitted,
)
from planner.core.core import Event, PlannerCore, Tick
from tests.unit.planner.scenes import MBPS, cloud, completed, decision_of, device, edge, only, task


def session(task_id: str = "s1", node: str = "d1", rate_hz: float = 10.0, **values: Any) -> TaskSubmitted:
    terms = SessionTerms(rate_hz=rate_hz, latency_s=values.pop("latency_s", None))
    return task(task_id, node, samples=1, session=terms, **{"max_link1_bps": None, **values})


class Recorded:
    """A core whose decisions are recorded, as a planner does it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.core = PlannerCore(0, **settings)
        self.log: list[Decision] = []

    def take(self, event: Event, now: float = 0.0) -> list[Change]:
        changes = self.core.handle(event, now)
        if changes:
            decision = decision_of(changes, len(self.log) + 1, now, self.core)
            self.log.append(Decision.model_validate_json(decision.model_dump_json()))
        self.core.validate()
        return changes

    def replayed(self) -> PlannerCore:
        again = PlannerCore(0, **self.settings)
        for decision in self.log:
            again.fold(decision)
            assert again.state_hash == decision.ledger_hash
        again.validate()
        return again


@pytest.fixture
def region() -> Recorded:
    """A device, an edge and a cloud."""
    found = Recorded()
    for node in (device(), edge(), cloud()):
        found.take(node)
    return found


def test_a_session_is_placed_at_once_runs_without_an_end_and_is_ended_by_its_device(region: Recorded) -> None:
    changes = region.take(session(), 1.0)
    placed = only(changes, Placed)
    assert placed.session is not None
    assert (placed.wait_s, placed.samples, placed.session.rate_hz) == (0.0, 1, 10.0)
    assert only(changes, Start).at_s == 1.0
    held = region.core.ledger.reservations["s1"]
    assert (held.slots, held.computes, held.end_s) == (0, False, float("inf"))
    for node in ("d1", "e1", "c1"):
        region.take(NodeHeartbeat(node=node, incarnation="i1"), 10_000.0)
    assert region.take(Tick(), 10_000.0) == []
    text = json.dumps(region.core.to_state(), allow_nan=False)
    again = PlannerCore(0)
    again.restore(json.loads(text))
    again.validate()
    assert again.state_hash == region.core.state_hash == region.replayed().state_hash
    ended = only(region.take(completed("s1"), 10_001.0), Ended)
    assert (ended.state, ended.released_slots, ended.released_link1_bps) == (
        TaskState.COMPLETED,
        0,
        placed.placement.link1_bps,
    )
    assert region.replayed().state_hash == region.core.state_hash


def test_a_session_moves_scheduled_tasks_and_waits_for_running_ones(region: Recorded) -> None:
    """Tasks that run hold the whole link; what is only scheduled makes room, and nothing is rejected."""
    region.take(edge(link1_capacity_bps=50 * MBPS, incarnation="i2"), 0.5)
    first = only(region.take(task("t1", tiers=None, max_link1_bps=None), 1.0), Placed)
    assert first.placement.link1_bps == 50 * MBPS
    for number in (2, 3):
        region.take(device(f"d{number}"), 1.0)
        region.take(task(f"t{number}", f"d{number}", max_link1_bps=None), 1.0)
    region.take(device("d9", models=(device().models[0].model_copy(update={"layer_s": (9.0, 9.0, 9.0)}),)), 1.0)
    changes = region.take(session("s1", "d9"), 1.01)
    placed = next(change for change in changes if isinstance(change, Placed) and change.task_id == "s1")
    end_s = region.core.ledger.reservations["t1"].end_s
    assert placed.placement.edge == "e1"
    assert placed.start_s == end_s
    changes = region.take(completed("t1"), end_s)
    started = [change.task_id for change in changes if isinstance(change, Start)]
    assert started[0] == "s1"
    assert not [change for change in changes if isinstance(change, Overran)]
    ends = [change for decision in region.log for change in decision.changes if isinstance(change, Ended)]
    assert [end.state for end in ends] == [TaskState.COMPLETED]
    assert region.replayed().state_hash == region.core.state_hash
