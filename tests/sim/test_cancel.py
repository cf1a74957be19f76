"""Tasks cancelled over the bus, by the real planner and real stages, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from bus import messages, topics
from bus.errors import BusUnavailableError
from bus.messages import Ended, Start, TaskState
from deploy.services.cancellation import End, cancel
from loadgen.sim.virtual_loop import run_virtual
from tests.sim.planners import Town, town
from tests.sim.world import WorldOptions, task, world

HORIZON_S = 3600.0


async def _started(place: Town, task_id: str) -> None:
    """Return once a task runs."""
    async with asyncio.timeout(60.0):
        while not any(
            isinstance(change, Start) and change.task_id == task_id
            for decision in (await place.story()).decisions
            for change in decision.changes
        ):
            await asyncio.sleep(0.1)


def _ends(story_decisions: list[messages.Decision]) -> list[tuple[str, TaskState, str]]:
    return [
        (change.task_id, change.state, change.cause)
        for decision in story_decisions
        for change in decision.changes
        if isinstance(change, Ended)
    ]


def test_tasks_that_wait_are_scheduled_or_run_end_once_and_give_back_what_they_held() -> None:
    async def run() -> None:
        async with town(played=False) as place:
            process = place.start()
            tasks = await place.submit(range(6))  # two edges with a slot each: some run, others are scheduled
            await place.tell(topics.TASKS, task(9, "d9"), "t9")  # its device never comes
            await _started(place, "t0")
            core = process.service.core
            while len(core.tasks) < 7:
                await asyncio.sleep(0.1)
            states = {one.state for one in core.tasks.values()}
            assert states == {TaskState.RUNNING, TaskState.SCHEDULED, TaskState.WAITING}
            wanted = [one.task_id for one in tasks] + ["t9"]
            ends = await cancel(place.bus, 0, wanted, timeout_s=30.0)
            assert [end.task_id for end in ends] == wanted
            assert {(end.state, end.cause, end.before) for end in ends} == {(TaskState.FAILED, "cancelled", False)}
            core.validate()
            assert not core.tasks
            assert not core.ledger.reservations
            again = await cancel(place.bus, 0, wanted, timeout_s=30.0)
            assert all(end.before and end.cancelled for end in again)
            assert sorted(_ends((await place.story()).decisions)) == sorted(
                (task_id, TaskState.FAILED, "cancelled") for task_id in wanted
            )

    run_virtual(run(), horizon_s=HORIZON_S)


def test_an_unknown_task_is_told_and_the_others_are_cancelled() -> None:
    async def run() -> None:
        async with town(played=False) as place:
            place.start()
            await place.submit([0])
            await _started(place, "t0")
            known, unknown = await cancel(place.bus, 0, ["t0", "t77"], timeout_s=30.0)
            assert known.cancelled
            assert unknown == End(task_id="t77", state=None)
            assert (await place.bus.end_offsets(topics.TASKS))[0] == 2  # nothing was asked of the stranger

    run_virtual(run(), horizon_s=HORIZON_S)


def test_what_completed_first_stays_completed() -> None:
    async def run() -> None:
        async with town() as place:  # its devices finish what is started
            place.start()
            await place.submit(range(3))
            await place.until_ended(3)
            ends = await cancel(place.bus, 0, ["t0", "t1"], timeout_s=30.0)
            assert {(end.state, end.before, end.cancelled) for end in ends} == {(TaskState.COMPLETED, True, False)}

    run_virtual(run(), horizon_s=HORIZON_S)


def test_a_race_with_the_completion_has_one_end() -> None:
    """Asked at any instant of a task's life, the answer is the end that everybody reads."""

    async def run(asked_after_s: float) -> bool:
        async with town() as place:
            place.start()
            await place.submit([0], gap_s=asked_after_s)
            (end,) = await cancel(place.bus, 0, ["t0"], timeout_s=30.0)
            await asyncio.sleep(5.0)
            assert _ends((await place.story()).decisions) == [("t0", end.state, "cancelled" if end.cancelled else "")]
            return end.cancelled

    seen = [run_virtual(run(0.02 * step), horizon_s=HORIZON_S) for step in range(12)]
    assert seen[0]
    assert not seen[-1]


def test_the_request_holds_over_the_death_of_the_planner() -> None:
    async def run() -> None:
        async with town(played=False) as place:
            first = place.start("p1")
            await place.submit(range(2))
            await _started(place, "t0")
            await first.kill()
            with pytest.raises(BusUnavailableError, match="t0, t1 within 3 s"):
                await cancel(place.bus, 0, ["t0", "t1"], timeout_s=3.0)
            place.start("p2")
            ends = await cancel(place.bus, 0, ["t0", "t1"], timeout_s=60.0)
            assert all(end.cancelled for end in ends)
            assert len(_ends((await place.story()).decisions)) == 2

    run_virtual(run(), horizon_s=HORIZON_S)


def test_a_task_that_the_planner_has_not_read_yet_is_no_stranger() -> None:
    async def run() -> None:
        async with town(played=False) as place:
            await place.submit([0])
            starting = asyncio.get_running_loop().call_later(2.0, place.start)
            (end,) = await cancel(place.bus, 0, ["t0"], timeout_s=60.0)
            assert end.cancelled
            assert starting.when() <= asyncio.get_running_loop().time()

    run_virtual(run(), horizon_s=HORIZON_S)


def test_ends_are_known_behind_a_snapshot() -> None:
    async def run() -> None:
        async with town() as place:
            place.start(snapshot_every=3)
            await place.submit(range(12))
            await place.until_ended(12)
            await asyncio.sleep(5.0)
            ends = await cancel(place.bus, 0, ["t0", "t11"], timeout_s=30.0)
            assert [(end.state, end.before) for end in ends] == [(TaskState.COMPLETED, True)] * 2

    run_virtual(run(), horizon_s=HORIZON_S)


def test_stages_drop_the_work_of_a_cancelled_task() -> None:
    """Its device and edge stop; the next task gets what it held, and completes."""

    async def run() -> None:
        async with world(WorldOptions(devices=("d1",), edges=("e1",), policy="edge-only")) as region:
            long = task(1, samples=10_000)
            await region.bus.send(topics.TASKS, messages.encode(long), key="t1", partition=0)
            await asyncio.sleep(5.0)
            assert region.shown
            (end,) = await cancel(region.bus, 0, ["t1"], timeout_s=30.0)
            assert end.cancelled
            await asyncio.sleep(1.0)
            shown = len(region.shown)
            outcomes = await region.replay([task(2)])
            assert outcomes["t2"].state is TaskState.COMPLETED
            assert [one for one in region.shown[shown:] if one[0] == "t1"] == []
            assert not region.service.core.tasks

    run_virtual(run(), horizon_s=HORIZON_S)
