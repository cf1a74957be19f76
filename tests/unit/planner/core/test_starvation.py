"""A task that overruns push back again and again gets its turn."""

import heapq
import itertools

import pytest

from bus.messages import Moved, Placed, Start
from planner.core.core import PlannerCore
from planner.explain import explain
from planner.search.ledger.reservation import MOVES_BORNE
from tests.unit.planner.core.test_circuits import Region
from tests.unit.planner.scenes import MBPS, RandomRegion, Traffic, cloud, completed, device, edge, task

LEASE_S = 1e6


def busy_edge(region: Region, *, until_s: float, slowdown: float, small_mbps: int, wide_mbps: int) -> dict[str, float]:
    """Two arrivals a second of tasks that take longer than predicted, and one that needs the whole link. When each starts."""
    events: list[tuple[float, int, object]] = []
    numbers = itertools.count(100_000)
    started: dict[str, float] = {}
    for number in range(int(2 * until_s)):
        name = "wide" if number == 10 else f"t{number}"
        cap = wide_mbps if name == "wide" else small_mbps
        submitted = task(name, f"d{number % 50}", samples=50, input_bytes=50_000, max_link1_bps=cap * MBPS)
        heapq.heappush(events, (0.5 * number, number, submitted))
    while events and events[0][0] < until_s:
        now, number, event = heapq.heappop(events)
        for change in region.core.handle(event, now):  # type: ignore[arg-type]
            if isinstance(change, Start):
                started[change.task_id] = change.at_s
                length_s = region.core.ledger.reservations[change.task_id].length_s
                done = completed(change.task_id, change.device, change.attempt)
                heapq.heappush(events, (now + slowdown * length_s, next(numbers), done))
        if number % 50 == 0:
            region.core.validate()
    return started


@pytest.mark.parametrize(("slowdown", "small_mbps"), [(5.0, 50), (7.0, 30), (8.0, 20)])
def test_a_task_that_needs_the_whole_link_starts_though_all_others_overrun(slowdown: float, small_mbps: int) -> None:
    nodes = [edge(slots=8, speed=100.0, link1_capacity_bps=100 * MBPS, lease_s=LEASE_S)]
    nodes += [device(f"d{i}", lease_s=LEASE_S) for i in range(50)]
    region = Region(*nodes)
    started = busy_edge(region, until_s=120.0, slowdown=slowdown, small_mbps=small_mbps, wide_mbps=100)
    assert started["wide"] < 60.0
    before = [name for name, at_s in started.items() if at_s < started["wide"]]
    assert len(before) < 60
    assert len(started) > len(before) + 20  # the others go on afterwards


def test_nothing_is_put_before_a_task_that_was_moved_too_often() -> None:
    nodes = [edge(slots=8, link1_capacity_bps=100 * MBPS, lease_s=LEASE_S), cloud(lease_s=LEASE_S)]
    nodes += [device(f"d{i}", lease_s=LEASE_S) for i in range(60)]
    region = Region(*nodes)
    region.handle(task("runs", "d0", samples=10, max_link1_bps=95 * MBPS), 0.0)
    region.handle(task("wide", "d1", samples=10, max_link1_bps=100 * MBPS), 0.0)
    core = region.core
    wide = core.ledger.reservations["wide"]
    now, number = 0.0, 2
    while True:
        now = core.ledger.reservations["runs"].end_s + 0.01
        changes = region.handle(
            task(f"t{number}", f"d{number}", samples=1, input_bytes=100, max_link1_bps=5 * MBPS), now
        )
        assert any(isinstance(change, Moved) and "wide" in change.task_ids for change in changes)
        if wide.moves == MOVES_BORNE:
            break
        assert core.ledger.reservations[f"t{number}"].running  # it slips in
        region.handle(completed(f"t{number}", f"d{number}"), now)
        number += 1
    changes = region.handle(task("next", "d59", samples=1, input_bytes=100, max_link1_bps=5 * MBPS), now)
    (placed,) = [change for change in changes if isinstance(change, Placed)]
    assert core.ledger.reservations[f"t{number}"].start_s >= wide.start_s
    assert placed.start_s >= wide.start_s
    found = explain(region.log, "next")
    assert "its turn (wide was moved to a later start 10 times, and goes first)" in found.candidates[0].lacked
    # what stands behind it stays behind it when room is given back
    changes = region.handle(completed("runs", "d0"), now)
    starts = [change.task_id for change in changes if isinstance(change, Start)]
    assert starts[0] == "wide"


def test_worlds_in_which_much_overruns_keep_their_accounts() -> None:
    """The ledger's audit after every step, with tasks that are served first."""

    class Slow(RandomRegion):
        first_served = 0

        def _start(self, start: Start, now: float) -> None:
            held = self.core.ledger.reservations.get(start.task_id)
            if held is not None:
                done = completed(start.task_id, start.device, start.attempt)
                self._push(now + held.length_s * (1.0 + 4.0 * self.rng.random()), done)
            Slow.first_served += sum(len(account.first_served) for account in self.core.ledger.edges.values())

    for seed in range(2):
        Slow(PlannerCore(0, "edge-only"), seed, Traffic(tasks=100, edges=1, devices=40, reach=1, rate=5.0)).run()
    assert Slow.first_served > 100
