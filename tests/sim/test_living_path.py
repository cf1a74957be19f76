"""A real task, really planned and streamed through real shells, in virtual time."""

from __future__ import annotations

import pytest

from bus.messages import TaskState
from bus.values import Kind, Objective
from loadgen.outcome import Outcome
from loadgen.virtual_loop import run_virtual
from tests.known import known
from tests.sim.world import World, task, world


async def _run(policy: str = "deepar", objective: Objective = Objective.PIPELINED) -> tuple[World, dict[str, Outcome]]:
    async with world(policy=policy, objective=objective) as region:
        outcomes = await region.replay([task(n, f"d{n % 3 + 1}") for n in range(12)])
        return region, outcomes


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("policy", ["deepar", "no-delay", "device-only", "edge-only", "cloud-only", "neurosurgeon"])
def test_every_task_completes_and_each_result_shows_once(policy: str, objective: Objective) -> None:
    region, outcomes = run_virtual(_run(policy, objective))
    assert {outcome.state for outcome in outcomes.values()} == {TaskState.COMPLETED}
    assert sorted(region.shown) == sorted((f"t{n}", sample) for n in range(12) for sample in range(10))
    region.service.core.validate()
    assert region.service.core.live_tasks == 0


def test_the_same_seed_gives_the_same_trace_twice() -> None:
    first, _ = run_virtual(_run())
    second, _ = run_virtual(_run())
    assert first.trace == second.trace
    assert first.shown == second.shown
    assert len(first.trace) > 100


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("device-only", {Kind.DEVICE}),
        ("edge-only", {Kind.EDGE}),
        ("cloud-only", {Kind.CLOUD}),
    ],
)
def test_a_policy_uses_only_its_places(policy: str, kinds: set[Kind]) -> None:
    _, outcomes = run_virtual(_run(policy))
    assert {outcome.kind for outcome in outcomes.values()} == kinds


@pytest.mark.parametrize("objective", list(Objective))
def test_measured_delays_agree_with_the_plan(objective: Objective) -> None:
    """Modelled machines in virtual time do what the cost model says, up to frame heads and unfilled pipelines."""
    _, outcomes = run_virtual(_run(objective=objective))
    for outcome in outcomes.values():
        assert outcome.device_delay_s == pytest.approx(outcome.predicted_delay_s, rel=0.10), outcome
        measured, predicted = known(outcome.measured), known(outcome.predicted)
        assert measured.device_s == pytest.approx(predicted.device_s, rel=0.02)
        assert measured.edge_s == pytest.approx(predicted.edge_s, rel=0.02)
        assert measured.cloud_s == pytest.approx(predicted.cloud_s, rel=0.02)
        assert measured.link1_s == pytest.approx(predicted.link1_s, rel=0.10, abs=1e-3)
        assert measured.link2_s == pytest.approx(predicted.link2_s, rel=0.10, abs=1e-3)
