"""Reading raw topics with the bare client: from the first record on, through restarts of the broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

STALL_S = 3.0
"""Idle time after which a new consumer is created, because a consumer can hang after a broker restart."""

RETRY_S = 0.1
POLL_MS = 50

Take = Callable[[Any], None]
"""Callback that receives each record of aiokafka."""


class RawReader:
    """Follows topics from their first record; each record is delivered once."""

    def __init__(self, settings: Mapping[str, Any], topics: Sequence[str], take: Take) -> None:
        """`settings` are the connection settings for aiokafka clients."""
        self._settings = dict(settings) | {"enable_auto_commit": False, "auto_offset_reset": "earliest"}
        self._topics = tuple(topics)
        self._take = take
        self._positions: dict[TopicPartition, int] = {}

    async def follow(self) -> None:
        """Deliver records until cancelled."""
        while True:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                await self._spell(asyncio.get_running_loop().time)
            await asyncio.sleep(RETRY_S)

    async def read_all(self) -> None:
        """Read up to the present end of the topics. Raises KafkaError, TimeoutError."""
        consumer = await self._consumer()
        try:
            async with asyncio.timeout(30.0):
                ends = await consumer.end_offsets(list(consumer.assignment()))
            while any(self._positions.get(partition, 0) < end for partition, end in ends.items()):
                await self._fetch(consumer)
                for partition in ends:  # a position may skip offsets without a record
                    async with asyncio.timeout(30.0):
                        self._positions[partition] = await consumer.position(partition)
        finally:
            await _stop(consumer)

    async def _spell(self, clock: Callable[[], float]) -> None:
        """Read with one consumer until it has been idle for too long."""
        consumer = await self._consumer()
        try:
            heard_s = clock()
            while clock() - heard_s < STALL_S:
                if await self._fetch(consumer):
                    heard_s = clock()
        finally:
            await _stop(consumer)

    async def _consumer(self) -> AIOKafkaConsumer:
        """A started consumer at the positions of the previous one."""
        consumer = AIOKafkaConsumer(*self._topics, **self._settings)
        try:
            async with asyncio.timeout(10.0):
                await consumer.start()
        except BaseException:
            await _stop(consumer)
            raise
        for partition in consumer.assignment():
            if partition in self._positions:
                consumer.seek(partition, self._positions[partition])
        return consumer

    async def _fetch(self, consumer: AIOKafkaConsumer) -> int:
        batches = await consumer.getmany(timeout_ms=POLL_MS)
        for partition, records in batches.items():
            for record in records:
                if record.offset >= self._positions.get(partition, 0):
                    self._take(record)
                    self._positions[partition] = record.offset + 1
        return len(batches)


async def _stop(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer in a separate task, because aiokafka's stop() can raise CancelledError of its own inner tasks."""
    stopping = asyncio.ensure_future(consumer.stop())
    await asyncio.wait([stopping], timeout=3.0)
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait([stopping])
    if not stopping.cancelled():
        stopping.exception()  # the consumer has stopped either way
