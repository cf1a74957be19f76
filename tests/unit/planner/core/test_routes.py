"""Placements of several routes: what they reserve, what they are worth, what they teach, and what is refused."""

from __future__ import annotations

import json
import random
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest

from bus.errors import ConfigError
from bus.messages import Ended, NodeAnnounced, Placed, TaskCompleted
from bus.routes.interleave import interleaved_s
from bus.values import Kind, Objective, Parts, Placement
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from planner.search.algorithm1 import Algorithm
from planner.search.cut_search import CutSearch
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.placements import Choice
from planner.search.policies import BUILT_IN, DEVICE_WORTH, EXACT_BELOW, Restriction
from planner.search.request import Request
from planner.search.route_search import RouteSearch, route_search_bytes
from tests.unit.planner.scenes import MBPS, RandomRegion, Traffic, cloud, device, edge, only, profile, random_rows, task

ROUTES = BUILT_IN["routes"]
SINGLE = BUILT_IN["deepar"]
assert isinstance(ROUTES, Restriction)
LARGE: dict[str, Any] = {"samples": 500, "max_link1_bps": 30 * MBPS, "max_link2_bps": 10 * MBPS}


class Asked:
    """The policy `routes`, which keeps what it was asked and what it answered."""

    name = "asked"

    def __init__(self) -> None:
        self.values: list[tuple[float, float, int]] = []  # of the choice, of the best single route, other tasks
        self.best: list[tuple[float, float]] = []  # of the best mix, and of the best mix at any known start

    def place(self, algorithm: Algorithm) -> Choice | None:
        choice, single = ROUTES.place(algorithm), SINGLE.place(algorithm)
        assert (choice is None) == (single is None) or choice is not None
        if choice is not None and single is not None:
            values = algorithm.value_s(choice), algorithm.value_s(single)
            self.values.append((*values, algorithm.request.others))
        mixes = algorithm.with_routes()
        best = mixes.best()
        if best is not None:
            self.best.append((mixes.value_s(best), tried_one_by_one(mixes)))
        return choice


def tried_one_by_one(algorithm: Algorithm) -> float:
    """The least value of all families of all edges at every instant at which something changes."""
    request, now = algorithm.request, algorithm.now
    alone = algorithm.on_device()
    found = [] if alone is None else [alone]
    for option in request.edges:
        times = {
            now,
            *option.account.timeline.times,
            *(() if request.device is None else request.device.timeline.times),
        }
        for start in sorted(at_s for at_s in times if at_s >= now):
            for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
                choice = algorithm.at(option, family, start)
                if choice is not None and algorithm.late_s(choice) <= 0:
                    found.append(choice)
    return min(algorithm.value_s(choice) for choice in found)


@pytest.mark.parametrize("own_links", [False, True], ids=["", "own-links"])
def test_a_mix_is_never_worse_than_the_best_single_route_and_is_the_best_of_all_starts(own_links: bool) -> None:
    better = asked = 0
    for seed in range(6):
        policy = Asked()
        traffic = Traffic(rate=(0.5, 2.0, 5.0)[seed % 3], own_links=own_links, devices=4 if own_links else 12)
        RandomRegion(PlannerCore(0, policy, Objective.PIPELINED), seed, traffic).run()
        for value, single, others in policy.values:
            if not others:
                assert value <= single * (1 + 1e-9)
                better += value < 0.98 * single
        for best, least in policy.best:
            assert best == pytest.approx(least, rel=1e-9)
        asked += len(policy.best)
    assert better > 30
    assert asked > 300


def test_what_is_placed_is_reserved_replayed_and_restored() -> None:
    core = PlannerCore(0, "routes", Objective.PIPELINED)
    world = RandomRegion(core, 5, Traffic(tasks=150, rate=3.0, edges=4, devices=10), validate=True).run()
    mixed = [placed for placed in world.placed.values() if placed.placement.routes is not None]
    assert len(mixed) > 40
    for placed in mixed:
        consistent(placed)
    other = PlannerCore(0, "routes", Objective.PIPELINED)
    for decision in world.log:
        other.fold(type(decision).model_validate_json(decision.model_dump_json()))
        assert other.state_hash == decision.ledger_hash
    for placed in mixed:  # what is built unchecked is what validation builds
        assert Placed.model_validate_json(placed.model_dump_json()) == placed


def consistent(placed: Placed) -> None:
    """Shares by size, the cuts of the largest route beyond the device, and the kind and grants of what is used.

    Routes that stand by have no share, and come last.
    """
    where = placed.placement
    assert where.routes is not None
    assert len(where.routes) > 1
    assert all(one.share >= other.share >= 0 for one, other in pairwise(where.routes))
    assert sum(route.share > 0 for route in where.routes) > 1
    largest = next(route for route in where.routes if not route.device_only)
    assert (where.cut1, where.cut2) == (largest.cut1, largest.cut2)
    tiers = where.kind.split("+")
    assert ("device" in tiers, "edge" in tiers) == (where.uses_device, where.uses_slot)
    assert where.uses_cloud == (where.link2_bps > 0)
    busy = placed.parts.model_dump()
    for at, name in enumerate(("device_s", "link1_s", "edge_s", "link2_s", "cloud_s")):
        mean_s = sum(route.share * route.stations_s[at] for route in where.routes)
        assert busy[name] == pytest.approx(mean_s * placed.samples)


def slow_link_region(server: NodeAnnounced | None = None, **options: Any) -> PlannerCore:
    """One device whose model is worth sharing with the edge: both links and all tiers take about as long."""
    core = PlannerCore(0, "routes", Objective.PIPELINED, options=CoreOptions(**options))
    for node in (server or edge(slots=8), cloud(), device()):
        core.handle(node, 0.0)
    return core


def placement(core: PlannerCore, **values: Any) -> Placement:
    values = {**LARGE, **values}
    where: Placement = only(core.handle(task(**values), 0.0), Placed).placement
    return where


def test_a_mix_holds_its_device_and_a_slot_if_any_of_its_routes_uses_them() -> None:
    core = slow_link_region()
    where = placement(core)
    assert where.routes is not None
    assert where.uses_device
    assert where.uses_slot
    (held,) = core.ledger.reservations.values()
    assert (held.slots, held.computes) == (1, True)
    assert (held.link1_bps, held.link2_bps) == (where.link1_bps, where.link2_bps)
    core.validate()


def test_a_task_beside_one_that_computes_on_their_device_mixes_routes_without_it() -> None:
    core = slow_link_region()
    placement(core)
    other = placement(core, task_id="t2")
    assert not other.uses_device
    core.validate()


def test_a_device_with_other_tasks_computes_only_for_a_gain() -> None:
    """Without other tasks, any gain is worth it."""
    core = slow_link_region(edge(slots=8, speed=20.0))
    first = only(core.handle(task("other", tiers=("edge", "cloud"), samples=5000, max_link1_bps=MBPS), 0.0), Placed)
    assert not first.placement.uses_device
    chosen = set()
    for input_bytes in (1_000, 10_000, 100_000, 1_000_000):
        request = core.request(task("probe", **{**LARGE, "max_link1_bps": 300 * MBPS}, input_bytes=input_bytes))
        assert isinstance(request, Request)
        assert request.others == 1
        algorithm = Algorithm(request, 0.0)
        beside = ROUTES.place(algorithm)
        request.others = 0
        best, other = ROUTES.place(algorithm), algorithm.with_routes().best(device_computes=False)
        assert best is not None
        assert other is not None
        assert best.uses_device
        worth_it = algorithm.value_s(best) <= (1.0 - DEVICE_WORTH) * algorithm.value_s(other)
        assert beside == (best if worth_it else other)
        chosen.add(worth_it)
    assert chosen == {False, True}


def test_a_task_of_some_tiers_mixes_routes_of_these_only() -> None:
    where = placement(slow_link_region(), tiers=("edge", "cloud"), max_link1_bps=300 * MBPS)
    assert where.routes is not None
    assert where.kind is Kind.EDGE_CLOUD
    where = placement(slow_link_region(), tiers=("device", "edge"))
    assert where.routes is not None
    assert where.kind is Kind.DEVICE_EDGE
    assert where.link2_bps == 0


def test_the_sequential_objective_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="routes") as caught:
        PlannerCore(0, "routes")
    assert caught.value.remedy == "--objective pipelined"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda routes: routes[:1],  # the shares sum to less than 1
        lambda routes: (*routes, routes[0]._replace(share=0.0)),  # a route without samples
        lambda routes: (routes[0]._replace(cut1=routes[0].cut2 + 1), *routes[1:]),  # the edge before the device
        lambda routes: (routes[0]._replace(cut2=9), *routes[1:]),  # a layer that is not there
        lambda routes: tuple(route._replace(share=1 / 9) for route in [*routes, *routes, *routes][:9]),  # too many
        lambda routes: routes[1:] + (routes[0]._replace(share=1e-3),),  # the cuts of another route than the largest
    ],
)
def test_a_users_choice_of_impossible_routes_is_rejected(spoil: Any) -> None:
    class Muddled:
        name = "muddled"

        def place(self, algorithm: Algorithm) -> Choice | None:
            choice = algorithm.with_routes().best()
            assert choice is not None
            assert len(choice.routes) > 1
            return choice._replace(routes=spoil(choice.routes))

    core = PlannerCore(0, Muddled(), Objective.PIPELINED)
    for node in (edge(slots=8), cloud(), device()):
        core.handle(node, 0.0)
    ended = only(core.handle(task(**LARGE), 0.0), Ended)
    assert ended.cause == "policy_error"
    assert not core.ledger.reservations


def test_a_users_choice_that_computes_on_a_busy_device_by_one_route_is_rejected() -> None:
    class Greedy:
        name = "greedy"

        def place(self, algorithm: Algorithm) -> Choice | None:
            if algorithm.request.device is None:
                return algorithm.with_routes().best()
            free = algorithm.request
            busy, free.device = free.device, None
            choice = algorithm.with_routes().best()
            free.device = busy
            return choice

    core = PlannerCore(0, Greedy(), Objective.PIPELINED)
    for node in (edge(slots=8), cloud(), device()):
        core.handle(node, 0.0)
    assert placement(core).uses_device
    ended = only(core.handle(task("t2", **LARGE), 0.0), Ended)
    assert ended.cause == "policy_error"


def test_a_mix_teaches_what_its_samples_took() -> None:
    """A device that is twice as slow as its profile, whichever shares the device gave its samples in the end."""
    for planned in (True, False):
        core = slow_link_region(learning=True)
        placed = only(core.handle(task(**LARGE), 0.0), Placed)
        routes = placed.placement.routes
        assert routes is not None
        if planned:
            taken = [route.share * placed.samples for route in routes]
            told = None
        else:
            told = (placed.samples - len(routes) + 1, *[1] * (len(routes) - 1))
            taken = list(map(float, told))
        sums = [sum(n * r.stations_s[at] for n, r in zip(taken, routes, strict=True)) for at in range(7)]
        measured = Parts(
            device_s=2 * sums[0],
            link1_s=sums[1],
            edge_s=sums[2],
            link2_s=sums[3],
            cloud_s=sums[4],
            result_s=sum(sums[5:]),
        )
        done = TaskCompleted(
            task_id="t1", attempt=1, node="d1", measured=measured, delay_s=placed.delay_s, route_samples=told
        )
        core.handle(done, placed.delay_s)
        table = core.estimates
        assert table.node("d1", "m").a == pytest.approx(2.0, rel=0.1)
        assert table.node("e1", "m").a == pytest.approx(1.0, rel=0.1)


def test_a_mix_that_went_as_predicted_teaches_no_overhead() -> None:
    core = slow_link_region(learning=True)
    placed = only(core.handle(task(**LARGE), 0.0), Placed)
    done = TaskCompleted(task_id="t1", attempt=1, node="d1", measured=placed.parts, delay_s=placed.delay_s)
    core.handle(done, placed.delay_s)
    again = only(core.handle(task("t2", **LARGE), placed.delay_s + 1), Placed)
    assert again.delay_s == pytest.approx(placed.delay_s, rel=1e-3)


def test_families_of_single_and_mixed_choices_do_not_overlap() -> None:
    """A family's mix that does not use all that the family reserves is left to a smaller family."""
    core = slow_link_region()
    request = core.request(task(**{**LARGE, "max_link2_bps": 1}))
    assert isinstance(request, Request)
    algorithm = Algorithm(request, 0.0).with_routes()
    assert algorithm.best({ALL_THREE}) is None  # the cloud is out of reach, so its mix is that of device and edge
    choice = algorithm.best()
    assert choice is not None
    assert choice.family in (DEVICE, DEVICE_EDGE)
    assert choice.link2_bps == 0
    assert profile().layers == 3


def test_a_small_task_is_predicted_sample_by_sample() -> None:
    mixed = 0
    for samples in range(1, 60):
        core = slow_link_region()
        values = {**LARGE, "samples": samples}
        placed = only(core.handle(task(**values), 0.0), Placed)
        single = PlannerCore(0, "deepar", Objective.PIPELINED)
        for node in (edge(slots=8), cloud(), device()):
            single.handle(node, 0.0)
        assert placed.delay_s <= only(single.handle(task(**values), 0.0), Placed).delay_s
        routes = placed.placement.routes
        if routes is None:
            continue
        stations, shares = [route.stations_s for route in routes], [route.share for route in routes]
        exact_s = interleaved_s([sum(s) for s in stations], stations, shares, samples)
        slowest_s = max(sum(a * s[k] for a, s in zip(shares, stations, strict=True)) for k in range(7))
        formula_s = max(sum(route.stations_s) for route in routes if not route.device_only) + (samples - 1) * slowest_s
        assert placed.delay_s == pytest.approx(exact_s if samples < EXACT_BELOW else formula_s)
        assert samples >= EXACT_BELOW or exact_s != pytest.approx(formula_s, rel=1e-6)
        mixed += 1
    assert mixed > 20


@pytest.mark.parametrize("layers", [1, 13, 92, 200])
def test_the_memory_of_a_search_is_bounded(layers: int) -> None:
    rows = random_rows(random.Random(layers), layers, exact=False)
    search = CutSearch(*rows)
    tracemalloc.start()
    try:
        routes = RouteSearch(search)
        for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE):
            routes.best(family, 1e8, 1e7, 100, 1000)
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held_bytes <= route_search_bytes(layers)


def test_a_snapshot_keeps_the_routes_of_running_and_scheduled_tasks() -> None:
    core = slow_link_region(edge(slots=1))
    for number in range(4):
        core.handle(task(f"t{number}", **LARGE), float(number))
    other = PlannerCore.from_state(json.loads(json.dumps(core.to_state())), "routes", Objective.PIPELINED)
    assert other.state_hash == core.state_hash
    for task_id, known in core.tasks.items():
        assert other.tasks[task_id].placed == known.placed
    assert any(known.placed is not None and known.placed.placement.routes for known in core.tasks.values())
    other.validate()


def test_a_users_policy_cannot_mix_routes_for_the_sequential_objective() -> None:
    class Mixing:
        name = "mixing"

        def place(self, algorithm: Algorithm) -> Choice | None:
            return algorithm.with_routes().best()

    for objective, works in ((Objective.SEQUENTIAL, False), (Objective.PIPELINED, True)):
        core = PlannerCore(0, Mixing(), objective)
        for node in (edge(slots=8), cloud(), device()):
            core.handle(node, 0.0)
        changes = core.handle(task(**LARGE), 0.0)
        if works:
            assert only(changes, Placed).placement.routes is not None
        else:
            ended = only(changes, Ended)
            assert (ended.cause, "several routes need objective pipelined" in ended.detail) == ("policy_error", True)


def test_routes_stand_by_for_a_link_that_carries_less_and_need_nothing_more() -> None:
    core = PlannerCore(0, "routes", Objective.PIPELINED)
    world = RandomRegion(core, 7, Traffic(tasks=150, rate=0.5, edges=4, devices=40), validate=True).run()
    mixed = [placed.placement for placed in world.placed.values() if placed.placement.routes is not None]
    standing = [where for where in mixed if any(route.share == 0 for route in where.routes or ())]
    assert len(standing) > 10
    for where in standing:
        used = [route for route in where.routes or () if route.share]
        assert where.uses_device == any(route.cut1 for route in used)
        assert where.uses_slot == any(route.cut1 != route.cut2 for route in used)
        cuts = [(route.cut1, route.cut2) for route in where.routes or ()]
        assert len(set(cuts)) == len(cuts)
