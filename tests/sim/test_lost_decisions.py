"""Decisions that are deleted under their readers: a planner does not begin again at epoch 1, a stage is never stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest
from structlog.testing import capture_logs

from bus import snapshots, topics
from bus.decisions import DecisionsLostError
from bus.errors import ConfigError
from bus.memory.bus import MemoryBroker, MemoryBus
from bus.topics import TopicSpec
from bus.values import Role
from deploy.services.wiring import make_work
from loadgen.sim.virtual_loop import run_virtual
from planner.service.service import Standing
from stages.membership.settings import NodeSettings
from stages.node import Node
from stages.region_decisions import WAIT_LOG_S
from stages.runner import ModelledRunner
from tests.sim.planners import Process, Town, town
from tests.sim.world import profile

LEASE_S = 10.0


async def end_of(place: Town) -> int:
    return (await place.bus.end_offsets(topics.DECISIONS))[0]


async def until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.1)


async def what_it_ended_of(place: Town, process: Process) -> BaseException | None:
    place.processes.remove(process)
    await asyncio.wait({process.task}, timeout=60.0)
    assert process.task.done(), "it goes on"
    return process.task.exception()


@pytest.mark.parametrize("left", [0, 1, 3, 20])
def test_a_planner_stops_where_the_start_of_the_log_is_gone_and_no_snapshot_covers_it(left: int) -> None:
    async def main() -> None:
        async with town() as place:
            first = place.start(snapshot_every=10_000)
            await place.submit(range(6))
            await place.until_ended(6)
            await first.kill()
            end = await end_of(place)
            place.broker.delete_records(topics.DECISIONS, 0, end - left)
            ended = await what_it_ended_of(place, place.start("q", snapshot_every=10_000))
            assert isinstance(ended, ConfigError)
            assert "region 0: decisions from offset 0 on were deleted" in str(ended)
            assert "no snapshot covers them" in str(ended)
            assert ended.remedy is not None
            assert await end_of(place) == end, "it has claimed the region"

    run_virtual(main())


def test_a_planner_stops_where_compaction_has_taken_decisions_out_of_the_middle() -> None:
    async def main() -> None:
        broker = MemoryBroker()
        broker.create([TopicSpec(topics.DECISIONS, 1, compacted=True)])
        async with town(broker) as place:
            first = place.start(snapshot_every=10_000)
            await place.submit(range(12))
            await asyncio.sleep(60.0)
            await first.kill()
            ended = await what_it_ended_of(place, place.start("q", snapshot_every=10_000))
            assert isinstance(ended, ConfigError)
            assert isinstance(ended.__cause__, DecisionsLostError)

    run_virtual(main())


def test_a_planner_goes_on_where_a_snapshot_covers_what_is_gone() -> None:
    async def main() -> None:
        async with town() as place:
            first = place.start(snapshot_every=5)
            await place.submit(range(6))
            await place.until_ended(6)
            await asyncio.sleep(5.0)
            seq = first.service.context.decision_log.seq
            await first.kill()
            second = place.start("q", snapshot_every=5)
            await until(lambda: second.service.standing is Standing.LEADING)
            covered = second.service.context.snapshot_seq
            await second.kill()
            assert 5 < covered <= seq
            place.broker.delete_records(topics.DECISIONS, 0, covered)  # every decision took a record, and more did
            third = place.start("r", snapshot_every=5)
            await until(lambda: third.service.standing is Standing.LEADING)
            assert third.service.context.decision_log.epoch == 3
            assert third.service.context.decision_log.seq >= seq
            await place.submit(range(10, 13))
            await until(lambda: third.service.counters.decisions > 0 and third.service.core.live_tasks == 0)

    run_virtual(main())


def test_a_planner_that_leads_reads_again_where_records_were_lost_under_it() -> None:
    """Its topic was deleted and created again: it does not obey its own memory against the log."""

    async def main() -> None:
        async with town(played=False) as place:
            first = place.start(snapshot_every=10_000)
            await until(lambda: first.service.standing is Standing.LEADING and first.service.counters.decisions > 5)
            place.broker.delete_topic(topics.DECISIONS)
            await asyncio.sleep(3.0)
            place.broker.create(topics.specs())
            with capture_logs() as logs:
                await until(
                    lambda: first.service.context.decision_log.seq > 0 and first.service.standing is Standing.LEADING
                )
                await asyncio.sleep(30.0)
            assert first.service.standing is Standing.LEADING
            assert len(logs) < 60
            story = await place.story()
            assert story.decisions[-1].ledger_hash == first.service.core.state_hash

    run_virtual(main())


@pytest.mark.parametrize("while_it_leads", [False, True])
def test_a_planner_stops_where_the_log_was_made_anew_and_snapshots_tell_of_another(while_it_leads: bool) -> None:
    async def main() -> None:
        async with town(played=False) as place:
            planner = place.start(snapshot_every=5)
            await place.submit(range(6))
            await until(lambda: planner.service.context.snapshot_seq > 0)
            await asyncio.sleep(5.0)
            if not while_it_leads:
                await planner.kill()
            place.broker.delete_topic(topics.DECISIONS)
            await asyncio.sleep(1.0)
            place.broker.create(topics.specs())
            if not while_it_leads:
                planner = place.start("q", snapshot_every=5)
            ended = await what_it_ended_of(place, planner)
            assert isinstance(ended, ConfigError)
            assert "the log starts again at offset 0" in str(ended)
            assert topics.SNAPSHOTS in str(ended.remedy)

    run_virtual(main())


class OneDevice:
    """A region whose device d1 has a connection of its own that can be cut."""

    def __init__(self, place: Town) -> None:
        self.bus = MemoryBus(place.broker, "d9")
        settings = NodeSettings(name="d9", role=Role.DEVICE, lease_s=LEASE_S)
        self.node = Node(self.bus, settings, ModelledRunner([profile(Role.DEVICE)]))

    async def run(self) -> None:
        async with self.bus:
            await self.node.run(make_work(self.node))

    @property
    def ready(self) -> bool:
        return self.node.status.ready and self.node.status.joined


async def begin_of_log(place: Town, covered: bool) -> int:
    """An offset that the newest snapshot covers, or does not."""
    if not covered:
        return await end_of(place) - 2
    async with aclosing(snapshots.found(place.bus, 0)) as candidates:
        async for one in candidates:
            return one.snapshot.offset
    raise AssertionError("there is no snapshot")


def missed(*, covered: bool) -> list[tuple[str, float]]:
    """A device is cut off until what it has not read is gone; tells when which warning came, and that it serves again."""

    async def main() -> list[tuple[str, float]]:
        async with town(real=True) as place:
            clock = asyncio.get_running_loop().time
            planner = place.start(snapshot_every=3 if covered else 10_000)
            device = OneDevice(place)
            running = asyncio.create_task(device.run())
            await until(lambda: device.ready)
            first = device.node.incarnation
            device.bus.disconnect()
            await place.submit(range(8))
            await until(lambda: planner.service.core.live_tasks == 0)
            await asyncio.sleep(2 * LEASE_S)
            place.broker.delete_records(topics.DECISIONS, 0, await begin_of_log(place, covered))
            device.bus.reconnect()
            said: list[tuple[str, float]] = []
            with capture_logs() as logs:
                began_s = clock()
                while clock() - began_s < 300.0:
                    await asyncio.sleep(0.1)
                    said += [(entry["event"], clock() - began_s) for entry in logs if entry.get("node") == "d9"]
                    logs.clear()
                    if not device.node.status.ready:
                        assert not device.node.status.joined
            assert device.ready, said
            assert device.node.incarnation != first
            assert device.node.status.counters["decisions_missed"] == 1
            await place.submit([5000])
            await until(lambda: planner.service.core.live_tasks == 0)
            running.cancel()
            await asyncio.wait([running])
            return said

    return run_virtual(main())


def test_a_device_that_missed_decisions_reads_again_from_the_last_snapshot() -> None:
    said = missed(covered=True)
    assert any(event.startswith("decisions were missed") for event, _ in said)
    assert not any(event.startswith("not ready") for event, _ in said)


def test_a_device_without_a_snapshot_says_so_once_and_serves_as_soon_as_the_planner_has_seen_to_one() -> None:
    told = [at_s for event, at_s in missed(covered=False) if event.startswith("not ready")]
    assert len(told) == 1


def test_a_device_that_waits_for_a_snapshot_says_so_once_a_minute() -> None:
    async def main() -> list[str]:
        async with town(played=False) as place:
            planner = place.start(snapshot_every=10_000)
            await until(lambda: planner.service.counters.decisions > 5)
            await planner.kill()  # no planner is left to write one
            place.broker.delete_records(topics.DECISIONS, 0, await end_of(place) - 2)
            device = OneDevice(place)
            with capture_logs() as logs:
                running = asyncio.create_task(device.run())
                await asyncio.sleep(10 * WAIT_LOG_S - 1)
                assert not device.node.status.ready
                running.cancel()
                await asyncio.wait([running])
            return [entry["event"] for entry in logs if entry["log_level"] in ("warning", "error")]

    assert run_virtual(main()) == ["not ready: waiting for a snapshot"] * 10


def test_inputs_that_are_deleted_before_they_are_read_are_counted() -> None:
    async def main() -> int:
        async with town(played=False) as place:
            await place.submit(range(7))
            place.broker.delete_records(topics.TASKS, 0, 5)
            planner = place.start()
            await until(lambda: planner.service.context.inputs.get(topics.TASKS) == 7)
            return planner.service.counters.lost_inputs

    assert run_virtual(main()) == 5
