"""The linear programming bound: never above a policy, tight where the optimum is known, certified for any prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bus.errors import ConfigError
from bus.values import Objective
from loadgen.bounds.edge_case import LINK2, SLOT, EdgeCase, FluidTask, edge_cases
from loadgen.bounds.fluid_bound import edge_bound, intervals
from loadgen.bounds.pricing import FluidPricing
from loadgen.experiments.runs import Cell, run_cell
from loadgen.sim.scenario import Scenario
from tests.unit.loadgen.machines import machines

ROUTED = ("routes", "elastic")
POLICIES = (*ROUTED, "device-only", "edge-only", "cloud-only", "no-delay", "deepar")
Cases = Sequence[tuple[Scenario, int]]


def task(*routes: Sequence[float], samples: int = 100, arrival_s: float = 0.0) -> FluidTask:
    """Routes as (device, link 1, edge, link 2, cloud, results); the first is the device alone."""
    times = np.array([[*route, *[0.0] * (7 - len(route))] for route in routes])
    return FluidTask("task", arrival_s, samples, times, (10_000_000, 10_000_000))


def edge(*tasks: FluidTask, slots: int = 1, link2_bps: int = 10**9) -> EdgeCase:
    return EdgeCase("edge", slots, 10**10, link2_bps, tasks)


DEVICE, ON_EDGE, IN_CLOUD = (1000.0,), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0)


def random_cases(count: int) -> Cases:
    """Small regions with scarce slots and links."""
    numbers = np.random.default_rng(16)
    cases = []
    for seed in range(count):
        link2_bps = float(numbers.choice([15e6, 40e6, 1e9]))
        scenario = Scenario(
            devices=int(numbers.integers(2, 7)),
            edges=int(numbers.integers(1, 3)),
            within_s=float(numbers.choice([1.0, 10.0, 60.0])),
            slots=(1, int(numbers.integers(1, 4))),
            samples=(1, int(numbers.choice([1, 20, 300]))),
            edge_link1_bps=(50e6, 500e6),
            edge_link2_bps=(link2_bps, 2 * link2_bps),
            objective=Objective(numbers.choice(list(Objective))),
        )
        cases.append((scenario, seed))
    return cases


def mean_bound_s(scenario: Scenario, seed: int) -> float:
    edges = [edge_bound(case) for case in edge_cases(scenario, seed, machines())]
    return sum(one.delay_s for one in edges) / sum(one.tasks for one in edges)


def above_a_policy(cases: Cases, bound_s: Callable[[Scenario, int], float]) -> list[str]:
    """The policies that are below the bound, with the case."""
    found = []
    for scenario, seed in cases:
        bound = bound_s(scenario, seed)
        for policy in POLICIES:
            if policy in ROUTED and scenario.objective is not Objective.PIPELINED:
                continue
            mean_s = run_cell(Cell(scenario.varied(policy=policy), seed), machines())["mean_delay_s"]
            if bound > mean_s * (1 + 1e-9):
                found.append(f"{policy}, {scenario}, seed {seed}: {mean_s} is below {bound}")
    return found


def test_the_bound_is_never_above_a_policy() -> None:
    assert above_a_policy(random_cases(8), mean_bound_s) == []


def test_a_bound_that_forgets_routes_is_found_out() -> None:
    def without_mixtures(scenario: Scenario, seed: int) -> float:
        edges = []
        for case in edge_cases(scenario, seed, machines()):
            tasks = [replace(one, stations_s=one.stations_s[:1]) for one in case.tasks]
            edges.append(edge_bound(replace(case, tasks=tuple(tasks))))
        return sum(one.delay_s for one in edges) / sum(one.tasks for one in edges)

    assert above_a_policy(random_cases(6), without_mixtures)


def test_a_bound_that_forgets_shared_slots_is_weaker() -> None:
    crowded = edge(*[task(DEVICE, ON_EDGE)] * 4)
    assert edge_bound(replace(crowded, slots=4)).delay_s == pytest.approx(
        4 * 100, rel=0.002
    )  # the device does a thousandth
    assert edge_bound(crowded).delay_s > 2 * 4 * 100


def test_one_task_alone_mixes_its_routes() -> None:
    """Rates of 1 and 1/2 samples a second together: 300 samples take 200 s; the last one cannot be split, but may be."""
    alone = edge(task((1.0,), (0.0, 0.0, 2.0), samples=300))
    assert edge_bound(alone).delay_s == pytest.approx(200.0, rel=1e-6)


def test_what_a_sample_needs_before_and_behind_its_slowest_station_counts() -> None:
    """99 samples wait for the edge while the first is on its way there, and the last one is on its way back."""
    one = edge(task(DEVICE, (0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.25)))
    assert edge_bound(one).delay_s == pytest.approx(100.75 * (1 - 0.001), rel=1e-4)  # the device does a thousandth


@pytest.mark.parametrize(
    ("case", "optimum_s"),
    [
        (edge(task(DEVICE, ON_EDGE), task(DEVICE, ON_EDGE)), 100 + 200),
        (edge(*[task(DEVICE, ON_EDGE, arrival_s=at) for at in (0.0, 50.0, 60.0)]), 100 + 150 + 240),
        (edge(task(DEVICE, ON_EDGE, samples=10), task(DEVICE, ON_EDGE, samples=200)), 10 + 210),
        (edge(*[task(DEVICE, IN_CLOUD)] * 3, link2_bps=10_000_000), 100 + 200 + 300),
        (edge(*[task(DEVICE, ON_EDGE)] * 4, slots=2), 2 * 100 + 2 * 200),
    ],
    ids=["two tasks, one slot", "arrivals", "the short one first", "link 2", "two slots"],
)
def test_tight_where_the_optimum_is_known(case: EdgeCase, optimum_s: float) -> None:
    found = edge_bound(case)
    assert 0.97 * optimum_s <= found.delay_s <= optimum_s * (1 + 1e-9)


def test_the_bound_follows_the_unit_of_time() -> None:
    case = edge(*[task((3.0,), ON_EDGE, samples=40, arrival_s=at) for at in (0.0, 5.0, 9.0)])
    slower = tuple(
        replace(one, stations_s=60 * one.stations_s, arrival_s=60 * one.arrival_s, caps_bps=(1, 1))
        for one in case.tasks
    )
    expected = 60 * edge_bound(case).delay_s
    assert edge_bound(replace(case, tasks=slower)).delay_s == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_least_costs_are_certified_for_any_prices(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    others = numbers.uniform(0.0, 2.0, (12, 7)) * (numbers.uniform(size=(12, 7)) < 0.7)
    routes: list[list[float]] = [[4.0], *others.tolist()]
    one = task(*routes, samples=50, arrival_s=3.0)
    times_s = intervals(edge(one, task(DEVICE, arrival_s=9.0)))
    subproblem = FluidPricing(one, (SLOT, LINK2), times_s)
    for _ in range(4):
        prices = numbers.uniform(0.0, 2.0, (2, len(times_s) - 1)) * (numbers.uniform(size=(2, len(times_s) - 1)) < 0.5)
        least = subproblem.least(prices)
        paid_s = least.column.delay_s + float((prices * least.column.busy_s).sum())
        assert least.cost_s == pytest.approx(paid_s, rel=1e-6)
        assert 0.999 * least.cost_s <= least.bound_s <= least.cost_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reachable": 2}, "reach one edge"),
        ({"noise": 0.5}, "noise"),
        ({"codecs": True}, "codecs"),
        ({"deadline_s": 9.0}, "deadline_s"),
    ],
)
def test_scenarios_without_a_bound_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        edge_cases(replace(Scenario(devices=2), **changes), 0, machines())
