"""A task that waits longer than planned is placed again, and starts at once where that is better than to wait on."""

from __future__ import annotations

import pytest

from bus.messages import Change, Decision, Moved, Placed, Retried, Start, TaskCompleted, TaskState
from planner.core.core import Event, PlannerCore, Tick
from planner.core.region.records import AWAITED_LATE, LATE_LEAST_S
from planner.explain import explain
from planner.search.algorithm1 import Algorithm
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import MOVES_BORNE, Reservation
from planner.search.ledger.timeline import LONG_AGO
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN, Policy
from tests.unit.planner.scenes import RandomRegion, Traffic, completed, decision_of, device, edge, only, task

LEASE_S = 1e6


class LateRegion:
    """One edge with one slot. A task of d1 runs there and does not end; one of d2 waits for it, but could run on d2 alone."""

    def __init__(self, policy: str | Policy = "deepar", samples: int = 10) -> None:
        self.core = PlannerCore(0, policy)
        self.log: list[Decision] = []
        self.now = 0.0
        for node in (edge(lease_s=LEASE_S), device("d1", lease_s=LEASE_S), device("d2", lease_s=LEASE_S)):
            self.take(node)
        self.take(task("runs", "d1", samples=samples))
        self.planned: Placed = only(self.take(task("waits", "d2", samples=samples)), Placed)
        assert self.core.tasks["waits"].state is TaskState.SCHEDULED

    def take(self, event: Event) -> list[Change]:
        changes = self.core.handle(event, self.now)
        if changes:
            self.log.append(decision_of(changes, len(self.log) + 1, self.now, self.core))
        self.core.validate()
        return changes

    def tick(self) -> list[Change]:
        """Let time pass until the core wants to be woken up."""
        wakeup_s = self.core.next_wakeup()
        assert wakeup_s is not None
        assert self.now < wakeup_s < LEASE_S / 2
        self.now = wakeup_s
        return self.take(Tick())

    def tick_until_it_starts(self) -> list[Placed]:
        while self.core.tasks["waits"].state is TaskState.SCHEDULED:
            changes = self.tick()
        return [change for change in changes if isinstance(change, Placed)]


@pytest.mark.parametrize("samples", [10, 1000])
def test_a_task_whose_awaited_end_does_not_come_starts_elsewhere(samples: int) -> None:
    region = LateRegion(samples=samples)
    (again,) = region.tick_until_it_starts()
    alone_s = again.delay_s
    assert (again.attempt, again.start_s, again.placement.edge) == (2, region.now, None)
    retried = next(change for change in region.log[-1].changes if isinstance(change, Retried))
    assert (retried.cause, retried.attempt) == (AWAITED_LATE, 2)
    assert "after the planned start" in retried.detail
    # It waits on while the end, as far away as it is late, and the edge are together faster than the device alone.
    late_s = region.now - region.planned.start_s
    assert alone_s - region.planned.delay_s < late_s < 3 * alone_s
    assert region.core.tasks["waits"].uncounted == 1
    assert region.core.tasks["runs"].state is TaskState.RUNNING


def test_a_wait_that_is_still_better_keeps_its_reservation() -> None:
    region = LateRegion()
    changes = region.tick()
    assert region.now == pytest.approx(region.planned.start_s + LATE_LEAST_S)
    assert only(changes, Moved).task_ids == ("waits",)
    assert not [change for change in changes if isinstance(change, Retried)]
    assert region.core.next_wakeup() == pytest.approx(region.planned.start_s + 2 * LATE_LEAST_S)
    assert only(region.take(completed("runs", "d1")), Start).task_id == "waits"
    assert region.core.next_wakeup() == LEASE_S  # nothing is reviewed any more


def test_a_wait_as_long_as_planned_is_not_reviewed() -> None:
    region = LateRegion()
    region.now = region.planned.start_s
    assert only(region.take(completed("runs", "d1")), Start).task_id == "waits"
    assert region.core.next_wakeup() == LEASE_S


def test_a_tick_before_a_wait_is_late_decides_nothing() -> None:
    region = LateRegion()
    region.now = region.planned.start_s + LATE_LEAST_S / 2
    assert region.take(Tick()) == []


def test_a_task_without_another_place_waits_on() -> None:
    region = LateRegion("edge-only")
    for _ in range(8):
        region.tick()
    assert region.core.tasks["waits"].attempt == 1
    assert region.now > 20 * region.planned.start_s  # the time to the next review doubles
    assert only(region.take(completed("runs", "d1")), Start).task_id == "waits"


class Own:
    """A policy of a user's own: the decisions of `deepar`, counted."""

    name = "own"

    def __init__(self) -> None:
        self.asked = 0

    def place(self, algorithm: Algorithm) -> Choice | None:
        self.asked += 1
        return BUILT_IN["deepar"].place(algorithm)


def test_a_policy_of_a_users_own_is_asked_once() -> None:
    policy = Own()
    region = LateRegion(policy)
    region.now = 100.0
    region.take(Tick())
    assert policy.asked == 2
    assert region.core.tasks["waits"].state is TaskState.SCHEDULED
    assert region.core.next_wakeup() == LEASE_S  # no tick is due any more


def test_a_fold_and_a_restored_snapshot_go_on_alike() -> None:
    region = LateRegion()
    folded = PlannerCore(0)
    for decision in region.log:
        folded.fold(decision)
    restored = PlannerCore.from_state(region.core.to_state())
    region.tick_until_it_starts()
    for core in (folded, restored):
        decisions = 0
        while core.tasks["waits"].state is TaskState.SCHEDULED:
            now = core.next_wakeup()
            assert now is not None
            decisions += bool(core.handle(Tick(), now))
        assert (now, core.state_hash) == (region.now, region.core.state_hash)
        assert decisions > 1
    replayed = PlannerCore(0)
    for decision in region.log:
        replayed.fold(decision)
        assert replayed.state_hash == decision.ledger_hash


def test_explain_tells_why_it_did_not_wait_on() -> None:
    region = LateRegion()
    region.tick_until_it_starts()
    explanation = explain(region.log, "waits")
    assert any(AWAITED_LATE in line and "after the planned start" in line for line in explanation.story)
    chosen = explanation.candidates[0]
    assert (chosen.chosen, chosen.edge, chosen.start_in_s) == (True, None, 0.0)
    on_edge = [candidate for candidate in explanation.candidates if candidate.edge == "e1" and candidate.start_in_s]
    assert on_edge
    for candidate in on_edge:
        assert (candidate.start_in_s or 0.0) + (candidate.delay_s or 0.0) > (chosen.delay_s or 0.0) > 0.0


def test_an_edge_without_a_task_that_goes_first_gives_others_its_turn() -> None:
    ledger = Ledger()
    ledger.open_edge("e1", 1, 1000, 1000)
    r = Reservation("t1", 1, "e1", "d1", 5.0, 1.0, 1, 10, 10)
    r.moves = MOVES_BORNE
    ledger.reserve(r, 0.0)
    account = ledger.edges["e1"]
    assert (account.turn_s(), account.without([r]).turn_s()) == (5.0, LONG_AGO)


def late_starts(log: list[Decision]) -> int:
    """The retries of late waits. Each is followed by a start at once, and delays no other scheduled task."""
    core, found = PlannerCore(0), 0
    for decision in log:
        starts_s: dict[str, float] = {}
        for number, change in enumerate(decision.changes):
            if starts_s and isinstance(change, Moved):
                for task_id, start_s in zip(change.task_ids, change.starts_s, strict=True):
                    assert start_s <= starts_s.get(task_id, start_s)
            core.apply(change, decision.now_s)
            if isinstance(change, Retried) and change.cause == AWAITED_LATE:
                found += 1
                rest = decision.changes[number + 1 :]
                placed = next(one for one in rest if isinstance(one, Placed) and one.task_id == change.task_id)
                start = next(one for one in rest if isinstance(one, Start) and one.task_id == change.task_id)
                assert placed.start_s == start.at_s == decision.now_s
                starts_s = {name: r.start_s for name, r in core.ledger.reservations.items() if not r.running}
        core.settled(decision.now_s)
        assert core.state_hash == decision.ledger_hash
    return found


class Prompt(RandomRegion):
    """A region that wakes its core when the core asks for it; unless it is orderly, every third end comes far too late."""

    def step(self, event: Event | str, now: float) -> list[Change]:
        changes = super().step(event, now)
        wakeup_s = self.core.next_wakeup()
        if wakeup_s is not None and wakeup_s < LEASE_S / 2 and not isinstance(event, Tick):
            self._push(max(wakeup_s, now), Tick())
        return changes

    def _push(self, at_s: float, event: Event | str) -> None:
        if isinstance(event, TaskCompleted) and not self.traffic.orderly and self._count % 3 == 0:
            at_s = self.core.now_s + 8.0 * (at_s - self.core.now_s)
        super()._push(at_s, event)


def test_a_late_wait_ends_in_a_start_at_once_that_delays_nobody() -> None:
    found = [late_starts(Prompt(PlannerCore(0), seed, Traffic(rate=3.0)).run().log) for seed in range(8)]
    assert sum(found) > 5


def test_while_predictions_come_true_no_wait_is_reviewed() -> None:
    waits = 0
    for seed in range(4):
        region = Prompt(PlannerCore(0), seed, Traffic(rate=3.0, orderly=True)).run()
        waits += region.counts["delayed"]
        assert late_starts(region.log) == 0
    assert waits > 10
