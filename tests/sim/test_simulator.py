"""The full simulator against the core-only driver: the same placements, delays within a percent."""

from __future__ import annotations

import pytest

from bus.messages import TaskState
from bus.values import Objective
from loadgen.sim.core_driver import drive
from loadgen.sim.scenario import Scenario
from loadgen.sim.simulator import simulate
from tests.known import known
from tests.unit.loadgen.machines import machines

BUSY = Scenario(devices=24, edges=2, within_s=6, samples=(1, 40), slots=(1, 2))


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", ["deepar", "edge-only", "no-delay"])
def test_life_in_virtual_time_agrees_with_the_driver(policy: str, objective: Objective) -> None:
    scenario = BUSY.varied(policy=policy, objective=objective)
    expected = drive(scenario, 0, machines())
    found = simulate(scenario, 0, machines(), horizon_s=100_000).outcomes
    assert [outcome.task_id for outcome in found] == [outcome.task_id for outcome in expected]
    same = sum(a.placement == b.placement for a, b in zip(expected, found, strict=True))
    assert same >= 0.95 * len(expected)
    assert all(outcome.state is TaskState.COMPLETED for outcome in found)
    found_s, expected_s = ([known(outcome.delay_s) for outcome in outcomes] for outcomes in (found, expected))
    assert sum(found_s) / sum(expected_s) == pytest.approx(1.0, abs=0.01)
    if policy == "edge-only":
        assert any(known(outcome.wait_s) > 0.1 for outcome in found), "nobody waited: the queue was not tested"


def test_the_same_seed_gives_the_same_run_twice() -> None:
    def run() -> tuple[object, object, object, list[tuple[str, str, str, float, float]]]:
        busy: list[tuple[str, str, str, float, float]] = []
        found = simulate(BUSY, 1, machines(), on_busy=lambda *stretch: busy.append(stretch))
        return found.outcomes, found.virtual_s, found.records, busy

    first = run()
    assert first == run()
    assert len(first[3]) > 500


def test_tasks_of_several_routes_take_as_long_as_predicted() -> None:
    scenario = BUSY.varied(policy="routes", objective="pipelined")
    expected = drive(scenario, 0, machines())
    found = simulate(scenario, 0, machines(), horizon_s=100_000).outcomes
    assert all(outcome.state is TaskState.COMPLETED for outcome in found)
    assert sum(len(known(outcome.placement).routes or ()) > 1 for outcome in found) > len(found) // 2
    same = sum(a.placement == b.placement for a, b in zip(expected, found, strict=True))
    assert same >= 0.95 * len(expected)
    found_s, expected_s = (sum(known(outcome.delay_s) for outcome in outcomes) for outcomes in (found, expected))
    assert found_s == pytest.approx(expected_s, rel=0.02)


def test_rerouted_tasks_take_as_long_as_predicted() -> None:
    """Samples under way begin again: where they waited for a slow station, the task does not wait for them."""
    scenario = BUSY.varied(policy="elastic", objective="pipelined", samples=(15, 60), within_s=9)
    expected = drive(scenario, 0, machines())
    found = simulate(scenario, 0, machines(), horizon_s=100_000).outcomes
    assert all(outcome.state is TaskState.COMPLETED for outcome in found)
    assert [outcome.attempt for outcome in found] == [1] * len(found)
    found_s, expected_s = (sum(known(outcome.delay_s) for outcome in outcomes) for outcomes in (found, expected))
    assert found_s == pytest.approx(expected_s, rel=0.04)
