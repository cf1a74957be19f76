"""Running tasks take what becomes free, under the policy `elastic` and under no other."""

from __future__ import annotations

import math

import pytest

from bus.errors import InvariantError
from bus.messages import Change, Ended, Overran, Placed, Rerouted, Start, TaskState
from bus.values import Kind, Objective, Parts, Placement
from planner.core.core import Event, PlannerCore
from planner.core.options import CoreOptions
from planner.core.region.circuits import OPEN_S, OPENS_AFTER
from planner.core.rerouting import LEAST_GAIN, MOST_REROUTES, samples_left
from planner.search.algorithm1 import Algorithm
from planner.search.policies import BUILT_IN
from planner.search.request import Request
from tests.known import known
from tests.unit.planner.scenes import MBPS, RandomRegion, Traffic, completed, device, edge, failed, only, task, types

SAMPLES = 100


def core_with(*events: Event, policy: str = "elastic", **settings: object) -> PlannerCore:
    core = PlannerCore(0, policy, Objective.PIPELINED, options=CoreOptions(**settings))  # type: ignore[arg-type]
    for event in events:
        core.handle(event, 0.0)
    return core


def contended(policy: str = "elastic") -> tuple[PlannerCore, Placed]:
    """One slot, which t1 holds, and t2, which runs without it. The placement of t2."""
    core = core_with(edge(), device(), device("d2"), policy=policy)
    core.handle(task("t1", "d1", samples=SAMPLES), 0.0)
    changes = core.handle(task("t2", "d2", samples=SAMPLES), 0.0)
    return core, only(changes, Placed)


@pytest.mark.parametrize(
    ("samples", "from_s", "end_s", "now", "left"),
    [(10, 0.0, 10.0, 0.0, 10), (10, 0.0, 10.0, 3.0, 7), (10, 0.0, 10.0, 3.5, 7), (10, 2.0, 4.0, 3.99, 1),
     (10, 2.0, 4.0, 9.0, 1), (10, 2.0, 2.0, 2.0, 1), (3, 0.0, 0.3, 0.1, 2)],
)  # fmt: skip
def test_what_is_left_is_the_share_of_the_predicted_delay_that_has_not_passed(
    samples: int, from_s: float, end_s: float, now: float, left: int
) -> None:
    assert samples_left(samples, from_s, end_s, now) == left


def test_a_running_task_takes_the_slot_that_becomes_free() -> None:
    core, placed = contended()
    assert placed.wait_s == 0
    assert placed.placement.edge is None
    at_s = 0.25 * placed.delay_s
    changes = core.handle(completed("t1"), at_s)
    change = only(changes, Rerouted)
    assert types(changes) == ["ended", "rerouted"]
    assert (change.task_id, change.attempt, change.device, change.from_s) == ("t2", 1, "d2", at_s)
    assert change.placement.edge == "e1"
    assert change.placement.uses_slot
    assert change.samples == 75
    assert change.delay_s <= (1 - LEAST_GAIN) * (placed.delay_s - at_s)
    # it takes what a task of so many samples would take on an empty edge
    alone = core_with(edge(), device("d2"))
    fresh = only(alone.handle(task("t2", "d2", samples=75), 0.0), Placed)
    assert (change.placement, change.delay_s, change.parts) == (fresh.placement, fresh.delay_s, fresh.parts)
    r = core.ledger.reservations["t2"]
    assert (r.edge, r.slots, r.link1_bps, r.running) == ("e1", 1, change.placement.link1_bps, True)
    assert r.end_s == at_s + change.delay_s
    core.validate()
    # its new end is on time, and gives the slot back
    ended = core.handle(completed("t2", "d2"), r.end_s)
    assert not [c for c in ended if isinstance(c, Overran)]
    assert only(ended, Ended).released_slots == 1
    assert core.ledger.edges["e1"].timeline.at(r.end_s)[0] == 1
    core.validate()


@pytest.mark.parametrize("policy", [name for name in BUILT_IN if name != "elastic"])
def test_no_other_policy_reroutes(policy: str) -> None:
    world = RandomRegion(PlannerCore(0, policy, Objective.PIPELINED), 1, Traffic(rate=4.0), validate=False).run()
    assert world.counts["rerouted"] == 0


def test_a_slot_goes_to_the_task_that_it_saves_the_most_for_its_time() -> None:
    """t3 gains the same from the slot in each second, but less than t2 relative to its delay with it: its link is slow."""
    core = core_with(edge(), device(), device("d2"), device("d3"))
    core.handle(task("t1", "d1", samples=SAMPLES), 0.0)
    core.handle(task("t3", "d3", samples=SAMPLES, max_link1_bps=20 * MBPS), 0.0)
    core.handle(task("t2", "d2", samples=SAMPLES), 0.0)
    assert all(core.tasks[name].state is TaskState.RUNNING for name in ("t1", "t2", "t3"))
    assert only(core.handle(completed("t1"), 1.0), Rerouted).task_id == "t2"
    assert only(core.handle(completed("t2", "d2"), 2.0), Rerouted).task_id == "t3"


def test_a_task_that_gains_too_little_keeps_what_it_has() -> None:
    core, placed = contended()
    changes = core.handle(completed("t1"), placed.delay_s - 0.01)  # the fill alone takes longer
    assert types(changes) == ["ended"]


def test_a_promised_start_is_never_delayed() -> None:
    """t2 must not take a slot that t3 was promised for later, unless it gives it back before."""
    core = core_with(edge(), device(), device("d2"))
    core.handle(task("t1", "d1", samples=SAMPLES), 0.0)
    core.handle(task("t2", "d2", samples=150), 0.0)
    promised = only(core.handle(task("t3", "d2", samples=2 * SAMPLES, tiers=("edge",)), 0.0), Placed)
    assert promised.wait_s > 0
    changes = core.handle(completed("t1"), 0.5 * promised.start_s)
    assert [c.task_id for c in changes if isinstance(c, Start)] == ["t3"]
    core.validate()


def test_a_task_past_its_predicted_end_is_not_rerouted() -> None:
    core, placed = contended()
    changes = core.handle(completed("t1"), placed.delay_s + 1.0)
    assert only(changes, Overran).task_id == "t2"
    assert not [c for c in changes if isinstance(c, Rerouted)]
    core.validate()


def test_a_change_is_refused_for_a_task_that_does_not_run() -> None:
    core, _ = contended()
    change = only(core.handle(completed("t1"), 0.5), Rerouted)
    other, _ = contended()
    with pytest.raises(InvariantError, match="no placement that"):
        other.apply(change.model_copy(update={"attempt": 2}), 0.5)
    with pytest.raises(InvariantError, match="which is not live"):
        other.apply(change.model_copy(update={"task_id": "t9"}), 0.5)


@pytest.mark.parametrize("own_links", [False, True])
def test_ends_only_come_earlier_and_changes_are_few(own_links: bool) -> None:
    """Nothing is promised and taken back: each reroute brings the predicted end forward, a few times at most."""
    reroutes: dict[tuple[str, int], int] = {}
    found = 0

    class Watched(RandomRegion):
        def step(self, event, now) -> list[Change]:  # type: ignore[no-untyped-def]
            before = {r.task_id: r.end_s for r in self.core.ledger.reservations.values()}
            changes = super().step(event, now)
            for change in changes:
                if isinstance(change, Rerouted):
                    key = change.task_id, change.attempt
                    reroutes[key] = reroutes.get(key, 0) + 1
                    assert change.from_s == self.core.now_s
                    assert self.core.tasks[change.task_id].state is TaskState.RUNNING
                    assert change.from_s + change.delay_s < before.get(change.task_id, math.inf)
            return changes

    for seed in range(6):
        reroutes.clear()
        core = PlannerCore(0, "elastic", Objective.PIPELINED)
        found += Watched(core, seed, Traffic(rate=8.0, devices=60, own_links=own_links)).run().counts["rerouted"]
        assert max(reroutes.values(), default=0) <= MOST_REROUTES
    assert found > 5


def test_a_task_with_several_reroutes_ends_by_what_was_left_each_time() -> None:
    """The links get wider in two steps: each time the task is faster for what is left of it."""
    core = core_with(edge(speed=50.0, slots=9, link1_capacity_bps=10 * MBPS), device(models=()), device("d2"))
    placed = only(core.handle(task("t2", "d2", samples=SAMPLES, tiers=("edge",), max_link1_bps=90 * MBPS), 0.0), Placed)
    samples, begin_s, end_s = SAMPLES, 0.0, placed.delay_s
    for number, mbps in enumerate((20, 40), 1):
        at_s = begin_s + 0.5 * (end_s - begin_s)
        changes = core.handle(edge(speed=50.0, slots=9, link1_capacity_bps=mbps * MBPS), at_s)
        change = only(changes, Rerouted)
        samples = samples_left(samples, begin_s, end_s, at_s)
        assert (change.samples, change.placement.link1_bps) == (samples, mbps * MBPS)
        begin_s, end_s = at_s, at_s + change.delay_s
        rest = known(known(core.tasks["t2"].placed).rest)
        assert (rest.reroutes, rest.samples, rest.from_s) == (number, samples, at_s)
        core.validate()
    assert samples == 25


def test_a_rerouted_attempt_teaches_nothing() -> None:
    core, _ = contended()
    learning = PlannerCore(0, "elastic", Objective.PIPELINED, options=CoreOptions(learning=True))
    learning.restore(core.to_state())
    learning.handle(completed("t1"), 0.5)
    r = learning.ledger.reservations["t2"]
    assert types(learning.handle(completed("t2", "d2"), r.end_s)) == ["ended"]


@pytest.mark.parametrize(("speed", "waits"), [(4.0, False), (40.0, True)])
def test_a_task_starts_at_once_unless_waiting_is_much_better(speed: float, waits: bool) -> None:
    """Twice the edge's 1.5 s are not much better than 6 s on the device; twice 0.8 s are."""
    core = core_with(edge(speed=speed), device(), device("d2"))
    core.handle(task("t1", "d1", samples=SAMPLES), 0.0)
    request = core.request(task("t2", "d2", samples=SAMPLES))
    assert isinstance(request, Request)
    later = known(BUILT_IN["deepar"].place(Algorithm(request, 0.0)))
    assert later.start_s > 0
    choice = known(BUILT_IN["elastic"].place(Algorithm(request, 0.0)))
    assert (choice.start_s > 0) == waits


def test_a_probe_that_leaves_its_node_lets_another_task_test_it() -> None:
    """The edge's circuit is half open and t1 tests it; another planner's record then takes t1 to its device alone."""
    core = core_with(edge(slots=2), device(), device("d2"), policy="edge-only")
    core.handle(task("t0", "d2", samples=100 * SAMPLES), 0.0)
    for attempt in range(1, OPENS_AFTER + 1):
        core.handle(failed("t0", attempt=attempt, retryable=True), 0.0)
    core.handle(task("t1", samples=SAMPLES), OPEN_S)
    assert core.circuits["e1"].probe == "t1"
    alone = Placement(kind=Kind.DEVICE, cut1=3, cut2=3, cut1_name="layer_3", cut2_name="layer_3")
    change = Rerouted(
        task_id="t1", attempt=1, device="d1", placement=alone, from_s=OPEN_S, samples=9, delay_s=1.0, parts=Parts()
    )
    core.apply(change, OPEN_S)
    assert core.circuits["e1"].wants_probe(OPEN_S)
    core.validate()
