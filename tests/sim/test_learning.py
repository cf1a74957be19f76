"""Learning in a whole region in virtual time: real stages teach, and a restart or takeover in the middle changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import median

import pytest

from bus import topics
from bus.memory.bus import MemoryBroker
from bus.messages import Ended, Learned, Placed, TaskCompleted, TaskFailed
from bus.values import Parts
from loadgen.chaos.simulated.oracle import Oracle, Violation
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from planner.service.service import Standing
from tests.sim.canaries import FENCED_TEACHER
from tests.sim.planners import Process, Story, Town, town

HORIZON_S = 3600.0
LATENCY_S = 0.02  # of the embedded bus; no profile knows it


def learning_core() -> PlannerCore:
    return PlannerCore(0, options=CoreOptions(learning=True))


async def until_leading(process: Process) -> None:
    while process.service.standing is not Standing.LEADING:
        await asyncio.sleep(0.01)


async def one_by_one(place: Town, numbers: range) -> Story:
    """Submit tasks one after another, each when the one before has ended."""
    for number in numbers:
        await place.submit([number])
        story = await place.until_ended(number + 1)
    return story


def taught(story: Story) -> list[int]:
    """The decisions that taught something about a task."""
    return [
        decision.seq
        for decision in story.decisions
        for change in decision.changes
        if isinstance(change, Learned) and change.task_id is not None
    ]


def completed_late(make_core: Callable[[], PlannerCore]) -> tuple[list[Violation], Story]:
    """An attempt fails for its edge, the next one starts, and then the device reports that the first has completed."""

    async def run() -> tuple[list[Violation], Story]:
        async with town(played=False) as place:
            place.make_core = make_core
            place.start("planner")
            await place.submit([0])
            while (placed := (await place.story()).core.tasks["t0"].placed) is None:
                await asyncio.sleep(0.1)
            assert placed.placement.edge is not None
            failed = TaskFailed(task_id="t0", attempt=1, node=placed.placement.edge, cause="bad_frame", retryable=True)
            done = TaskCompleted(task_id="t0", attempt=1, node="d1", measured=Parts(edge_s=9.0), delay_s=9.0)
            for message in (failed, done):
                await place.tell(topics.EVENTS, message, "t0")
            story = await place.until_ended(1)
            oracle = Oracle(learning_core())
            reader = await place.bus.reader([(topics.DECISIONS, 0)], start="start")
            oracle.read(await reader.fetch())
            return oracle.violations, story

    return run_virtual(run(), horizon_s=HORIZON_S)


def test_a_completion_of_a_fenced_attempt_teaches_nothing() -> None:
    violations, story = completed_late(learning_core)
    assert violations == []
    assert story.started["t0", 2] == 1
    assert taught(story) == []


def test_the_oracle_catches_a_planner_that_learns_from_a_fenced_attempt() -> None:
    make = FENCED_TEACHER.programs.core
    violations, story = completed_late(lambda: make(0, options=CoreOptions(learning=True)))
    assert [violation.guarantee for violation in violations] == ["G13"]
    assert len(taught(story)) == 1


@pytest.mark.parametrize("end", ["killed", "stopped", "frozen"])
def test_another_planner_goes_on_with_what_the_first_has_learned(end: str) -> None:
    async def run() -> tuple[Story, Process, int]:
        async with town(MemoryBroker(latency_s=LATENCY_S), real=True) as place:
            place.make_core = learning_core
            first = place.start("first", snapshot_every=4)
            await one_by_one(place, range(6))
            before = (await place.story()).decisions[-1].seq
            if end == "killed":
                await first.kill()
            elif end == "stopped":
                await first.stop()
            else:
                first.bus.freeze()
            second = place.start("second", snapshot_every=4)
            await until_leading(second)
            assert second.service.context.snapshot_seq > 0
            story = await one_by_one(place, range(6, 12))
            assert second.service.context.core.state_hash == story.core.state_hash
            assert second.service.context.core.to_state()["estimates"] == story.core.to_state()["estimates"]
            return story, second, before

    story, _, before = run_virtual(run(), horizon_s=HORIZON_S)  # each record's hash was compared with its replay
    story.check({f"t{number}" for number in range(12)})
    seqs = taught(story)
    assert min(seqs) < before < max(seqs)
    assert len(seqs) == 12


def test_predictions_of_real_stages_come_true() -> None:
    async def run() -> Story:
        async with town(MemoryBroker(latency_s=LATENCY_S), real=True) as place:
            place.make_core = learning_core
            place.start("planner")
            return await one_by_one(place, range(30))

    story = run_virtual(run(), horizon_s=HORIZON_S)
    placed: dict[str, Placed] = {}
    errors: list[float] = []
    for decision in story.decisions:
        for change in decision.changes:
            if isinstance(change, Placed):
                placed[change.task_id] = change
            elif isinstance(change, Ended) and change.delay_s is not None:
                errors.append(abs(change.delay_s / placed[change.task_id].delay_s - 1.0))
    assert len(errors) == 30
    assert median(errors[:3]) > 0.3
    assert median(errors[-15:]) <= 0.15
