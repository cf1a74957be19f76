"""The simulated world: noise of tasks, drift of nodes and links, and the times that follow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bus.messages import Placed
from bus.values import Objective, Parts
from loadgen.sim.core_driver import Drive, core_for
from loadgen.sim.environment import STEP_S, Drift, Environment, LogNormal, Ran, link1, link2
from loadgen.sim.scenario import Scenario
from tests.unit.loadgen.machines import machines

SCENARIO = Scenario(devices=20, edges=2, within_s=10)


def placements(scenario: Scenario) -> list[tuple[Ran, Placed]]:
    """What the tasks of a scenario take in a world without noise and drift, with their placements."""
    exact, found = Environment(machines()), []

    def noted(task, placed, now_s):  # type: ignore[no-untyped-def]
        found.append((exact(task, placed, now_s), placed))
        return found[-1][0]

    run = Drive(core_for(scenario), lambda outcome: None, noted)
    run.announce(scenario.nodes(1, machines().profiles))
    run.run(scenario.schedule(1).entries)
    return found


@pytest.mark.parametrize("objective", list(Objective))
def test_without_noise_and_drift_tasks_take_what_is_predicted(objective: Objective) -> None:
    found = placements(SCENARIO.varied(objective=objective))
    assert len({placed.placement.kind for _, placed in found}) > 1
    for ran, placed in found:
        assert ran.delay_s == pytest.approx(placed.delay_s, rel=1e-12)
        assert ran.parts.model_dump() == pytest.approx(placed.parts.model_dump(), rel=1e-12)


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
