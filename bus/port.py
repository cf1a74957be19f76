"""Bus port: the interface of a message bus.

`MemoryBus` and `KafkaBus` implement it and pass the same contract tests. A topic has partitions, and a partition holds
records in order. A reader has a position in each of its partitions. The members of a group share the partitions of its
topics and commit their positions; records after the committed position are delivered again (at least once).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

from bus.topics import TopicSpec

Headers = tuple[tuple[str, bytes], ...]
TopicPartition = tuple[str, int]
RecordValue = bytes | bytearray | memoryview


class Record(NamedTuple):
    """One record of a topic."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int  # milliseconds since 1970, usually on the sender's clock; no decision reads it
    key: str | None
    value: bytes | None  # None: a tombstone
    headers: Headers = ()


class Position(NamedTuple):
    """The place at which the bus stored a record."""

    topic: str
    partition: int
    offset: int


class FoundTopic(NamedTuple):
    """A topic that exists on a cluster."""

    name: str
    servers: str  # the cluster's bootstrap servers
    partitions: int
    copies: int  # replicas of the partition that has the fewest
    settings: Mapping[str, str]  # by Kafka's names; only settings that this user may see


class Reader(Protocol):
    """Reads fixed partitions from given positions, independently of other readers."""

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        """The next records, in order within each partition; [] if none arrived in time. Raises `BusError`."""

    def position(self, partition: TopicPartition) -> int:
        """The offset of the next record that `fetch` will return."""

    async def seek(self, partition: TopicPartition, offset: int) -> None:
        """Continue at `offset`, which may be before or after the current position."""

    async def lag(self) -> int:
        """Number of records between the positions and the current ends; 0: the reader has read everything."""

    async def close(self) -> None:
        """Close the reader. Waiting fetches return []."""


class Member(Reader, Protocol):
    """A reader that shares its topics with the other members of a group and commits its positions."""

    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions that are currently assigned to this member."""

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Commit these positions within a bounded time. Partitions that are no longer assigned are ignored."""


RebalanceCallback = Callable[[frozenset[TopicPartition]], Awaitable[None]]


class Bus(Protocol):
    """A message bus. Use it as an async context manager: entering connects, leaving flushes and closes."""

    name: str  # "memory" or "kafka", for logs and benchmarks

    async def __aenter__(self) -> Bus: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def beside(self, topic: str, neighbour: str) -> Bus:
        """The bus of the site that holds `topic` for the users of `neighbour`; this bus if there is only one site.

        Returns the same object for the same site, so that callers can avoid reading a topic twice.
        """

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        """Create the missing topics at every site that needs them; existing topics stay unchanged. Raises `BusError`."""

    async def partitions(self, topic: str) -> int:
        """Number of partitions of a topic. Raises `UnknownTopicError`."""

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        """The existing topics of `names` with their settings; None: of the whole table, at every site. Raises `BusError`."""

    async def prepare_topic(self, topic: str) -> None:
        """Fetch what the first record for a topic would wait for. Raises `UnknownTopicError`, `BusUnavailableError`."""

    async def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will get. Raises `UnknownTopicError`."""

    async def post(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        """Queue a record; the returned awaitable resolves when the bus has acknowledged it, or raises `BusError`.

        Records that one task posts to one partition stay in order. Waits while the send buffer is full. A record that may
        have been written is reported as failed; a caller that must be certain reads the topic. Raises `MessageTooLargeError`,
        `UnknownTopicError`, `BusUnavailableError`.
        """

    async def send(
        self,
        topic: str,
        value: RecordValue | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Position:
        """Post a record and wait for its acknowledgement."""

    async def reader(
        self,
        partitions: Iterable[TopicPartition],
        *,
        start: Literal["start", "end"] | Mapping[TopicPartition, int],
    ) -> Reader:
        """A reader of these partitions from their start, their end, or given offsets (a deleted offset: the earliest one)."""

    async def join(
        self,
        topics: Iterable[str],
        *,
        group: str,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
    ) -> Member:
        """Join a group. Without a committed position reading begins at the start. `on_revoked` runs before reassignment."""
