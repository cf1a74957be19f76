"""`MemoryBus`: the in-process bus. The embedded default, and the simulator's bus.

It stores real bytes in real partitions and has real consumer groups; `bus.memory.faults` adds Kafka's failures.
`MemoryBroker` describes retention.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from bus.errors import BusError, BusUnavailableError, MessageTooLargeError
from bus.limits import record_bytes
from bus.memory.broker import REQUEST_TIMEOUT_S, MemoryBroker
from bus.memory.faults import Faults
from bus.memory.partition_log import PartitionLog
from bus.memory.readers import MemoryMember, MemoryReader
from bus.port import FoundTopic, Headers, Position, RebalanceCallback, Record, RecordValue, TopicPartition
from bus.topics import TopicSpec, partition_of

__all__ = ["Faults", "MemoryBroker", "MemoryBus"]

DELIVERY_TIMEOUT_S = 30.0
"""How long a post waits for an unreachable broker before it fails; the record is then not written."""

_SEND_BUFFER_BYTES = 32 << 20  # buffer for records that wait for the broker; when it is full, `post` waits
_POSTS_IN_A_ROW = 32  # then `post` yields, so that a sender in a loop does not starve other tasks

_partition_of = lru_cache(maxsize=1 << 12)(partition_of)


class MemoryBus:
    """One connection to a `MemoryBroker` (a private one by default). Implements `bus.port.Bus`."""

    name = "memory"

    def __init__(
        self,
        broker: MemoryBroker | None = None,
        client_id: str = "deepar",
        *,
        delivery_timeout_s: float = DELIVERY_TIMEOUT_S,
    ) -> None:
        self.broker = broker if broker is not None else MemoryBroker()
        self.client_id = client_id
        self.wall_clock: Callable[[], float] | None = None  # timestamps this client's records; None: the broker's clock
        self._delivery_timeout_s = delivery_timeout_s
        self._attached = False
        self._linked = True  # False: disconnected from the broker
        self._cuts = 0
        self._readers: list[MemoryReader] = []
        self._held: deque[_Post] = deque()  # posts that wait for the broker, oldest first
        self._held_bytes = 0
        self._room: list[asyncio.Future[None]] = []  # posts that wait for buffer space
        self._unacked = 0
        self._settled: list[asyncio.Future[None]] = []  # callers that wait for the last acknowledgement
        self._posts = 0
        self._turn = 0
        self._rejoining: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<MemoryBus {self.client_id} on {self.broker!r}>"

    async def __aenter__(self) -> MemoryBus:
        self._attached = True
        self.broker.attach(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self._attached:
            return
        if self._unacked and self.connected:
            settled = asyncio.get_running_loop().create_future()
            self._settled.append(settled)
            await asyncio.wait([settled], timeout=REQUEST_TIMEOUT_S)
        self._attached = False
        for reader in list(self._readers):
            await reader.close()
        self._fail_held(BusError("the bus is closed"))
        self.broker.detach(self)

    # --- topics ------------------------------------------------------------------------------------------------------

    def beside(self, topic: str, neighbour: str) -> MemoryBus:
        return self

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        await self.reachable()
        self.broker.create(specs)

    async def partitions(self, topic: str) -> int:
        await self.reachable()
        return len(self.broker.logs(topic))

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        await self.reachable()
        return self.broker.found(names)

    async def prepare_topic(self, topic: str) -> None:
        await self.partitions(topic)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        await self.reachable()
        return {log.partition: log.end for log in self.broker.logs(topic)}

    # --- posting -----------------------------------------------------------------------------------------------------

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        self._check_open()
        logs = self.broker.logs(topic)
        if partition is None:
            if key is not None:
                partition = _partition_of(key, len(logs))
            else:
                partition = self._turn = (self._turn + 1) % len(logs)
        elif not 0 <= partition < len(logs):
            raise BusError(f"{topic} has no partition {partition}: it has {len(logs)} partitions")
        data = None if value is None else bytes(value)  # copies mutable buffers only
        size_bytes = record_bytes(len(data or b""), len(key or ""), headers)
        if size_bytes > self.broker.max_record_bytes:
            raise MessageTooLargeError(topic, size_bytes, self.broker.max_record_bytes)
        log = logs[partition]
        if key is None and log.spec.compacted:
            raise BusError(f"{topic} is compacted: a record there needs a key")
        self._posts += 1
        if self._posts % _POSTS_IN_A_ROW == 0:
            await asyncio.sleep(0)
        while self._held_bytes > _SEND_BUFFER_BYTES:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._room.append(room)
            await room
            self._check_open()
        acknowledged: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
        posted = _Post(log, key, data, headers, size_bytes, acknowledged)
        if self.connected and not self._held:
            self._write(posted)
        else:
            self._hold(posted)
        return acknowledged

    async def send(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Position:
        return await (await self.post(topic, value, key=key, partition=partition, headers=headers))

    # --- reading -----------------------------------------------------------------------------------------------------

    async def reader(
        self,
        partitions: Iterable[TopicPartition],
        *,
        start: Literal["start", "end"] | Mapping[TopicPartition, int],
    ) -> MemoryReader:
        self._check_open()
        await self.reachable()
        starts = []
        for topic, number in partitions:
            logs = self.broker.logs(topic)
            if not 0 <= number < len(logs):
                raise BusError(f"{topic} has no partition {number}: it has {len(logs)} partitions")
            log = logs[number]
            if start == "end":
                offset = log.end
            elif start == "start":
                offset = log.start
            else:
                wanted = start.get(log.tp, log.start)
                offset = wanted if log.start <= wanted <= log.end else log.start
            starts.append((log, offset))
        reader = MemoryReader(self, starts)
        self._readers.append(reader)
        return reader

    async def join(
        self,
        topics: Iterable[str],
        *,
        group: str,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
    ) -> MemoryMember:
        self._check_open()
        await self.reachable()
        names = tuple(topics)
        for topic in names:
            self.broker.logs(topic)
        member = MemoryMember(self, self.broker.group(group), names, on_assigned, on_revoked)
        self._readers.append(member)
        self.broker.group(group).add(member)
        return member

    # --- faults on request -------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the broker runs and this client can reach it."""
        return self._linked and self.broker.running

    def disconnect(self) -> None:
        """Disconnect this client; its groups remove it after the session timeout."""
        if self._linked:
            self._linked = False
            self._cuts += 1
            asyncio.get_running_loop().call_later(self.broker.session_timeout_s, self._lose, self._cuts)

    def reconnect(self) -> None:
        """Restore the connection to the broker."""
        if not self._linked:
            self._linked = True
            self.reconnected()

    def kill(self) -> None:
        """Simulate SIGKILL: nothing is flushed, no group is notified, queued records are lost."""
        self._attached = False
        for reader in list(self._readers):
            if isinstance(reader, MemoryMember):
                reader.die()
            else:
                reader.shut()
        self._fail_held(BusError("the process was killed"))
        self.broker.detach(self)

    def reconnected(self) -> None:
        """Write the queued records, oldest first, and resume reading."""
        if not self.connected:
            return
        while self._held:
            held = self._held.popleft()
            self._held_bytes -= held.size_bytes
            if held.timer is not None:
                held.timer.cancel()
            if not held.acknowledged.done():
                self._write(held)
        self._make_room()
        loop = asyncio.get_running_loop()
        for reader in list(self._readers):
            if isinstance(reader, MemoryMember) and reader.expelled:
                task = loop.create_task(reader.come_back())
                self._rejoining.append(task)
                task.add_done_callback(self._rejoining.remove)
            reader.wake()

    # --- for its readers ---------------------------------------------------------------------------------------------

    async def reachable(self) -> None:
        """Wait for the broker. Raises `BusUnavailableError` after the request timeout."""
        self._check_open()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + REQUEST_TIMEOUT_S
        while not self.connected:
            if loop.time() >= deadline:
                raise self.broker.unavailable()
            await asyncio.sleep(0.05)

    def forget(self, reader: MemoryReader) -> None:
        """Remove a closed reader."""
        if reader in self._readers:
            self._readers.remove(reader)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._attached:
            raise BusError("the bus is not open: use it as `async with MemoryBus(...) as bus`")

    def _lose(self, cut: int) -> None:
        if not self._linked and self._cuts == cut:
            for reader in list(self._readers):
                if isinstance(reader, MemoryMember):
                    reader.lose()

    def _write(self, post: _Post) -> None:
        log, key, data, acknowledged = post.log, post.key, post.data, post.acknowledged
        broker = self.broker
        loop = asyncio.get_running_loop()
        now = loop.time()
        wall_clock = self.wall_clock or broker.wall_clock
        timestamp_ms = int((now if wall_clock is None else wall_clock()) * 1000)
        faults = broker.faults
        lost = False
        copies = 1
        if faults is not None:
            if faults.strikes("lost_post"):
                acknowledged.set_exception(BusUnavailableError("the record was not acknowledged"))
                return
            lost = faults.strikes("lost_ack")
            copies += faults.strikes("duplicate")
            if data is not None:
                data = faults.damaged(log.spec.name, key, data)
                copies = copies if data is not None else 0
        offset = log.end
        for _ in range(copies):
            log.append(Record(log.spec.name, log.partition, log.end, timestamp_ms, key, data, post.headers))
        if log.bytes_held > log.trim_at or log.spec.compacted:
            broker.trim(log)
        delay_s = broker.delay_s(post.size_bytes)
        position = Position(log.spec.name, log.partition, offset)
        if delay_s <= 0.0 and log.due <= now:
            log.reveal(log.end)
            _acknowledge(acknowledged, position, lost)
        else:
            log.due = max(log.due, now + delay_s)  # records are delivered in order
            self._unacked += 1
            loop.call_at(log.due, self._deliver, log, log.end, partial(_acknowledge, acknowledged, position, lost))

    def _deliver(self, log: PartitionLog, end: int, acknowledge: partial[None]) -> None:
        log.reveal(end)
        acknowledge()
        self._unacked -= 1
        if not self._unacked:
            settled, self._settled = self._settled, []
            for future in settled:
                if not future.done():
                    future.set_result(None)

    def _hold(self, post: _Post) -> None:
        post.timer = asyncio.get_running_loop().call_later(self._delivery_timeout_s, self._expire)
        self._held.append(post)
        self._held_bytes += post.size_bytes

    def _expire(self) -> None:
        """Fail the oldest queued post: it has waited too long."""
        held = self._held.popleft()
        self._held_bytes -= held.size_bytes
        if not held.acknowledged.done():
            held.acknowledged.set_exception(self.broker.unavailable())
        self._make_room()

    def _fail_held(self, error: BusError) -> None:
        while self._held:
            held = self._held.popleft()
            if held.timer is not None:
                held.timer.cancel()
            if not held.acknowledged.done():
                held.acknowledged.set_exception(error)
                held.acknowledged.exception()  # marks the error as retrieved: the sender may be gone
        self._held_bytes = 0
        self._make_room()

    def _make_room(self) -> None:
        waiting, self._room = self._room, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


@dataclass(slots=True, eq=False)
class _Post:
    """A record that a client posted, and the future that its sender waits on."""

    log: PartitionLog
    key: str | None
    data: bytes | None
    headers: Headers
    size_bytes: int
    acknowledged: asyncio.Future[Position]
    timer: asyncio.TimerHandle | None = None  # fails the post; set while it waits for the broker


def _acknowledge(acknowledged: asyncio.Future[Position], position: Position, lost: bool) -> None:
    if acknowledged.done():  # its sender has gone
        return
    if lost:
        acknowledged.set_exception(BusUnavailableError("the record was not acknowledged; it may have been written"))
    else:
        acknowledged.set_result(position)
