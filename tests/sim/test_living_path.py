"""A real task, really planned and streamed through real shells, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from bus import topics
from bus.messages import TaskState
from bus.values import Kind, Objective, Role
from deploy.services import wiring
from loadgen.replay.outcome import Outcome
from loadgen.sim.virtual_loop import run_virtual
from stages.node import Node
from stages.runner import ModelledRunner
from tests.known import known
from tests.sim.world import World, WorldOptions, profile, task, world


async def _run(policy: str = "deepar", objective: Objective = Objective.PIPELINED) -> tuple[World, dict[str, Outcome]]:
    async with world(WorldOptions(policy=policy, objective=objective)) as region:
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


def test_two_processes_of_one_name_do_not_flood_the_decisions_and_are_seen() -> None:
    """Each is declared lost when the other announces itself, and comes back: with a pause."""

    async def run() -> tuple[int, float, set[TaskState | None]]:
        async with world(WorldOptions(edges=("e1",), devices=("d1",))) as region:
            first = region.nodes["e1"]
            twin = Node(region.bus, first.settings, ModelledRunner([profile(Role.EDGE)]))
            playing = asyncio.create_task(twin.run(wiring.make_work(twin)))
            await asyncio.sleep(60.0)
            seen = first.status.counters["declared_lost"]
            assert {first.status.ready, twin.status.ready} == {True, False}  # one of them has the partition
            playing.cancel()
            await asyncio.wait([playing])
            await asyncio.sleep(first.settings.lease_s)
            outcomes = await region.replay([task(n) for n in range(4)])
            said = (await region.bus.end_offsets(topics.NODES))[0]
            return said, seen, {outcome.state for outcome in outcomes.values()}

    said, seen, states = run_virtual(run())
    assert 3 < seen < 35  # the alarm is due above three; a pause is a fifth of a lease
    assert said < 80
    assert states == {TaskState.COMPLETED}
