"""Readers and group members of a `MemoryBus`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from bus.errors import BusError
from bus.memory.broker import MemoryBroker
from bus.memory.faults import Faults
from bus.memory.groups import Group
from bus.memory.partition_log import PartitionLog
from bus.port import RebalanceCallback, Record, TopicPartition

_FETCHES_IN_A_ROW = 8  # then `fetch` yields, so that a busy reader does not starve other tasks


class Connection(Protocol):
    """A connection to the broker as its readers see it."""

    client_id: str  # name of the client, for `repr`
    broker: MemoryBroker  # holds the partitions and groups

    @property
    def connected(self) -> bool:
        """Whether the broker runs and this connection reaches it."""

    async def reachable(self) -> None:
        """Wait for the broker. Raises `BusUnavailableError` after the request timeout."""

    def forget(self, reader: MemoryReader) -> None:
        """Remove a closed reader."""


class MemoryReader:
    """A reader of fixed partitions that keeps its own positions."""

    def __init__(self, bus: Connection, starts: list[tuple[PartitionLog, int]]) -> None:
        self._bus = bus
        self._logs: list[PartitionLog] = []
        self._positions: dict[TopicPartition, int] = {}
        self._turn = 0
        self._fetches = 0
        self._waiters: list[asyncio.Future[bool]] = []
        self._closed = False
        self._marks: list[tuple[PartitionLog, Callable[[], int]]] = []
        self._begin(starts)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._bus.client_id} at {self._positions}>"

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        self._fetches += 1
        if self._fetches % _FETCHES_IN_A_ROW == 0:
            await asyncio.sleep(0)  # yields before taking records, so that cancellation loses none
        if self._closed:
            raise BusError("the reader is closed")
        records = self._take(max_records)
        if records or timeout_s <= 0:
            return records
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not records and not self._closed:
            waiter: asyncio.Future[bool] = loop.create_future()
            self._waiters.append(waiter)
            timer = loop.call_at(deadline, _resolve, waiter, True)
            try:
                expired = await waiter
            finally:
                timer.cancel()
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if expired:
                break
            records = self._take(max_records)
        return records

    def position(self, partition: TopicPartition) -> int:
        try:
            return self._positions[partition]
        except KeyError:
            raise BusError(f"{partition[0]}[{partition[1]}] is not read here") from None

    async def seek(self, partition: TopicPartition, offset: int) -> None:
        self.position(partition)
        self._positions[partition] = offset
        self.wake()

    async def lag(self) -> int:
        await self._bus.reachable()
        for log in self._logs:
            if log.gone:
                self._bus.broker.logs(log.spec.name)  # raises
        return sum(max(log.end - log.next_offset(self._positions[log.tp]), 0) for log in self._logs)

    async def close(self) -> None:
        self.shut()

    def shut(self) -> None:
        """Synchronous `close`."""
        if not self._closed:
            self._closed = True
            self._end()
            self._bus.forget(self)
            self.wake()

    def wake(self) -> None:
        """Wake waiting fetches: new records may be available."""
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                _resolve(waiter, False)

    def _begin(self, starts: list[tuple[PartitionLog, int]]) -> None:
        for log, offset in starts:
            self._logs.append(log)
            self._positions[log.tp] = offset
            log.followers.append(self)
            self._mark(log)
        self._turn = 0

    def _end(self) -> None:
        for log in self._logs:
            log.followers.remove(self)
        for log, mark in self._marks:
            self._bus.broker.unfollow(log, mark)
        self._marks.clear()
        self._logs.clear()

    def _mark(self, log: PartitionLog) -> None:
        mark = partial(self._positions.__getitem__, log.tp)
        self._marks.append((log, mark))
        self._bus.broker.follow(log, mark)

    def _take(self, limit: int) -> list[Record]:
        if not self._bus.connected:
            return []
        logs = self._logs
        taken: list[Record] = []
        positions = self._positions
        for step in range(len(logs)):
            log = logs[(self._turn + step) % len(logs)]
            position = positions[log.tp]
            if position == log.visible or log.gone:
                continue
            records = log.read(position, limit - len(taken))
            if records:
                positions[log.tp] = records[-1].offset + 1
                taken = records if not taken else taken + records
                if len(taken) >= limit:
                    self._turn = (self._turn + step + 1) % len(logs)  # round robin: start behind this partition
                    break
            else:
                positions[log.tp] = log.next_offset(position)
        return taken


class MemoryMember(MemoryReader):
    """A group member: the group assigns its partitions."""

    def __init__(
        self,
        bus: Connection,
        group: Group,
        topics: tuple[str, ...],
        on_assigned: RebalanceCallback | None,
        on_revoked: RebalanceCallback | None,
    ) -> None:
        super().__init__(bus, [])
        self.topics = topics
        self.dead = False
        self._group = group
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._held: frozenset[TopicPartition] = frozenset()
        self._reading = False  # between assigned and revoked
        self._owner = False  # whether the group accepts its commits
        self._error: Exception | None = None  # raised by a callback; the next fetch raises it
        self._callback = asyncio.Lock()

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        faults = self._bus.broker.faults
        if faults is not None and self._reading:
            self._suffer(faults)
        records = await super().fetch(max_records=max_records, timeout_s=timeout_s)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return records

    def assignment(self) -> frozenset[TopicPartition]:
        return self._held

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        await self._bus.reachable()
        faults = self._bus.broker.faults
        if faults is not None and faults.strikes("stale_commit"):
            return
        if self._owner:
            self._group.committed.update({tp: offset for tp, offset in offsets.items() if tp in self._held})

    # --- for the group -----------------------------------------------------------------------------------------------

    async def revoke(self) -> None:
        async with self._callback:
            held = self._held
            self._reading = False
            if held and not self._closed:
                await self._tell(self._on_revoked, held)
            self.forget()
            self._held = frozenset()

    async def assign(self, partitions: list[TopicPartition]) -> None:
        async with self._callback:
            if self._closed or self.dead:
                return
            logs = [self._bus.broker.logs(topic)[number] for topic, number in partitions]
            self._begin([(log, self._group.committed.get(log.tp, log.start)) for log in logs])
            self._held = frozenset(partitions)
            self._owner = True
            await self._tell(self._on_assigned, self._held)
            self._reading = True
            self.wake()

    def forget(self) -> None:
        self._owner = False
        self._reading = False
        self._end()
        self._positions.clear()

    # --- for the bus -------------------------------------------------------------------------------------------------

    def shut(self) -> None:
        if not self._closed:
            super().shut()
            self._held = frozenset()
            self._group.remove(self)

    async def close(self) -> None:
        self.shut()
        if not self._group.members:
            await self._group.dissolve()

    def die(self) -> None:
        """Simulate a killed process: the group removes this member after the session timeout."""
        self._closed = self.dead = True
        self._end()
        self._bus.forget(self)
        self.wake()
        asyncio.get_running_loop().call_later(self._bus.broker.session_timeout_s, self._expire)

    @property
    def expelled(self) -> bool:
        """Whether the group has removed this member."""
        return not self._closed and self not in self._group.members

    def lose(self) -> None:
        """Session timeout while disconnected: the group reassigns the partitions; this member is not notified."""
        if not self._closed:
            self._group.remove(self)

    async def come_back(self) -> None:
        """Rejoin after reconnecting: release the old partitions, then join the group again."""
        await self.revoke()
        if not self._closed and self not in self._group.members:
            self._group.add(self)

    def _expire(self) -> None:
        self.dead = False
        self._group.remove(self)
        self._group.rebalance()

    async def _tell(self, callback: RebalanceCallback | None, partitions: frozenset[TopicPartition]) -> None:
        if callback is None:
            return
        try:
            await callback(partitions)
        except Exception as error:  # the next fetch raises it to the caller
            self._error = error
            self.wake()

    def _mark(self, log: PartitionLog) -> None:
        pass  # retention uses the group's committed offsets instead

    def _take(self, limit: int) -> list[Record]:
        return super()._take(limit) if self._reading and self._error is None else []

    def _suffer(self, faults: Faults) -> None:
        """Inject faults once per fetch: with probability 1, rebalances would otherwise repeat for ever."""
        if faults.strikes("rebalance"):
            self._group.rebalance()
        if self._logs and faults.strikes("redelivery"):
            log = self._logs[faults.random.randrange(len(self._logs))]
            self._positions[log.tp] = self._group.committed.get(log.tp, log.start)


def _resolve(waiter: asyncio.Future[bool], expired: bool) -> None:
    if not waiter.done():
        waiter.set_result(expired)
