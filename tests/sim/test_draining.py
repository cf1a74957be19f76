"""A stopping node announces that it drains: running tasks finish, waiting ones are planned elsewhere, new ones avoid it."""

from __future__ import annotations

import asyncio

import pytest

from bus.messages import NodeJoined, NodeLost, Placed, Retried, Start, TaskState
from bus.values import Role
from deploy.services import wiring
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.runner import ModelledRunner
from tests.decision_story import Story, read_story
from tests.sim.world import World, WorldOptions, profile, task, world

TASKS = 12
SAMPLES = 60


async def _stop(region: World, name: str, *, says_so: bool = True) -> None:
    """As `deepar.stage` does on SIGTERM; without saying so, as it did before it could."""
    if says_so:
        await region.nodes[name].drain()
    await region.works[name].drain()
    (running,) = [one for one in asyncio.all_tasks() if one.get_name() == name]
    running.cancel()
    await asyncio.wait([running])
    await region.nodes[name].leave()


async def _again(region: World, settings: NodeSettings, group: asyncio.TaskGroup) -> None:
    node = Node(region.bus, settings, ModelledRunner([profile(settings.role)]))
    work = wiring.make_work(node, lambda task, sample, outputs: region.shown.append((task.task_id, sample)))
    group.create_task(node.run(work), name=f"{settings.name} again")


async def _play(
    stopped: str, *, policy: str, again: NodeSettings | None = None, says_so: bool = True, at_s: float = 1.0
) -> tuple[World, Story]:
    """Tasks for all devices, and a node that is stopped while some of them run."""
    async with world(WorldOptions(policy=policy)) as region, wiring.embedded() as group:
        playing = asyncio.create_task(
            region.replay([task(n, f"d{n % 3 + 1}", samples=SAMPLES) for n in range(TASKS)], gap_s=0.2)
        )
        await asyncio.sleep(at_s)
        await _stop(region, stopped, says_so=says_so)
        if again is not None:
            await _again(region, again, group)
        outcomes = await playing
        assert {outcome.state for outcome in outcomes.values()} == {TaskState.COMPLETED}
        assert sorted(region.shown) == sorted((f"t{n}", sample) for n in range(TASKS) for sample in range(SAMPLES))
        region.service.core.validate()
        return region, await read_story(region.bus, PlannerCore)


def _after_it_said_so(story: Story, name: str) -> list[object]:
    """Every change from the record on that takes note of it."""
    found: list[object] = []
    for decision in story.decisions:
        for change in decision.changes:
            drains = isinstance(change, NodeJoined) and change.node.node == name and change.node.draining
            if found or drains:
                found.append(change)
    return found


def _runs_on(story: Story, name: str) -> set[str]:
    """Tasks that were started with an edge, before it was lost."""
    placed: dict[str, Placed] = {}
    found: set[str] = set()
    for decision in story.decisions:
        for change in decision.changes:
            if isinstance(change, Placed):
                placed[change.task_id] = change
            elif isinstance(change, Start) and placed[change.task_id].placement.edge == name:
                found.add(change.task_id)
    return found


@pytest.mark.parametrize("at_s", [0.35, 1.0, 1.7])
@pytest.mark.parametrize("policy", ["edge-only", "cloud-only", "deepar"])
def test_an_edge_that_drains_finishes_what_runs_and_gets_nothing_new(policy: str, at_s: float) -> None:
    _, story = run_virtual(_play("e1", policy=policy, at_s=at_s))
    changes = _after_it_said_so(story, "e1")
    assert any(isinstance(change, NodeLost) and change.cause == "left" for change in changes)
    assert not [c for c in changes if isinstance(c, Placed) and c.placement.edge == "e1"]
    assert {c.cause for d in story.decisions for c in d.changes if isinstance(c, Retried)} <= {"draining"}
    if policy == "edge-only" and at_s == 1.0:
        assert _runs_on(story, "e1")
        assert [c for c in changes if isinstance(c, Retried)]  # a task waited there


def test_planted_an_edge_that_does_not_say_so_takes_new_tasks_down_with_it() -> None:
    causes: set[str] = set()
    for at_s in (0.35, 1.0, 1.7):
        _, story = run_virtual(_play("e1", policy="edge-only", says_so=False, at_s=at_s))
        causes |= {c.cause for d in story.decisions for c in d.changes if isinstance(c, Retried)}
    assert "node_lost" in causes


def test_the_last_cloud_drains_and_what_waits_goes_on_with_the_next() -> None:
    again = NodeSettings(name="c2", role=Role.CLOUD)
    _, story = run_virtual(_play("c1", policy="cloud-only", again=again))
    changes = _after_it_said_so(story, "c1")
    before = changes.index(next(c for c in changes if isinstance(c, NodeJoined) and c.node.node == "c2"))
    assert not [c for c in changes[:before] if isinstance(c, Placed)]
    assert {c.cause for c in changes if isinstance(c, Retried)} == {"draining"}


def test_a_device_that_drains_keeps_its_next_tasks_for_its_next_life() -> None:
    again = NodeSettings(name="d1", role=Role.DEVICE)
    _, story = run_virtual(_play("d1", policy="deepar", again=again))
    changes = _after_it_said_so(story, "d1")
    joined = [i for i, c in enumerate(changes) if isinstance(c, NodeJoined) and c.node.node == "d1"]
    assert len(joined) == 2
    assert not [c for c in changes[: joined[1]] if isinstance(c, Placed) and c.device == "d1"]
    assert [c for c in changes[joined[1] :] if isinstance(c, Placed) and c.device == "d1"]
    assert {c.cause for d in story.decisions for c in d.changes if isinstance(c, Retried)} <= {"draining"}


def test_where_no_planner_listens_a_node_that_drains_does_not_wait_for_ever() -> None:
    async def run() -> float:
        async with world() as region:
            (planner,) = [one for one in asyncio.all_tasks() if one.get_name() == "planner"]
            planner.cancel()
            await asyncio.wait([planner])
            began_s = asyncio.get_running_loop().time()
            await _stop(region, "e1")
            return asyncio.get_running_loop().time() - began_s

    assert run_virtual(run()) < 3.0
