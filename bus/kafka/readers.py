"""Kafka reader: reads partitions of one cluster without a group (group members: `bus.kafka.members`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import ConsumerStoppedError, KafkaConnectionError, KafkaError, KafkaTimeoutError

from bus.errors import BusError
from bus.kafka.connection import REQUEST_S, KafkaConnection, hang_up, patience_s
from bus.kafka.errors import translated
from bus.port import Record, TopicPartition

FETCH_BYTES = 4 << 20
"""Fetch size limit per partition; it bounds the records that a reader buffers."""

_CLOSE_S = 3.0
_RETRY_S = 0.1
_START_TRIES = 3
_START_RETRY_S = 0.5  # aiokafka logs each failed attempt
_WATCH_S = 2.0  # how often an idle reader checks whether records are available


class KafkaReader:
    """A reader of some partitions of one cluster, without a consumer group."""

    def __init__(
        self, connection: KafkaConnection, servers: str, start: str | None, positions: dict[TopicPartition, int]
    ) -> None:
        """`start` is "start" or "end" for partitions whose position is -1."""
        self._connection = connection
        self._servers = servers
        self._start = start
        self._positions = positions
        self._consumer: AIOKafkaConsumer | None = None
        self._closed = False
        self._watch_at = 0.0
        self._behind: dict[TopicPartition, int] = {}  # positions that were behind the end at the last check
        self.restarts = 0  # consumers that were stuck and replaced

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._servers}, {self._positions}>"

    @property
    def is_closed(self) -> bool:
        """Whether the reader is closed."""
        return self._closed

    async def open(self) -> None:
        """Connect and resolve every position. Raises `BusError`."""
        try:
            consumer = await started(lambda: AIOKafkaConsumer(**self._settings()), self._begin)
        except (KafkaError, TimeoutError) as error:
            raise translated(error, self._what()) from error
        self._consumer = consumer
        self._watch_at = asyncio.get_running_loop().time() + _WATCH_S

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        if self._closed:
            raise BusError("the reader is closed")
        try:
            fetched = await self._getmany(max_records, timeout_s)
        except ConsumerStoppedError:
            return []
        except KafkaError as error:
            if self._closed:
                return []
            raise translated(error, self._what()) from error
        records: list[Record] = []
        for partition, batch in fetched.items():
            self._positions[partition.topic, partition.partition] = batch[-1].offset + 1
            records += [
                Record(
                    record.topic,
                    record.partition,
                    record.offset,
                    record.timestamp,
                    None if record.key is None else record.key.decode("utf-8", "replace"),
                    record.value,
                    record.headers,
                )
                for record in batch
            ]
        if not records and not self._closed:
            await self._refresh()
            if asyncio.get_running_loop().time() >= self._watch_at:
                await self._replace_if_stuck()
        return records

    def position(self, partition: TopicPartition) -> int:
        try:
            return self._positions[partition]
        except KeyError:
            raise BusError(f"{partition[0]}[{partition[1]}] is not read here") from None

    async def seek(self, partition: TopicPartition, offset: int) -> None:
        self.position(partition)
        self._open_consumer().seek(KafkaPartition(*partition), offset)
        self._positions[partition] = offset

    async def lag(self) -> int:
        await self._refresh()
        ends = await self._ends(patience_s(self._open_consumer()._client))
        return sum(max(end - self._positions.get(partition, end), 0) for partition, end in ends.items())

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop_consumer(consumer)

    async def abandon(self) -> None:
        """Stop without leaving the group, like a killed process; the group notices after the session timeout."""
        self._closed = True
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await cut_off(consumer)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return self._connection.client_settings(self._servers) | {
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "max_partition_fetch_bytes": FETCH_BYTES,
        }

    async def _begin(self, consumer: AIOKafkaConsumer) -> None:
        await consumer.start()
        partitions = {KafkaPartition(*partition): partition for partition in self._positions}
        consumer.assign(list(partitions))
        unknown = []
        for partition, ours in partitions.items():
            if self._positions[ours] < 0:
                unknown.append(partition)
            else:
                consumer.seek(partition, self._positions[ours])
        if unknown:
            seek = consumer.seek_to_end if self._start == "end" else consumer.seek_to_beginning
            async with asyncio.timeout(patience_s(consumer._client)):
                await seek(*unknown)
                for partition in unknown:
                    self._positions[partitions[partition]] = await consumer.position(partition)

    async def _getmany(self, max_records: int, timeout_s: float) -> Mapping[KafkaPartition, list[Any]]:
        fetched: Mapping[KafkaPartition, list[Any]] = await self._open_consumer().getmany(
            timeout_ms=int(timeout_s * 1000), max_records=max_records
        )
        return fetched

    async def _refresh(self) -> None:
        """Copy the consumer's positions, which also move without records: past transaction markers and compacted records."""
        consumer = self._open_consumer()
        for partition in self._positions:
            # A position that the consumer is still looking up is left unchanged.
            state = consumer._subscription.subscription.assignment.state_value(KafkaPartition(*partition))
            if state is not None and state.has_valid_position:
                self._positions[partition] = state.position

    async def _ends(self, within_s: float) -> dict[TopicPartition, int]:
        try:
            return await end_offsets(self._open_consumer(), self._positions, within_s)
        except (KafkaError, TimeoutError) as error:
            raise translated(error, self._what()) from error

    async def _replace_if_stuck(self) -> None:
        """Replace a stuck consumer: records are available at the same position in two checks, but none arrive.

        This was observed after broker restarts: connected, no error, no records.
        """
        loop = asyncio.get_running_loop()
        try:
            ends = await self._ends(_CLOSE_S)
        except BusError:
            ends = {}  # the broker is unavailable: the consumer is not stuck
        behind = {
            partition: self._positions[partition]
            for partition, end in ends.items()
            if self._positions.get(partition, end) < end
        }
        stuck = any(self._behind.get(partition) == position for partition, position in behind.items())
        self._behind = behind
        self._watch_at = loop.time() + _WATCH_S
        if stuck and not self._closed:
            self._behind = {}
            self.restarts += 1
            await self._let_go()
            consumer, self._consumer = self._consumer, None
            if consumer is not None:
                await stop_consumer(consumer)
            await self.open()

    async def _let_go(self) -> None:
        """Called before the consumer is replaced."""

    def _what(self) -> str:
        return ", ".join(sorted({topic for topic, _ in self._positions})) or "Kafka"

    def _open_consumer(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise BusError("the reader is closed")
        return self._consumer


async def end_offsets(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], within_s: float
) -> dict[TopicPartition, int]:
    """The end offsets of partitions; retried while leaders are unavailable. Raises `KafkaError` or `TimeoutError`."""
    wanted = [KafkaPartition(*partition) for partition in partitions]
    if not wanted:
        return {}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                ends = await consumer.end_offsets(wanted)
            return {(partition.topic, partition.partition): offset for partition, offset in ends.items()}
        except KafkaError as error:  # KafkaTimeoutError: aiokafka's own timeout of one attempt, 5 s
            if not (error.retriable or isinstance(error, KafkaTimeoutError)) or loop.time() > deadline:
                raise
            await asyncio.sleep(_RETRY_S)


async def started(
    make: Callable[[], AIOKafkaConsumer], begin: Callable[[AIOKafkaConsumer], Awaitable[None]]
) -> AIOKafkaConsumer:
    """A consumer that `begin` has started. Raises `KafkaError` or `TimeoutError`.

    aiokafka asks each bootstrap server once. Here they are asked at least three times, and for at least `REQUEST_S`.
    """
    loop = asyncio.get_running_loop()
    began_s, tries = loop.time(), 0
    while True:
        tries += 1
        consumer = make()
        try:
            await begin(consumer)
            return consumer
        except KafkaConnectionError:
            await cut_off(consumer)
            if tries >= _START_TRIES and loop.time() > began_s + REQUEST_S:
                raise
            await asyncio.sleep(_START_RETRY_S)
        except BaseException:
            await cut_off(consumer)
            raise


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop the consumer; if that exceeds the timeout, cut it off."""
    stopping = asyncio.ensure_future(consumer.stop())
    done, _ = await asyncio.wait([stopping], timeout=_CLOSE_S)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping])
    # `stop` may raise CancelledError when aiokafka awaits a task that it cancelled itself: this task was not cancelled.
    if not done or stopping.cancelled() or stopping.exception() is not None:
        await cut_off(consumer)


async def cut_off(consumer: AIOKafkaConsumer) -> None:
    """End a consumer at once without leaving its group. aiokafka has no call for this."""
    consumer._closed = True  # prevents the warning about an unclosed consumer
    tasks: list[asyncio.Task[Any] | None] = []
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    if coordinator is not None:
        names = ("_coordination_task", "_heartbeat_task", "_commit_refresh_task", "_reset_committed_task")
        tasks += [getattr(coordinator, name, None) for name in names]
    if fetcher is not None:
        fetcher._closed = True
        tasks += [fetcher._fetch_task, *fetcher._pending_tasks]
        for waiter in list(fetcher._fetch_waiters):
            fetcher._notify(waiter)
    running = [task for task in tasks if task is not None and not task.done()]
    for task in running:
        task.cancel()
    await hang_up(consumer._client)
    if running:
        await asyncio.wait(running, timeout=1.0)
