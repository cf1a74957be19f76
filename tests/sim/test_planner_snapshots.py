"""A planner that begins at a snapshot, and snapshots that are not believed, in virtual time (G1)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bus import messages, topics
from bus.errors import InvariantError
from bus.messages import Snapshot
from loadgen.sim.virtual_loop import run_virtual
from planner.service.service import ServiceComponents, Standing
from tests.sim.canaries import unconfirmed_reader
from tests.sim.planners import CountingCore, Process, Story, Town, town

TASKS = 8
IDS = {f"t{number}" for number in range(TASKS)}
HORIZON_S = 3600.0


async def _with_snapshot(place: Town, count: int = TASKS) -> Story:
    first = place.start("first", snapshot_every=4)
    await place.submit(range(count))
    story = await place.until_ended(count)
    await asyncio.sleep(1.0)
    await first.kill()
    return story


def test_a_restart_reads_only_what_stands_behind_the_last_snapshot() -> None:
    async def run() -> tuple[Story, Process, list[int]]:
        async with town() as place:
            before = await _with_snapshot(place)
            read: list[int] = []
            place.make_core = lambda: CountingCore(read, 0)
            second = place.start("second")
            while second.service.standing is not Standing.LEADING:
                await asyncio.sleep(0.1)
            return before, second, read

    story, second, read = run_virtual(run(), horizon_s=HORIZON_S)
    assert len(story.decisions) > 10
    assert len(read) < 4
    assert second.service.core.state_hash == story.core.state_hash


def test_a_standby_that_begins_at_a_snapshot_respects_the_lease_it_did_not_read() -> None:
    async def run() -> list[str]:
        async with town() as place:
            first = place.start("first", lease_s=8.0, snapshot_every=2)
            await place.submit(range(TASKS))
            await place.until_ended(TASKS)
            second = place.start("second", lease_s=0.5)
            await asyncio.sleep(30.0)
            assert first.service.standing is Standing.LEADING
            assert second.service.standing is Standing.STANDING_BY
            assert second.service.context.decision_log.planner == "first"
            return [opened.planner for opened in (await place.story()).opened]

    assert run_virtual(run(), horizon_s=HORIZON_S) == ["first"]


async def _planted_snapshot(change: dict[str, Any], **options: Any) -> tuple[Story, Process]:
    async with town() as place:
        before = await _with_snapshot(place)
        reader = await place.bus.reader([(topics.SNAPSHOTS, 0)], start="start")
        newest = messages.decode(topics.SNAPSHOTS, (await reader.fetch())[-1].value)
        await reader.close()
        assert isinstance(newest, Snapshot)
        await place.tell(topics.SNAPSHOTS, newest.model_copy(update=change), "0")
        second = place.start("second", **options)
        await asyncio.sleep(10.0)
        assert second.service.standing is Standing.LEADING
        assert second.service.core.state_hash == before.core.state_hash
        await place.submit(range(100, 104))
        return await place.until_ended(TASKS + 4, 20.0), second


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 10_000},  # of a decision that was never written
        {"offset": 10_000, "seq": 10_000},
        {"nonce": "somebody-else", "seq": 10_000},
        {"ledger_hash": "0" * 32, "seq": 10_000},
        {"state": {"version": 99}, "seq": 10_000},  # of a newer program
        {"state": {}, "seq": 10_000},
    ],
)
def test_a_snapshot_that_the_log_does_not_prove_is_not_believed(change: dict[str, Any]) -> None:
    story, _ = run_virtual(_planted_snapshot(change), horizon_s=HORIZON_S)
    story.check(IDS | {f"t{number}" for number in range(100, 104)})


def test_planted_a_planner_that_believes_any_snapshot_is_found_out() -> None:
    planted = _planted_snapshot(
        {"seq": 10_000, "nonce": "never-written"}, components=ServiceComponents(reader_behind=unconfirmed_reader)
    )
    with pytest.raises((AssertionError, InvariantError, TimeoutError)):
        run_virtual(planted, horizon_s=HORIZON_S)


@pytest.mark.parametrize("topic", [topics.SNAPSHOTS, topics.DECISIONS])
def test_garbage_is_dead_lettered_once_however_often_planners_start(topic: str) -> None:
    async def letters(place: Town) -> list[str]:
        reader = await place.bus.reader([(topics.DEAD_LETTER, 0)], start="start")
        return [record.key or "" for record in await reader.fetch(timeout_s=0.0)]

    async def run() -> list[str]:
        async with town() as place:
            await place.bus.send(topic, b"\x80", key="x", partition=0)  # while no planner leads
            for number in range(3):
                planner = place.start(f"p{number}", snapshot_every=4)
                await place.submit(range(4 * number, 4 * number + 4))
                await place.until_ended(4 * number + 4)
                await place.bus.send(topic, b"{}", key="x", partition=0)
                await asyncio.sleep(1.0)
                await place.submit([100 + number])  # the next decision says that it was read
                await asyncio.sleep(2.0)
                await planner.kill()
            return await letters(place)

    found = run_virtual(run(), horizon_s=HORIZON_S)
    assert len(found) == 4
    assert len(set(found)) == 4
