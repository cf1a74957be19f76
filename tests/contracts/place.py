"""Where a test of the contract is played, with topics and groups of its own, so that one broker serves all tests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import AsyncExitStack

from bus.kafka.bus import KafkaBus
from bus.memory.bus import MemoryBus
from bus.port import Bus, Reader, Record
from bus.topics import TopicSpec

AnyBus = MemoryBus | KafkaBus
_numbers = itertools.count(1)


class Place:
    """Somewhere to connect to: makes buses that share a broker, and topics with names of their own."""

    def __init__(self, connect: Callable[[], AnyBus]) -> None:
        self._connect = connect
        self._stack = AsyncExitStack()
        self.bus: AnyBus = connect()

    async def another(self) -> AnyBus:
        """One more connection, closed after the test."""
        return await self._stack.enter_async_context(self._connect())

    async def topic(self, partitions: int = 1, *, compacted: bool = False, retention_bytes: int = -1) -> str:
        name = f"contract.t{next(_numbers)}.n{id(self)}"
        await self.bus.create_topics([TopicSpec(name, partitions, compacted, retention_bytes=retention_bytes)])
        return name

    def group(self) -> str:
        return f"contract-g{next(_numbers)}-{id(self)}"

    async def leave(self, bus: AnyBus) -> None:
        """Close a connection in the middle of a test."""
        await bus.__aexit__(None, None, None)

    async def crash(self, bus: AnyBus) -> None:
        """The process of this bus is gone without a word."""
        if isinstance(bus, MemoryBus):
            bus.kill()
        else:
            await bus.abandon()

    async def __aenter__(self) -> Place:
        await self._stack.__aenter__()
        await self._stack.enter_async_context(self.bus)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.__aexit__(None, None, None)


async def read(reader: Reader, count: int, *, limit_s: float = 20.0) -> list[Record]:
    """The next `count` records, no more; fails when they do not come."""
    records: list[Record] = []
    async with asyncio.timeout(limit_s):
        while len(records) < count:
            records += await reader.fetch(max_records=count - len(records), timeout_s=0.5)
    return records


async def post_all(bus: Bus, topic: str, values: list[bytes], partition: int = 0) -> None:
    await asyncio.gather(*[await bus.post(topic, value, partition=partition) for value in values])


async def until(true: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not true():
            await asyncio.sleep(0.02)


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


async def filled(place: Place, partitions: int, count: int) -> str:
    """A topic with this many numbered records in each partition."""
    topic = await place.topic(partitions)
    for partition in range(partitions):
        await post_all(place.bus, topic, numbered(count), partition)
    return topic
