"""Members of Kafka consumer groups: readers with assigned partitions and committed offsets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from bus.errors import BusUnavailableError
from bus.kafka.connection import KafkaConnection
from bus.kafka.errors import translated
from bus.kafka.readers import KafkaReader
from bus.port import RebalanceCallback, TopicPartition

COMMIT_TRY_S = 3.0
"""Timeout of the first attempt to commit, and 3 s more for each further one: aiokafka's may hang without a coordinator."""

COMMIT_S = 9.0
"""Timeout of a commit. Whoever commits tries again later, with newer positions, and can end in between."""

SESSION_TIMEOUT_S = 6.0
"""How long a group waits for a killed member."""

_RETRY_S = 0.1
_REBALANCE_TIMEOUT_S = 10.0
_GRACE_S = 0.25  # what a fetch may take beyond its timeout, during a rebalance


class KafkaMember(KafkaReader):
    """A group member: the group assigns its partitions."""

    def __init__(
        self,
        connection: KafkaConnection,
        servers: str,
        group: str,
        topics: tuple[str, ...],
        on_assigned: RebalanceCallback | None,
        on_revoked: RebalanceCallback | None,
    ) -> None:
        super().__init__(connection, servers, "start", {})
        self._group = group
        self._topics = topics
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._held: frozenset[TopicPartition] = frozenset()
        self._reading = asyncio.Event()  # between assigned and revoked
        self._error: Exception | None = None  # what a callback raised

    def assignment(self) -> frozenset[TopicPartition]:
        return self._held

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        ours = {KafkaPartition(*partition): offset for partition, offset in offsets.items() if partition in self._held}
        if not ours:
            return
        loop = asyncio.get_running_loop()
        began_s, try_s = loop.time(), 0.0
        cause: BaseException | None = None
        while (left_s := began_s + COMMIT_S - loop.time()) > 0:
            consumer = self._consumer
            if consumer is None:
                return
            try_s += COMMIT_TRY_S
            try:
                async with asyncio.timeout(min(try_s, left_s)):
                    await consumer.commit(ours)
                return
            except (CommitFailedError, IllegalStateError):
                return  # the group removed this member: its uncommitted records are delivered again
            except TimeoutError as error:
                cause = error
            except KafkaError as error:
                if not error.retriable:
                    raise translated(error, self._what()) from error
                cause = error
                await asyncio.sleep(_RETRY_S)
        raise BusUnavailableError(
            f"the offsets of group {self._group} could not be committed within {COMMIT_S:g} s"
        ) from cause

    async def close(self) -> None:
        self._reading.set()  # a fetch that waits for the assignment ends; closing is settled before it runs
        await super().close()
        self._held = frozenset()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "group_id": self._group,
            "session_timeout_ms": int(SESSION_TIMEOUT_S * 1000),
            "heartbeat_interval_ms": 500,  # a member learns of a rebalance by heartbeat
            "rebalance_timeout_ms": int(_REBALANCE_TIMEOUT_S * 1000),
            "max_poll_interval_ms": 24 * 3600 * 1000,  # a stage that waits for permits is not dead
        }

    async def _begin(self, consumer: AIOKafkaConsumer) -> None:
        await consumer.start()
        consumer.subscribe(list(self._topics), listener=_Listener(self, consumer))

    async def _getmany(self, max_records: int, timeout_s: float) -> Mapping[KafkaPartition, list[Any]]:
        self._raise_error()
        deadline = asyncio.get_running_loop().time() + timeout_s
        fetched: Mapping[KafkaPartition, list[Any]] = {}
        if not self._reading.is_set() and (coordinator := self._open_consumer()._coordinator) is not None:
            coordinator.check_errors()  # a group that we may not join: getmany() would tell, which is not called before
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s + _GRACE_S):  # getmany() outwaits its timeout during a rebalance
                if not self._reading.is_set():
                    await self._reading.wait()
                    timeout_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
                if self._closed:
                    return {}
                fetched = await super()._getmany(max_records, timeout_s)
        self._raise_error()
        return fetched

    async def _let_go(self) -> None:
        await self.revoked()

    async def _refresh(self) -> None:
        if self._reading.is_set():
            await super()._refresh()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _what(self) -> str:
        return f"group {self._group} on {', '.join(self._topics)}"

    # --- for the listener --------------------------------------------------------------------------------------------

    async def revoked(self) -> None:
        """Release all partitions; the group reassigns them when this returns."""
        held = self._held
        self._reading.clear()
        if held and not self._closed:
            await self._tell(self._on_revoked, held)
        self._held = frozenset()
        self._positions.clear()

    async def assigned(self, consumer: AIOKafkaConsumer, partitions: list[KafkaPartition]) -> None:
        """Take over these partitions at their committed offsets."""
        if self._closed:
            return
        consumer.pause(*partitions)  # reading starts after the callback returns
        self._held = frozenset((partition.topic, partition.partition) for partition in partitions)
        try:
            async with asyncio.timeout(_REBALANCE_TIMEOUT_S):
                for partition in partitions:
                    self._positions[partition.topic, partition.partition] = await consumer.position(partition)
        except (TimeoutError, KafkaError):  # the coordinator is unavailable again
            consumer._coordinator.request_rejoin()
            return
        await self._tell(self._on_assigned, self._held)
        if not self._closed:
            consumer.resume(*partitions)
            self._reading.set()

    async def _tell(self, callback: RebalanceCallback | None, partitions: frozenset[TopicPartition]) -> None:
        if callback is None:
            return
        try:
            await callback(partitions)
        except Exception as error:  # aiokafka would only log it; the next fetch raises it to the caller
            self._error = error
            self._reading.set()


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, member: KafkaMember, consumer: AIOKafkaConsumer) -> None:
        self._member = member
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: set[KafkaPartition]) -> None:
        await self._member.revoked()

    async def on_partitions_assigned(self, assigned: set[KafkaPartition]) -> None:
        await self._member.assigned(self._consumer, sorted(assigned))
