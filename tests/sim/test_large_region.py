"""Regions whose state, or a single step, fits no record: snapshots and decisions of several records, killed in between."""

from __future__ import annotations

import asyncio

import pytest

from bus import messages, snapshots, topics
from bus.memory.broker import MemoryBroker, Retention
from bus.messages import (
    DecisionPart,
    NodeAnnounced,
    NodeLeft,
    NodeLost,
    Retried,
    Snapshot,
    SnapshotPart,
    TaskCancelled,
)
from bus.port import Record
from bus.values import Role
from deploy.monitor.region_view import RegionView
from loadgen.sim.virtual_loop import run_virtual
from planner.core.core import PlannerCore
from planner.core.options import CoreOptions
from planner.service.service import Standing
from stages.membership.fences import Fences
from tests.decision_story import read_story
from tests.sim.planners import FOREVER_S, Condition, CountingCore, Process, Town, town
from tests.sim.world import profile, task

HORIZON_S = 3600.0


async def _leads(process: Process) -> None:
    async with asyncio.timeout(60.0):
        while process.service.standing is not Standing.LEADING:
            await asyncio.sleep(0.05)


def _records(place: Town, topic: str) -> list[Record]:
    return place.broker.logs(topic)[0].read(0, 1 << 30)


async def _snapshots(place: Town, leader: Process, numbers: range) -> None:
    """A snapshot after each of these tasks."""
    for number in numbers:
        leader.service.context.snapshot_seq = -1_000  # one is due
        await place.submit([number], gap_s=0.5)


def _newest(place: Town) -> Snapshot:
    read = [messages.decode(topics.SNAPSHOTS, record.value) for record in _records(place, topics.SNAPSHOTS)]
    return [one for one in read if isinstance(one, Snapshot)][-1]


def always_compacting() -> MemoryBroker:
    """A broker that keeps no stale record of a compacted topic."""
    return MemoryBroker(retention=Retention(stale_records=-1_000_000))


# --- one step with thousands of changes ------------------------------------------------------------------------------

WAITING = 3200


def test_an_edge_is_lost_under_which_1600_tasks_wait_and_the_planner_dies_in_the_midst() -> None:
    async def run() -> None:
        async with town(played=False) as place:
            options = CoreOptions(max_waiting=100_000, max_waiting_per_device=100_000)
            place.make_core = lambda: PlannerCore(0, "edge-only", options=options)
            first = place.start("first")
            first.bus.dies_after = lambda topic, value: (
                topic == topics.DECISIONS and isinstance(messages.decode(topic, value), DecisionPart)
            )
            await place.submit(range(WAITING), gap_s=0.0)
            while first.service.core.live_tasks < WAITING:
                await asyncio.sleep(1.0)
            behind_it = set(first.service.core.ledger.edges["e1"].reservations)
            assert len(behind_it) > 1500
            await place.tell(topics.NODES, NodeLeft(node="e1", incarnation="e1-1"), "e1")
            await first.bus.died.wait()
            await first.stop()
            second = place.start("second")
            await _leads(second)
            async with asyncio.timeout(60.0):
                while "e1" in second.service.core.nodes:
                    await asyncio.sleep(0.1)
            await asyncio.sleep(1.0)

            story = await read_story(place.bus, place.core, validate_every=500)
            story.core.validate()
            assert second.service.core.state_hash == story.core.state_hash
            assert sorted(story.core.tasks) == sorted(f"t{number}" for number in range(WAITING))
            assert all(task.placed and task.placed.placement.edge == "e2" for task in story.core.tasks.values())
            (loss,) = [d for d in story.decisions if any(isinstance(change, NodeLost) for change in d.changes)]
            assert {change.task_id for change in loss.changes if isinstance(change, Retried)} == behind_it
            assert len(loss.changes) > 4500
            # a part of the first planner's decision, which no reader applies, then the whole decision of the second
            written = [messages.decode(topics.DECISIONS, record.value) for record in _records(place, topics.DECISIONS)]
            parts = [(one.nonce, one.part) for one in written if isinstance(one, DecisionPart)]
            assert [part for nonce, part in parts if nonce != loss.nonce] == [1]
            assert [part for nonce, part in parts if nonce == loss.nonce] == list(range(1, (loss.parts or 0) + 1))
            assert all(len(r.value or b"") <= messages.MAX_MESSAGE_BYTES for r in _records(place, topics.DECISIONS))
            # other readers: what people see, and what stages fence
            view, fences = RegionView(0), Fences()
            for record in _records(place, topics.DECISIONS):
                view.read(record)
            for decision in story.decisions:
                fences.apply(decision)
            for task_id, one in story.core.tasks.items():
                shown = view.tasks[task_id]
                assert (shown.attempt, shown.state) == (one.attempt, one.state)
                assert fences.attempt(task_id) == one.attempt == (2 if task_id in behind_it else 1)

    run_virtual(run(), horizon_s=HORIZON_S)


# --- a state of many records -----------------------------------------------------------------------------------------

LIVE = 20_000
DEVICES = 2_000


def test_a_region_with_20000_live_tasks_restores_from_a_snapshot_and_decides_while_it_is_written() -> None:
    async def run() -> None:
        async with town(MemoryBroker(latency_s=0.001), played=False) as place:
            place.make_core = lambda: PlannerCore(0, "device-only", options=CoreOptions(max_waiting=100_000))
            for number in range(DEVICES):
                announced = NodeAnnounced(
                    node=f"n{number}",
                    role=Role.DEVICE,
                    incarnation="i",
                    lease_s=FOREVER_S,
                    models=(profile(Role.DEVICE),),
                )
                await place.bus.post(topics.NODES, messages.encode(announced), key=announced.node, partition=0)
            first = place.start("first", snapshot_every=4_000)
            for number in range(LIVE):
                one = task(number, f"n{number % DEVICES}")
                await place.bus.post(topics.TASKS, messages.encode(one), key=one.task_id, partition=0)
            async with asyncio.timeout(600.0):
                while first.service.core.live_tasks < LIVE:
                    await asyncio.sleep(1.0)
            await asyncio.sleep(5.0)
            first.service.context.snapshot_seq = 0  # the next decision is due for one
            for number in range(LIVE, LIVE + 100):
                one = task(number, f"n{number % DEVICES}")
                await place.tell(topics.TASKS, one, one.task_id)
            await asyncio.sleep(5.0)
            core = first.service.core
            assert core.live_tasks == LIVE + 100
            await first.kill()

            # deciding went on between the parts
            head = _newest(place)
            assert len(head.parts) > 20
            parts = [r for r in _records(place, topics.SNAPSHOTS) if snapshots.digest(r.value or b"") in head.parts]
            assert max(len(r.value or b"") for r in parts) <= 300_000
            decided = [r.timestamp_ms for r in _records(place, topics.DECISIONS)]
            assert sum(parts[0].timestamp_ms < at < parts[-1].timestamp_ms for at in decided) > 10

            folded: list[int] = []
            place.make_core = lambda: CountingCore(folded, 0, "device-only", options=CoreOptions(max_waiting=100_000))
            second = place.start("second")
            await _leads(second)
            assert len(folded) <= 100
            assert second.service.core.state_hash == core.state_hash
            assert second.service.core.live_tasks == LIVE + 100
            second.service.core.validate()

            # stages begin there, too
            known, reader = await snapshots.open_decisions(place.bus, 0)
            assert known is not None
            assert known.seq == head.seq
            fences = Fences()
            fences.restore(known.state)
            assert sum(task.placed is not None for task in fences.tasks.values()) >= LIVE
            await reader.close()

    run_virtual(run(), horizon_s=HORIZON_S)


def _at_part(number: int) -> Condition:
    """Whether a record is this part of a snapshot."""

    def holds(topic: str, value: bytes | None) -> bool:
        if topic != topics.SNAPSHOTS or value is None:
            return False
        message = messages.decode(topic, value)
        return isinstance(message, SnapshotPart) and message.part == number

    return holds


async def _dies_while_it_writes(place: Town, lives: int) -> list[int]:
    """A snapshot of many parts; then planners that die while they write the next; then what the last has to fold."""
    place.make_core = lambda: PlannerCore(0, "edge-only")
    first = place.start("first", snapshot_every=30, part_bytes=1_500)
    await place.submit(range(40))
    await asyncio.sleep(2.0)
    await first.kill()
    assert _newest(place).parts
    for life in range(lives):
        planner = place.start(f"p{life}", part_bytes=1_500)
        planner.bus.dies_before = _at_part(2 + life % 5)
        await _leads(planner)
        planner.service.context.snapshot_seq = -1_000  # one is due
        await place.submit([100 + life])
        await planner.bus.died.wait()
        await planner.stop()
    counted: list[int] = []
    place.make_core = lambda: CountingCore(counted, 0, "edge-only")
    last = place.start("last", snapshot_every=10_000)
    await _leads(last)
    folded = list(counted)
    story = await read_story(place.bus, place.core)
    assert last.service.core.state_hash == story.core.state_hash
    return folded


def _in_one_place(topic: str, value: bytes | None, key: str | None) -> tuple[bytes | None, str | None]:
    """Writes every snapshot and its parts under the keys of the first place."""
    if topic == topics.SNAPSHOTS and key is not None:
        region, _, *part = key.split("/")
        key = "/".join([region, "0", *part])
    return value, key


@pytest.mark.parametrize("places", [snapshots.PLACES, 1])
def test_a_snapshot_that_is_written_half_destroys_none_that_is_whole(places: int) -> None:
    """With the planted fault that all snapshots are written to a single place, it does."""

    async def run() -> list[int]:
        async with town(always_compacting(), played=False) as place:
            if places == 1:
                place.alter = _in_one_place
            return await _dies_while_it_writes(place, lives=12)

    folded = run_virtual(run(), horizon_s=HORIZON_S)
    assert (1 in folded) == (places == 1)


def test_a_smaller_snapshot_leaves_nothing_of_a_larger_one() -> None:
    async def run() -> tuple[int, int, Snapshot]:
        async with town(always_compacting(), played=False) as place:
            place.make_core = lambda: PlannerCore(0, "edge-only", options=CoreOptions(remember_ended=3))
            only = place.start("only", snapshot_every=3, part_bytes=2_000)
            await place.submit(range(40))
            await _snapshots(place, only, range(40, 44))

            def kept() -> int:
                return len({r.key for r in _records(place, topics.SNAPSHOTS) if r.value is not None})

            most = kept()
            for number in range(44):
                await place.tell(topics.TASKS, TaskCancelled(task_id=f"t{number}"), f"t{number}")
                await asyncio.sleep(0.1)
            await asyncio.sleep(2.0)
            return most, kept(), _newest(place)

    most, left, newest = run_virtual(run(), horizon_s=HORIZON_S)
    assert most > 30
    assert left == snapshots.PLACES + sum(newest.widths)
    assert len(newest.parts) < 5


@pytest.mark.parametrize("seed", range(6))
def test_a_forged_part_in_the_place_of_a_true_one_leads_nobody_astray(seed: int) -> None:
    async def run() -> bool:
        async with town(always_compacting(), played=False) as place:
            place.make_core = lambda: PlannerCore(0, "edge-only")
            first = place.start("first", snapshot_every=10, part_bytes=1_500)
            await place.submit(range(30))
            await _snapshots(place, first, range(30, 34))
            await first.kill()
            before = first.service.core.state_hash
            forged = SnapshotPart(region=0, seq=20, part=2, state={"tasks": []})
            for place_number in range(snapshots.PLACES) if seed % 2 else [seed // 2]:
                await place.tell(topics.SNAPSHOTS, forged, snapshots.key_of(0, place_number, 2))
            folded: list[int] = []
            place.make_core = lambda: CountingCore(folded, 0, "edge-only")
            second = place.start("second")
            await _leads(second)
            assert second.service.core.state_hash == before
            return 1 in folded

    assert run_virtual(run(), horizon_s=HORIZON_S) == bool(seed % 2)
