"""The simulated world: noise of tasks, drift of nodes and links, and the times that follow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bus.messages import Placed, SeedInput, TaskSubmitted
from bus.values import Objective, Parts
from loadgen.sim.core_driver import Drive, core_for
from loadgen.sim.environment import STEP_S, Drift, Environment, LogNormal, Ran, link1, link2
from loadgen.sim.platforms import Platforms, platforms
from loadgen.sim.scenario import Scenario
from tests.unit.loadgen.machines import machines

INPUT_BYTES = 200_000
SCENARIO = Scenario(devices=20, edges=2, within_s=10)


def placements(scenario: Scenario, platforms: Platforms | None = None) -> list[tuple[Ran, Placed]]:
    """What the tasks of a scenario take in a world without noise and drift, with their placements."""
    platforms = platforms or machines()
    exact, found = Environment(platforms), []

    def noted(task, placed, now_s):  # type: ignore[no-untyped-def]
        found.append((exact(task, placed, now_s), placed))
        return found[-1][0]

    run = Drive(core_for(scenario), lambda outcome: None, noted)
    run.announce(scenario.nodes(1, platforms.profiles))
    run.run(scenario.schedule(1).entries)
    return found


@pytest.mark.parametrize("objective", list(Objective))
def test_without_noise_and_drift_tasks_take_what_is_predicted(objective: Objective) -> None:
    found = placements(SCENARIO.varied(objective=objective))
    assert len({placed.placement.kind for _, placed in found}) > 1
    for ran, placed in found:
        assert ran.delay_s == pytest.approx(placed.delay_s, rel=1e-12)
        assert ran.parts.model_dump() == pytest.approx(placed.parts.model_dump(), rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "policy"), [("sequential", "deepar"), ("pipelined", "deepar"), ("pipelined", "routes")]
)
def test_tasks_with_codecs_take_what_is_predicted_and_less_than_without(objective: str, policy: str) -> None:
    scenario = SCENARIO.varied(objective=objective, policy=policy, codecs=True, min_agreement=0.995, tasks=60)
    found = placements(scenario, platforms("paper", codecs=True))
    coded = [(ran, placed) for ran, placed in found if placed.placement.routes is not None]
    assert len(coded) > 30
    for ran, placed in coded:
        assert ran.delay_s == pytest.approx(placed.delay_s, rel=1e-6)
        assert ran.parts.model_dump() == pytest.approx(placed.parts.model_dump(), rel=1e-6)
    raw = placements(scenario, platforms("paper"))
    assert sum(ran.delay_s for ran, _ in found) < 0.8 * sum(ran.delay_s for ran, _ in raw)


def test_tasks_of_several_routes_take_what_is_predicted_too() -> None:
    found = placements(SCENARIO.varied(objective="pipelined", policy="routes", tasks=100))
    mixed = [(ran, placed) for ran, placed in found if placed.placement.routes is not None]
    assert len(mixed) > 10
    for ran, placed in mixed:
        assert ran.delay_s == pytest.approx(placed.delay_s, rel=1e-6)
        assert ran.parts.model_dump() == pytest.approx(placed.parts.model_dump(), rel=1e-6)
        assert placed.placement.routes is not None
        assert ran.route_samples is not None
        assert sum(ran.route_samples) == placed.samples
        for taken, route in zip(ran.route_samples, placed.placement.routes, strict=True):
            assert abs(taken - route.share * placed.samples) < 1


def test_a_device_shares_its_samples_out_again_where_its_nodes_are_slower_than_predicted() -> None:
    """So a mix never takes longer than with the planned shares, and mostly less."""
    slow, gained = {"edge-0000": 0.4, "edge-0001": 2.5}, 0
    world = Environment(machines(), speed=lambda name, at_s: slow.get(name, 1.0))
    for _, placed in placements(
        SCENARIO.varied(objective="pipelined", policy="routes", tasks=100, input_bytes=INPUT_BYTES)
    ):
        routes, edge = placed.placement.routes, placed.placement.edge
        if routes is None or edge is None or placed.samples < 50:
            continue
        stations = [[s / slow[edge] if k == 2 else s for k, s in enumerate(route.stations_s)] for route in routes]
        kept_s = max(sum(one) for one, route in zip(stations, routes, strict=True) if not route.device_only) + (
            placed.samples - 1
        ) * max(sum(route.share * one[k] for one, route in zip(stations, routes, strict=True)) for k in range(7))
        task = TaskSubmitted(
            task_id=placed.task_id, device=placed.device, model=placed.model, samples=placed.samples,
            input=SeedInput(seed=1), input_bytes=INPUT_BYTES,
        )  # fmt: skip
        ran = world(task, placed, 0.0)
        assert ran.delay_s <= kept_s * (1 + 1e-2)
        gained += ran.delay_s < 0.98 * kept_s
    assert gained > 5


def test_a_slow_edge_and_slow_links_lengthen_their_own_parts() -> None:
    slow = {"edge-0000": 0.5, "edge-0001": 0.5, link2("edge-0000"): 0.25, link2("edge-0001"): 0.25}
    seen: set[str] = set()

    def compared(task, placed, now_s):  # type: ignore[no-untyped-def]
        place = placed.placement
        speeds = {**slow, link1(task.device, place.edge or ""): 2.0}  # a faster link carries no more than its grant
        ran = Environment(machines(), speed=lambda name, at_s: speeds.get(name, 1.0))(task, placed, now_s)
        assert ran.parts.device_s == pytest.approx(placed.parts.device_s)
        assert ran.parts.link1_s == pytest.approx(placed.parts.link1_s)
        assert ran.parts.edge_s == pytest.approx(2 * placed.parts.edge_s)
        assert ran.parts.link2_s == pytest.approx(4 * placed.parts.link2_s, rel=1e-6)
        assert ran.parts.cloud_s == pytest.approx(placed.parts.cloud_s)
        seen.update(name for name, value in ran.parts.model_dump().items() if value)
        return Ran(Parts(), ran.delay_s)

    for policy in ("deepar", "cloud-only"):
        run = Drive(core_for(SCENARIO.varied(policy=policy)), lambda outcome: None, compared)
        run.announce(SCENARIO.nodes(1, machines().profiles))
        run.run(SCENARIO.schedule(1).entries)
    assert seen >= {"link1_s", "edge_s", "link2_s", "cloud_s"}


def test_noise_keeps_the_mean() -> None:
    noise = LogNormal(0.3, 7)
    factors = [noise(f"task-{number}") for number in range(20_000)]
    assert np.mean(factors) == pytest.approx(1.0, abs=0.01)
    assert np.std(np.log(factors)) == pytest.approx(0.3, rel=0.02)
    assert LogNormal(0.3, 7)("task-3") == factors[3]
    assert LogNormal(0.3, 8)("task-3") != factors[3]


def test_drift_wanders_slowly_around_the_declared_speed() -> None:
    drift = Drift(0.5, 3)
    walk = np.log([drift("edge-0000", STEP_S * step) for step in range(4_000)])
    assert np.std(walk) == pytest.approx(0.5, rel=0.2)
    assert np.mean(walk) == pytest.approx(0.0, abs=0.15)
    assert np.corrcoef(walk[:-1], walk[1:])[0, 1] > 0.8
    assert drift("edge-0000", 0.0) == drift("edge-0000", STEP_S - 1)
    assert drift("edge-0001", 0.0) != drift("edge-0000", 0.0)
    assert Drift(0.5, 3)("edge-0000", STEP_S * 70) == pytest.approx(math.exp(walk[70]))
