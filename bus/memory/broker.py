"""In-process broker: topics, consumer groups and injected faults. `MemoryBus` is a connection to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from bus.errors import BusUnavailableError, UnknownTopicError
from bus.limits import MAX_RECORD_BYTES
from bus.memory.faults import Faults
from bus.memory.groups import Group
from bus.memory.partition_log import COMPACT_FROM, PartitionLog
from bus.port import FoundTopic, TopicPartition
from bus.topic_settings import created_with
from bus.topics import TopicSpec

Latency = float | Callable[[int], float]
"""Seconds, or a function from a record's size in bytes to seconds."""

KEEP_CONSUMED_BYTES = 8 << 20
"""How many bytes of fully consumed records a partition of a data topic keeps."""

REQUEST_TIMEOUT_S = 3.0
"""How long a request waits for an unreachable broker."""

_TRIM_STEPS = 8  # retention runs each time a partition grows by an eighth of what it keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What the partitions of a broker keep."""

    consumed_bytes: int = KEEP_CONSUMED_BYTES  # of fully consumed records, in a partition of a data topic
    control_bytes: int | None = None  # the same in a control topic; None: everything
    stale_records: int = COMPACT_FROM  # in a partition of a compacted topic


DEFAULT_RETENTION = Retention()


class Client(Protocol):
    """A connection as the broker sees it."""

    def reconnected(self) -> None:
        """Called when the broker runs again after a pause."""


class MemoryBroker:
    """Topics, partitions and groups in this process's memory; many `MemoryBus` connections may share one.

    It works on any asyncio loop, virtual time included: it uses only `loop.time()` and timers, no threads and no real
    clock. The calls and the seed of the faults determine the order of all events.

    Retention: topics without `retention_bytes` (control topics) keep everything unless `control_bytes` is set. In
    other topics a partition keeps the records that some reader or group has not consumed yet (all records, for a group
    without a commit), plus the newest `consumed_bytes` of the consumed ones. Beyond `retention_bytes` unread records
    are deleted too, as in Kafka. Compacted topics are compacted as they grow.
    """

    def __init__(
        self,
        *,
        latency_s: Latency = 0.0,
        faults: Faults | None = None,
        wall_clock: Callable[[], float] | None = None,
        retention: Retention = DEFAULT_RETENTION,
        max_record_bytes: int = MAX_RECORD_BYTES,
        session_timeout_s: float = 6.0,
    ) -> None:
        """`latency_s` delays acknowledgement and delivery. `wall_clock` timestamps records (None: the loop's clock).
        `session_timeout_s` is how long a group waits for a disconnected member.
        """
        self.latency_s = latency_s
        self.faults = faults
        self.wall_clock = wall_clock
        self.retention = retention
        self.max_record_bytes = max_record_bytes
        self.session_timeout_s = session_timeout_s
        self.running = True
        self._logs: dict[str, list[PartitionLog]] = {}
        # Kept because readers still refer to them; a new topic of the same name reuses them.
        self._deleted: dict[str, list[PartitionLog]] = {}
        self._groups: dict[str, Group] = {}
        self._clients: list[Client] = []
        self._resumed: list[asyncio.Future[None]] = []
        self._readers: dict[TopicPartition, list[Callable[[], int]]] = {}  # positions of readers without a group

    def __repr__(self) -> str:
        state = "running" if self.running else "paused"
        return f"<MemoryBroker {state}, {len(self._logs)} topics, {len(self._groups)} groups, {len(self._clients)} clients>"

    # --- operator actions ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop, as if killed: posts wait in their senders, fetches return nothing, requests time out."""
        self.running = False

    def resume(self) -> None:
        """Run again, with all records and groups unchanged."""
        self.running = True
        waiting, self._resumed = self._resumed, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
        for client in list(self._clients):
            client.reconnected()

    def rebalance(self, group: str) -> None:
        """Force a group to rebalance, as Kafka may at any time."""
        if group in self._groups:
            self._groups[group].rebalance()

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete the records of a partition before an offset, read or not, as retention does."""
        log = self.logs(topic)[partition]
        log.drop_before(before, -1)
        log.start = max(log.start, min(before, log.end))

    def delete_topic(self, topic: str) -> None:
        """Delete a topic with its records and its committed offsets."""
        logs = self.logs(topic)
        del self._logs[topic]
        self._deleted[topic] = logs
        for log in logs:
            log.gone = True
            for group in self._groups.values():
                group.committed.pop(log.tp, None)

    def bytes_held(self) -> int:
        """Bytes held by all partitions."""
        return sum(log.bytes_held for logs in self._logs.values() for log in logs)

    def committed(self, group: str) -> dict[TopicPartition, int]:
        """The committed offsets of a group, by partition."""
        return dict(self._groups[group].committed) if group in self._groups else {}

    # --- for `MemoryBus` ---------------------------------------------------------------------------------------------

    def create(self, specs: Iterable[TopicSpec]) -> None:
        """Create the topics that are missing."""
        for spec in specs:
            if spec.name in self._logs:
                continue
            logs = self._deleted.pop(spec.name, [])[: spec.partitions]
            for log in logs:
                log.reset(spec)
            logs += [
                PartitionLog(spec, number, self.retention.stale_records) for number in range(len(logs), spec.partitions)
            ]
            self._logs[spec.name] = logs
            for group in self._groups.values():
                if spec.name in group.topics:
                    group.rebalance()

    def logs(self, topic: str) -> list[PartitionLog]:
        """The partitions of a topic, in order. Raises `UnknownTopicError`."""
        try:
            return self._logs[topic]
        except KeyError:
            raise UnknownTopicError(
                f"there is no topic {topic}", remedy="create_topics() makes the topics of the table"
            ) from None

    def found(self, names: Iterable[str] | None) -> list[FoundTopic]:
        """The topics of `names` (None: all topics) that exist."""
        wanted = self._logs if names is None else names
        there = [self._logs[name] for name in sorted(wanted) if name in self._logs]
        return [FoundTopic(logs[0].spec.name, "memory", len(logs), 1, created_with(logs[0].spec)) for logs in there]

    def group(self, name: str) -> Group:
        """The group of this name, created if it is new."""
        if name not in self._groups:
            self._groups[name] = Group(name, lambda topic: len(self._logs.get(topic, ())), self.when_running)
        return self._groups[name]

    async def when_running(self) -> None:
        """Wait until the broker runs."""
        while not self.running:
            future = asyncio.get_running_loop().create_future()
            self._resumed.append(future)
            await future

    def attach(self, client: Client) -> None:
        """Register a connection."""
        self._clients.append(client)

    def detach(self, client: Client) -> None:
        """Remove a connection."""
        if client in self._clients:
            self._clients.remove(client)

    def follow(self, log: PartitionLog, position: Callable[[], int]) -> None:
        """Register a reader without a group: retention keeps what it has not read yet."""
        self._readers.setdefault(log.tp, []).append(position)

    def unfollow(self, log: PartitionLog, position: Callable[[], int]) -> None:
        """Undo `follow`."""
        self._readers[log.tp].remove(position)

    def delay_s(self, size_bytes: int) -> float:
        """The delay of acknowledgement and delivery for a record of this size."""
        latency_s = self.latency_s
        delay_s = latency_s(size_bytes) if callable(latency_s) else latency_s
        if self.faults is not None and self.faults.strikes("late"):
            delay_s += self.faults.random.random() * self.faults.late_s
        return delay_s

    def trim(self, log: PartitionLog) -> None:
        """Apply retention or compaction to a partition that has grown."""
        if log.spec.compacted:
            log.compact()
            return
        limit_bytes = log.spec.retention_bytes
        keep_bytes = (
            self.retention.control_bytes if limit_bytes < 0 else min(self.retention.consumed_bytes, limit_bytes)
        )
        if keep_bytes is None:
            log.trim_at = 1 << 62
            return
        if log.bytes_held <= keep_bytes:
            log.trim_at = keep_bytes
            return
        consumers = [position() for position in self._readers.get(log.tp, ())]
        consumers += [
            group.committed.get(log.tp, log.start) for group in self._groups.values() if log.spec.name in group.topics
        ]
        if consumers:
            log.drop_before(min(consumers), keep_bytes)
        if limit_bytes >= 0:
            log.drop_before(log.end, limit_bytes)
        log.trim_at = log.bytes_held + max(keep_bytes // _TRIM_STEPS, 1)

    def unavailable(self) -> BusUnavailableError:
        """The error of a request that could not reach the broker."""
        return BusUnavailableError("the broker does not answer", remedy="resume() the broker, or reconnect() the bus")
