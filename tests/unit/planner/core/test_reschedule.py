"""Which tasks start or move after a change: held against a rescheduler that tries every instant, and what it costs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest

from bus.messages import Moved, Start, TaskState
from bus.values import Objective
from planner.core.core import CoreComponents, PlannerCore
from planner.core.options import CoreOptions
from planner.core.reschedule import pull, walk
from planner.core.settling import MOVES_A_CHANGE, SettlingRules
from planner.search.ledger.audit import audit
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import MOVES_BORNE, Reservation
from tests.unit.planner.rescheduler import first_instants
from tests.unit.planner.scenes import MBPS, RandomRegion, Traffic, cloud, completed, device, edge, only, profile, task

Starts = list[tuple[str, float | None]]


@pytest.mark.parametrize("own_links", [False, True], ids=["", "own-links"])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", ["deepar", "edge-only", "device-only"])
def test_every_reschedule_of_a_region_equals_the_naive_one(objective: Objective, policy: str, own_links: bool) -> None:
    compared = {"pull": 0, "walk": 0, "none": 0}
    moved = 0

    def checked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def both(ledger: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> Any:
            nonlocal moved
            found = work(ledger, edges, devices, now)
            assert [(r.task_id, start) for r, start in found] == first_instants(ledger, now)
            compared[name] += 1
            moved += len(found)
            return found

        return both

    class CheckedLedger(Ledger):
        def concerned(self, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> float | None:
            earliest = super().concerned(edges, devices, now)
            if earliest is None:
                assert first_instants(self, now) == []
                compared["none"] += 1
            return earliest

    settling = SettlingRules(pull=checked("pull", pull), walk=checked("walk", walk))
    components = CoreComponents(settling=settling, ledger=CheckedLedger)
    for seed in range(8):
        RandomRegion(
            PlannerCore(0, policy, objective, components=components),
            seed,
            Traffic(
                tasks=80,
                rate=(1.0, 4.0, 10.0)[seed % 3],
                edges=2 + seed % 3,
                devices=(8, 20, 40)[seed % 3],
                own_links=own_links,
            ),
            validate=False,
        ).run()
    assert compared["pull"] > 100
    assert compared["walk"] > 20
    assert sum(compared.values()) > 200
    assert moved > 100


def test_an_overrun_that_takes_no_resource_moves_no_task() -> None:
    """After every step no task could start earlier, and no resource is promised to two tasks."""

    class Settled(RandomRegion):
        def step(self, event, now):  # type: ignore[no-untyped-def]
            changes = super().step(event, now)
            if changes:
                assert first_instants(self.core.ledger, self.core.now_s) == []
            return changes

    for seed in range(3):
        Settled(PlannerCore(0), seed, Traffic(tasks=80, rate=6.0, edges=2, devices=20)).run()


# --- crowded ledgers: long queues of tasks that all need something else


def crowded(rng: random.Random, tasks: int, devices: int, *, alike: bool) -> Ledger:
    """A ledger in which every task stands at its first instant beside those before it; the first ones run."""
    ledger = Ledger()
    for name in ("e1", "e2"):
        ledger.open_edge(name, rng.randrange(1, 4), 100, 100)
    for number in range(0, devices, 2):  # half of the devices limit their own link
        ledger.limit_device(f"d{number}", rng.randrange(100, 120))
    for seq in range(tasks):
        edge_name = rng.choice((None, "e1", "e2", "e2"))
        length = 1.0 if alike else rng.choice((0.25, 0.5, 1.0, 3.0, rng.random() * 4))
        needs = (1, 50, 50) if alike else (rng.randrange(2), rng.randrange(1, 101), rng.randrange(101))
        if edge_name is None:
            needs = (0, 0, 0)
        device_name = f"d{rng.randrange(devices)}" if edge_name is None or rng.random() < 0.8 else None
        computes = edge_name is None or rng.random() < 0.7
        r = Reservation(f"t{seq}", seq, edge_name, device_name, NEVER_YET, length, *needs, computes=computes)
        r.moves = MOVES_BORNE if rng.random() < 0.1 else 0  # some are served first
        ledger.reserve(r, 0.0)
        (start,) = [start for task_id, start in first_instants(ledger, 0.0) if task_id == r.task_id]
        assert start is not None
        ledger.move(r.task_id, start)
    for r in list(ledger.reservations.values()):
        if r.start_s == 0.0:
            ledger.start(r.task_id)
    settle(ledger, 0.0)
    return ledger


NEVER_YET = 1e6  # behind everything else


def starts(found: Any) -> Starts:
    return [(r.task_id, start) for r, start in found]


@pytest.mark.parametrize("seed", range(12))
def test_an_early_end_pulls_a_crowd_as_the_naive_rescheduler_does(seed: int) -> None:
    rng = random.Random(seed)
    ledger = crowded(rng, 45, rng.choice((1, 4, 30)), alike=seed % 5 == 0)
    now, moved = 0.0, 0
    for _ in range(12):
        running = [r for r in ledger.reservations.values() if r.running]
        end = min(r.end_s for r in running)
        if rng.random() < 0.3:
            now, done = end, [r for r in running if r.end_s == end]  # as it was predicted
        else:
            now, done = now + (end - now) * rng.choice((0.5, 0.99)), [rng.choice(running)]
        for r in done:
            ledger.release(r.task_id, now)
        edges = {r.edge: max(now, r.end_s) for r in done if r.edge is not None}
        devices = {r.device: max(now, r.end_s) for r in done if r.device is not None}
        wanted = first_instants(ledger, now)
        assert starts(pull(ledger, edges, devices, now)) == wanted
        assert starts(walk(ledger, edges, devices, now)) == wanted
        moved += len(wanted)
        follow(ledger, wanted, now)
        settle(ledger, now)
    assert moved


@pytest.mark.parametrize("seed", range(12))
def test_an_overrun_pushes_a_crowd_back_as_the_naive_rescheduler_does(seed: int) -> None:
    rng = random.Random(seed)
    ledger = crowded(rng, 45, rng.choice((1, 4, 30)), alike=seed % 5 == 0)
    moved = 0
    for _ in range(6):
        now = min(r.end_s for r in ledger.reservations.values() if r.running)
        late = [r for r in ledger.reservations.values() if r.running and r.end_s <= now]
        for r in late:
            ledger.prolong(r.task_id, now + 0.5 + rng.random())
        edges = {r.edge: NEVER_YET for r in late if r.edge is not None}
        devices = {r.device: NEVER_YET for r in late if r.device is not None}
        wanted = first_instants(ledger, now)
        assert starts(walk(ledger, edges, devices, now)) == wanted
        moved += len(wanted)
        follow(ledger, wanted, now)
        settle(ledger, now)
    assert moved


def follow(ledger: Ledger, wanted: Starts, now: float) -> None:
    """Do in the ledger what was decided."""
    for task_id, start in wanted:
        assert start is not None
        ledger.move(task_id, start)
        if start <= now:
            ledger.start(task_id)
    audit(ledger, now)


def settle(ledger: Ledger, now: float) -> None:
    """Until every task stands at its first instant: one that was put before another may stand behind it now."""
    while (wanted := first_instants(ledger, now)) != []:
        assert starts(walk(ledger, list(ledger.edges), list(ledger.devices), now)) == wanted
        follow(ledger, wanted, now)


# --- what it costs


def work_of(call: Callable[[], Any]) -> int:
    """Lines of the planner's own code that a call executes: the same on every machine."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if "/planner/" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def one_device(tasks: int) -> PlannerCore:
    region = PlannerCore(0, "device-only")
    region.handle(device(), 0.0)
    for i in range(tasks):
        region.handle(task(f"t{i}"), 0.0)
    return region


def one_edge(tasks: int) -> PlannerCore:
    """Every task with a bandwidth and a length of its own, from a few devices."""
    rng = random.Random(1)
    region = PlannerCore(0, "edge-only")
    region.handle(edge(slots=2, link1_capacity_bps=100 * MBPS), 0.0)
    for i in range(20):
        region.handle(device(f"d{i}"), 0.0)
    for i in range(tasks):
        cap = rng.randrange(5, 90) * MBPS
        region.handle(task(f"t{i}", f"d{i % 20}", samples=rng.randrange(5, 50), max_link1_bps=cap), 0.0)
    return region


def one_own_link(tasks: int) -> PlannerCore:
    """A device whose own link is what its tasks wait for."""
    rng = random.Random(3)
    region = PlannerCore(0, "edge-only")
    for event in (edge("e1", slots=9), edge("e2", slots=9), device("d1", link1_capacity_bps=100 * MBPS)):
        region.handle(event, 0.0)
    for i in range(tasks):
        cap = rng.randrange(5, 90) * MBPS
        region.handle(task(f"t{i}", "d1", samples=rng.randrange(5, 50), max_link1_bps=cap), 0.0)
    return region


def mixed(tasks: int) -> PlannerCore:
    """Devices that compute themselves and use edges, too."""
    rng = random.Random(2)
    region = PlannerCore(0, "deepar")
    for event in (edge("e1", slots=2), edge("e2", speed=2.0), cloud(), device("d1"), device("d2")):
        region.handle(event, 0.0)
    for i in range(tasks):
        cap = rng.randrange(5, 90) * MBPS
        region.handle(task(f"t{i}", f"d{1 + i % 2}", samples=rng.randrange(5, 50), max_link1_bps=cap), 0.0)
    return region


def end_early(region: PlannerCore) -> None:
    first = min((r for r in region.ledger.reservations.values() if r.running), key=lambda r: (r.end_s, r.seq))
    node = region.tasks[first.task_id].submitted.device
    region.handle(completed(first.task_id, node), first.length_s * 0.9)


def overrun(region: PlannerCore) -> None:
    first_end = min(r.end_s for r in region.ledger.reservations.values() if r.running)
    region.handle(task("last", region.tasks[next(iter(region.tasks))].submitted.device), first_end * 1.1)


@pytest.mark.parametrize("event", [end_early, overrun])
@pytest.mark.parametrize("make", [one_device, one_edge, one_own_link, mixed])
def test_an_event_costs_work_in_proportion_to_the_queue_at_most(
    make: Callable[[int], PlannerCore], event: Callable[[PlannerCore], None]
) -> None:
    sizes = (100, 200, 400)
    regions = [make(size) for size in sizes]
    costs = [work_of(partial(event, region)) for region in regions]
    for smaller, larger in pairwise(costs):
        assert larger < 2.5 * smaller, f"{dict(zip(sizes, costs, strict=True))} lines for queues of {sizes}"
    for region in regions:
        region.validate()


def test_a_moved_queue_is_one_change_of_bounded_size() -> None:
    region = one_device(300)
    changes = region.handle(completed("t0"), 0.1)
    moved = only(changes, Moved)
    assert list(moved.task_ids) == [f"t{i}" for i in range(2, 300)]
    assert len(changes) == 3  # ended, start, moved
    long = PlannerCore(0, "device-only", options=CoreOptions(max_waiting_per_device=5000))
    long.handle(device(models=(profile(layer_s=(0.001, 0.001, 0.001)),)), 0.0)
    count = 2 * MOVES_A_CHANGE + 52
    for i in range(count):
        long.handle(task(f"t{i}"), 0.0)
    moves = [change for change in long.handle(completed("t0"), 0.001) if isinstance(change, Moved)]
    assert [len(change.task_ids) for change in moves] == [MOVES_A_CHANGE, MOVES_A_CHANGE, 50]
    assert [task_id for change in moves for task_id in change.task_ids] == [f"t{i}" for i in range(2, count)]


def test_one_device_cannot_fill_the_queue_of_its_region() -> None:
    region = PlannerCore(0, "device-only", options=CoreOptions(max_waiting=10, max_waiting_per_device=4))
    region.handle(device("d1"), 0.0)
    region.handle(device("d2"), 0.0)
    ends = [region.handle(task(f"t{i}", "d1"), 0.0)[-1] for i in range(6)]
    assert [getattr(end, "cause", "") for end in ends] == [""] * 5 + ["device_queue_full"]
    assert (ends[-1].state, ends[-1].detail) == (TaskState.REJECTED, "4 tasks of d1 wait already")  # type: ignore[union-attr]
    assert only(region.handle(task("other", "d2"), 0.0), Start).task_id == "other"
    # tasks of a device that is not there count as well, and room that is given back is there again
    ends = [region.handle(task(f"w{i}", "d3"), 0.0)[-1] for i in range(5)]
    assert [getattr(end, "cause", "") for end in ends] == [""] * 4 + ["device_queue_full"]
    region.handle(completed("t0", "d1"), 0.1)
    assert region.handle(task("again", "d1"), 0.1)[-1].type == "placement"
    region.validate()
