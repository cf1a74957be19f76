"""Faults on request: each strikes as told, a seed repeats a run exactly, and what heals converges."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bus.errors import BusUnavailableError
from bus.memory.bus import Faults, MemoryBroker, MemoryBus
from bus.memory.faults import KINDS
from bus.port import Record, TopicPartition
from bus.topics import TopicSpec
from loadgen.sim.virtual_loop import run_virtual

TOPIC = "t"


def with_faults(main: Any, partitions: int = 1, **probabilities: Any) -> Any:
    async def inside() -> Any:
        broker = MemoryBroker(faults=Faults(random=Random(7), **probabilities))
        async with MemoryBus(broker) as bus:
            await bus.create_topics([TopicSpec(TOPIC, partitions)])
            return await main(broker, bus)

    return run_virtual(inside(), horizon_s=1e5)


async def everything(bus: MemoryBus) -> list[Record]:
    return await (await bus.reader([(TOPIC, 0)], start="start")).fetch(max_records=10_000, timeout_s=0.0)


@pytest.mark.parametrize(
    "wrong", [{"lost_ack": 1.5}, {"rebalance": -0.1}, {"late_s": -1.0}, {"late": 2.0}, {"stale_commit": 7}]
)
def test_impossible_probabilities_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Faults(random=Random(1), **wrong)


@pytest.mark.parametrize(("fault", "written"), [("lost_ack", 1), ("lost_post", 0)])
def test_a_lost_acknowledgement_is_a_failure_either_way(fault: str, written: int) -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        with pytest.raises(BusUnavailableError):
            await bus.send(TOPIC, b"x")
        assert await bus.end_offsets(TOPIC) == {0: written}
        broker.faults = None
        assert (await bus.send(TOPIC, b"y")).offset == written

    struck: dict[str, Any] = {fault: 1.0}
    with_faults(main, **struck)


def test_a_duplicate_stands_behind_its_original() -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        positions = [(await bus.send(TOPIC, b"%d" % number)).offset for number in range(3)]
        assert positions == [0, 2, 4]
        assert [record.value for record in await everything(bus)] == [b"0", b"0", b"1", b"1", b"2", b"2"]

    with_faults(main, duplicate=1.0)


def test_a_stale_commit_is_ignored_in_silence() -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        member = await bus.join([TOPIC], group="g")
        await bus.send(TOPIC, b"x")
        await member.fetch()
        await member.commit({(TOPIC, 0): 1})
        assert broker.committed("g") == {}
        broker.faults = None
        await member.commit({(TOPIC, 0): 1})
        assert broker.committed("g") == {(TOPIC, 0): 1}

    with_faults(main, stale_commit=1.0)


def test_redelivery_goes_back_to_what_was_committed_without_a_rebalance() -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        told: list[str] = []

        async def assigned(partitions: frozenset[TopicPartition]) -> None:
            told.append("assigned")

        member = await bus.join([TOPIC], group="g", on_assigned=assigned)
        for number in range(4):
            await bus.send(TOPIC, b"%d" % number)
        seen = [record.offset for _ in range(3) for record in await member.fetch()]
        await member.commit({(TOPIC, 0): 3})
        seen += [record.offset for _ in range(2) for record in await member.fetch()]
        assert seen == [0, 1, 2, 3] * 3 + [3] * 2
        assert told == ["assigned"]

    with_faults(main, redelivery=1.0)


def test_a_fetch_may_end_in_a_rebalance() -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        told: list[str] = []

        async def assigned(partitions: frozenset[TopicPartition]) -> None:
            told.append("assigned")

        async def revoked(partitions: frozenset[TopicPartition]) -> None:
            told.append("revoked")

        member = await bus.join([TOPIC], group="g", on_assigned=assigned, on_revoked=revoked)
        for _ in range(3):
            await member.fetch(timeout_s=0.1)
            await asyncio.sleep(0.1)
        assert told[:5] == ["assigned", "revoked", "assigned", "revoked", "assigned"]

    with_faults(main, rebalance=1.0)


def test_late_records_stay_in_order() -> None:
    async def main(broker: MemoryBroker, bus: MemoryBus) -> None:
        waiting = [await bus.post(TOPIC, b"%d" % number) for number in range(50)]
        assert await everything(bus) == []
        await asyncio.gather(*waiting)
        assert 1.0 < asyncio.get_running_loop().time() <= 2.0
        assert [record.offset for record in await everything(bus)] == list(range(50))

    with_faults(main, late=1.0, late_s=2.0)


ALL: dict[str, Any] = {
    "lost_ack": 0.1,
    "lost_post": 0.1,
    "duplicate": 0.1,
    "rebalance": 0.05,
    "redelivery": 0.05,
    "stale_commit": 0.2,
    "late": 0.3,
    "late_s": 0.05,
}


async def stormy(seed: int, trace: list[object]) -> None:
    """Two members, a third that comes and goes, a sender that insists; 300 records through every fault at once."""
    broker = MemoryBroker(latency_s=0.001, faults=Faults(random=Random(seed), **ALL), session_timeout_s=1.0)
    loop = asyncio.get_running_loop()
    seen: set[bytes] = set()

    async def consume(name: str, bus: MemoryBus, until_s: float) -> None:
        member = await bus.join([TOPIC], group="g")
        while loop.time() < until_s and len(seen) < 300:
            done: dict[TopicPartition, int] = {}
            for record in await member.fetch(max_records=10, timeout_s=0.05):
                trace.append((round(loop.time(), 6), name, record.partition, record.offset, record.value))
                assert record.value is not None
                seen.add(record.value)
                done[TOPIC, record.partition] = record.offset + 1
            try:
                await member.commit(done)
            except BusUnavailableError:
                trace.append((name, "no commit"))
        await member.close()

    async def produce(bus: MemoryBus) -> None:
        for number in range(300):
            while True:
                try:
                    await bus.send(TOPIC, b"%d" % number, key=f"k{number % 11}")
                    break
                except BusUnavailableError:
                    trace.append((round(loop.time(), 6), "again", number))

    async def outage() -> None:
        await asyncio.sleep(0.4)
        broker.pause()
        await asyncio.sleep(0.7)
        broker.resume()
        await asyncio.sleep(0.2)
        second.disconnect()
        await asyncio.sleep(1.5)
        second.reconnect()
        await asyncio.sleep(3.0)
        broker.faults = None  # heal, and what was to happen must happen

    async with MemoryBus(broker, "1") as first, MemoryBus(broker, "2") as second, MemoryBus(broker, "3") as third:
        await first.create_topics([TopicSpec(TOPIC, 4)])
        async with asyncio.TaskGroup() as group:
            group.create_task(outage())
            group.create_task(consume("one", first, 1e6))
            group.create_task(consume("two", second, 1e6))
            group.create_task(consume("three", third, 0.9))
            group.create_task(produce(first))
        assert seen == {b"%d" % number for number in range(300)}


def trace_of(seed: int) -> list[object]:
    trace: list[object] = []
    run_virtual(stormy(seed, trace), horizon_s=1e4)
    return trace


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_in_a_storm(seed: int) -> None:
    assert len(trace_of(seed)) >= 300


def test_the_same_seed_gives_the_same_trace_and_another_another() -> None:
    assert trace_of(3) == trace_of(3) != trace_of(4)


def test_the_trace_does_not_depend_on_hash_order() -> None:
    """Sets of strings iterate differently in every process; nothing may be decided by them."""
    program = (
        "import hashlib; from tests.unit.bus.memory.test_faults import trace_of; "
        "print(hashlib.sha256(repr(trace_of(5)).encode()).hexdigest())"
    )
    root = Path(__file__).parents[4]
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert digests == {hashlib.sha256(repr(trace_of(5)).encode()).hexdigest()}


def test_faults_are_drawn_only_where_they_can_strike() -> None:
    """So that a fault that is off does not shift the others' dice."""
    quiet = Faults(random=Random(1))
    before = quiet.random.getstate()
    assert not any(quiet.strikes(name) for name in KINDS)
    assert quiet.random.getstate() == before
    assert replace(quiet, late=1.0).strikes("late")


def test_a_missing_record_is_acknowledged_and_never_read_and_a_corrupt_one_is_another() -> None:
    told: list[tuple[str, str, str | None, bytes]] = []

    async def run(**chances: float) -> list[bytes | None]:
        faults = Faults(
            random=Random(3),
            damages=lambda topic, key, data: key == "k",
            on_damage=lambda *what: told.append(what),
            **chances,  # type: ignore[arg-type]
        )
        async with MemoryBus(MemoryBroker(faults=faults)) as bus:
            await bus.create_topics([TopicSpec("t", 1)])
            for key in ("k", "spared"):
                await bus.send("t", b"content", key=key)
            reader = await bus.reader([("t", 0)], start="start")
            return [record.value for record in await reader.fetch(timeout_s=0.0)]

    assert run_virtual(run(missing=1.0)) == [b"content"]
    garbled, spared = run_virtual(run(corrupt=1.0))
    assert garbled != b"content"
    assert spared == b"content"
    assert told == [("missing", "t", "k", b"content"), ("corrupt", "t", "k", b"content")]


def test_each_client_stamps_its_records_by_a_clock_of_its_own() -> None:
    async def run() -> list[int]:
        broker = MemoryBroker(wall_clock=lambda: 100.0)
        async with MemoryBus(broker) as one, MemoryBus(broker) as other:
            await one.create_topics([TopicSpec("t", 1)])
            other.wall_clock = lambda: 40.0
            for bus in (one, other):
                await bus.send("t", b"", key="k")
            reader = await one.reader([("t", 0)], start="start")
            return [record.timestamp_ms for record in await reader.fetch(timeout_s=0.0)]

    assert run_virtual(run()) == [100_000, 40_000]
