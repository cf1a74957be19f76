"""The planner's service killed anywhere, frozen and among faults, in virtual time (G1, G3)."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from bus import messages, topics
from bus.errors import InvariantError
from bus.memory.bus import MemoryBroker
from bus.memory.faults import Faults
from bus.messages import Decision, Ended, NodeHeartbeat, NodeLost, TaskState
from loadgen.sim.virtual_loop import run_virtual
from planner.service.leader_term import CHECKPOINT_EVERY
from planner.service.service import Standing
from tests.sim.planners import Alteration, Process, Story, Town, town

TASKS = 8
IDS = {f"t{number}" for number in range(TASKS)}
HORIZON_S = 3600.0


async def _mortal(place: Town, fuses: list[int], **more: Any) -> list[Process]:
    """Planners one after the other, each killed at its step; the last one lives."""
    lived = []
    for number, fuse in enumerate(fuses):
        process = place.start(f"p{number}", fuse=fuse, **more)
        lived.append(process)
        died = asyncio.create_task(process.bus.died.wait())
        await asyncio.wait({died, process.task}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        await process.stop()
    lived.append(place.start("last", **more))
    return lived


async def _killed(
    fuses: list[int], timeout_s: float = 600.0, alter: Alteration | None = None, **more: Any
) -> tuple[Story, Process, int]:
    async with town() as place:
        place.alter = alter
        planners = asyncio.create_task(_mortal(place, fuses, **more))
        await place.submit(range(TASKS))
        lived = await planners
        await place.until_ended(TASKS, timeout_s)
        last = lived[-1]
        async with asyncio.timeout(60.0):
            while last.service.standing is not Standing.LEADING:
                await asyncio.sleep(0.1)
        story = await place.story()
        assert last.service.core.state_hash == story.core.state_hash
        last.service.core.validate()
        return story, last, lived[0].bus.steps


def _steps_of_a_life(**more: Any) -> int:
    """How many steps a planner takes for the whole of `TASKS` tasks."""

    async def run() -> int:
        async with town() as place:
            process = place.start(**more)
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            return process.bus.steps

    return run_virtual(run(), horizon_s=HORIZON_S)


@pytest.mark.parametrize("more", [{}, {"record_bytes": 600, "part_bytes": 700}], ids=["whole", "split"])
def test_killed_at_any_step_it_forgets_nothing_and_decides_nothing_twice(more: dict[str, Any]) -> None:
    more = more | {"snapshot_every": 5}
    steps = _steps_of_a_life(**more)
    assert steps > 80
    tried = 0
    for fuse in range(1, steps, 2 if steps < 250 else steps // 100):
        story, last, _ = run_virtual(_killed([fuse], **more), horizon_s=HORIZON_S)
        story.check(IDS)
        assert last.service.counters.decisions <= len(story.decisions)
        tried += len(story.opened)
    assert tried > 60


@pytest.mark.parametrize("seed", range(8))
def test_killed_again_and_again(seed: int) -> None:
    random = Random(seed)
    fuses = [random.randrange(1, 100) for _ in range(12)]
    story, _, _ = run_virtual(_killed(fuses, snapshot_every=random.choice((1, 3, 1000))), horizon_s=HORIZON_S)
    story.check(IDS)


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_among_real_stages(seed: int) -> None:
    random = Random(seed)

    async def run() -> tuple[Story, Town]:
        async with town(real=True) as place:
            fuses = [random.randrange(1, 90) for _ in range(8)]
            planners = asyncio.create_task(_mortal(place, fuses, snapshot_every=6))
            await place.submit(range(TASKS))
            await planners
            return await place.until_ended(TASKS), place

    story, place = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert {state for states in story.ends.values() for state in states} == {TaskState.COMPLETED}
    assert sorted(place.shown) == sorted((task_id, sample) for task_id in IDS for sample in range(10))


@pytest.mark.parametrize("seed", range(4))
def test_a_bus_that_loses_acknowledgements_and_records_and_doubles_them(seed: int) -> None:
    async def run() -> tuple[Story, str]:
        faults = Faults(random=Random(seed), lost_ack=0.05, lost_post=0.05, duplicate=0.05, late=0.2, late_s=0.3)
        broker = MemoryBroker()
        async with town(broker) as place:
            place.start("a", snapshot_every=4)
            broker.faults = faults
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            broker.faults = None
            await asyncio.sleep(5.0)
            return await place.story(), place.processes[0].service.core.state_hash

    story, ended_with = run_virtual(run(), horizon_s=HORIZON_S)
    story.check(IDS)
    assert story.core.state_hash == ended_with
    assert len(story.opened) > 1  # it had to doubt itself


def test_a_planner_that_was_frozen_declares_nobody_lost_whose_heartbeats_lie_unread() -> None:
    async def run(beat: bool) -> list[str]:
        async with town() as place:
            await place.announce(lease_s=4.0)
            process = place.start("only")
            await asyncio.sleep(1.0)
            process.bus.freeze()

            async def hearts() -> None:
                while True:
                    for node in ("c1", "e1", "e2", "d1", "d2", "d3"):
                        await place.tell(topics.EVENTS, NodeHeartbeat(node=node, incarnation=f"{node}-1"), node)
                    await asyncio.sleep(1.0)

            beating = asyncio.create_task(hearts()) if beat else None
            await asyncio.sleep(30.0)
            process.bus.thaw()
            await asyncio.sleep(8.0)
            if beating is not None:
                beating.cancel()
            lost = [c.node for d in (await place.story()).decisions for c in d.changes if isinstance(c, NodeLost)]
            return sorted(lost)

    assert run_virtual(run(True), horizon_s=HORIZON_S) == []
    assert run_virtual(run(False), horizon_s=HORIZON_S) == ["c1", "d1", "d2", "d3", "e1", "e2"]


def test_inputs_that_change_nothing_are_recorded_as_read_now_and_then() -> None:
    async def run() -> Story:
        async with town() as place:
            place.start("only")
            await asyncio.sleep(1.0)
            for _ in range(2 * CHECKPOINT_EVERY + 100):
                await place.tell(topics.EVENTS, NodeHeartbeat(node="e1", incarnation="e1-1"), "e1")
            await asyncio.sleep(1.0)
            return await place.story()

    story = run_virtual(run(), horizon_s=HORIZON_S)
    empty = [decision for decision in story.decisions if not decision.changes]
    assert len(empty) == 2
    assert story.decisions[-1].inputs[topics.EVENTS] >= 2 * CHECKPOINT_EVERY


def _inputs_too_early(topic: str, value: bytes | None, key: str | None) -> tuple[bytes | None, str | None]:
    """Makes each decision that ends a task record one more task as read than the planner has read."""
    if topic == topics.DECISIONS:
        decision = messages.decode(topic, value)
        if isinstance(decision, Decision) and any(isinstance(change, Ended) for change in decision.changes):
            inputs = decision.inputs | {topics.TASKS: decision.inputs[topics.TASKS] + 1}
            value = messages.encode(decision.model_copy(update={"inputs": inputs}))
    return value, key


def test_planted_a_planner_that_commits_before_it_decides_is_found_out() -> None:
    found = 0
    for fuse in range(60, 120, 10):
        try:
            story, _, _ = run_virtual(_killed([fuse], 20.0, _inputs_too_early), horizon_s=HORIZON_S)
            story.check(IDS)
        except (AssertionError, InvariantError, TimeoutError):
            found += 1
    assert found
