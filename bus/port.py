"""The bus port: what DeePar asks of a message bus, in under a hundred lines of interface.

`MemoryBus` and `KafkaBus` implement it and pass one contract suite. A bus keeps records in topics, topics in partitions,
partitions in order; a reader has a position in each; a member of a group shares partitions with the other members and
commits how far it is. What is not committed is delivered again (at least once).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal, NamedTuple, Protocol

from bus.topics import TopicSpec

Headers = tuple[tuple[str, bytes], ...]
TopicPartition = tuple[str, int]
Payload = bytes | bytearray | memoryview


class Record(NamedTuple):
    """One record as it stands on a topic."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int  # when it was sent, milliseconds since 1970, the sender's clock; no decision reads it
    key: str | None
    value: bytes | None  # None: a tombstone
    headers: Headers = ()


class Position(NamedTuple):
    """Where a record that was sent came to stand."""

    topic: str
    partition: int
    offset: int


class FoundTopic(NamedTuple):
    """A topic as a cluster has it."""

    name: str
    servers: str  # the cluster's bootstrap servers
    partitions: int
    copies: int  # of the partition that has the fewest
    settings: Mapping[str, str]  # by Kafka's names, as far as this user may see them


class Reader(Protocol):
    """Reads the partitions it was given, from where it was told; nobody else is affected."""

    async def fetch(self, *, max_records: int = 500, timeout_s: float = 1.0) -> list[Record]:
        """The next records, in order within each partition; [] when none came in time. Raises `BusError`."""

    def position(self, partition: TopicPartition) -> int:
        """The offset of the next record that `fetch` will return."""

    async def seek(self, partition: TopicPartition, offset: int) -> None:
        """Go on reading at `offset`; a reader may be behind or ahead of it."""

    async def lag(self) -> int:
        """How many records stand between the positions and the ends as they are now; 0: caught up."""

    async def close(self) -> None:
        """Stop. Fetches that wait return []."""


class Member(Reader, Protocol):
    """A reader that shares its topics with a group and commits what it has finished."""

    def assignment(self) -> frozenset[TopicPartition]:
        """The partitions that are this member's at the moment."""

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Everything before these offsets is done. Partitions that are no longer ours are ignored; bounded in time."""


RebalanceCallback = Callable[[frozenset[TopicPartition]], Awaitable[None]]


class Bus(Protocol):
    """A message bus. Use it as an async context manager: entering connects, leaving flushes and closes."""

    name: str  # "memory" or "kafka", for logs and benchmarks

    async def __aenter__(self) -> Bus: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def beside(self, topic: str, neighbour: str) -> Bus:
        """The bus of the site that keeps `topic` for those who use `neighbour`; this one where there are no sites.

        The same object for the same site, so that nobody reads one topic twice.
        """

    async def create_topics(self, specs: Iterable[TopicSpec]) -> None:
        """Create what is missing, at every site that needs it; what exists stays as it is. Raises `BusError`."""

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises `UnknownTopicError`."""

    async def found_topics(self, names: Iterable[str] | None = None) -> list[FoundTopic]:
        """Of these topics those that are there, with their settings; None: all of ours, at every site. Raises `BusError`."""

    async def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will get. Raises `UnknownTopicError`."""

    async def post(
        self,
        topic: str,
        value: Payload | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[Position]:
        """Put a record in line and return what resolves once the bus has acknowledged it (or raises `BusError`).

        Records that one task posts to one partition stay in order. Waits while the send buffer is full. A record that may
        or may not have been written is reported as failed; a caller who must know reads the topic. Raises
        `MessageTooLargeError`, `UnknownTopicError`, `BusUnavailableError`.
        """

    async def send(
        self,
        topic: str,
        value: Payload | None,
        *,
        key: str | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Position:
        """`post`, and wait for the acknowledgement."""

    async def reader(
        self,
        partitions: Iterable[TopicPartition],
        *,
        start: Literal["start", "end"] | Mapping[TopicPartition, int],
    ) -> Reader:
        """Read these partitions from their start, their end, or given offsets (what is gone: the earliest there is)."""

    async def join(
        self,
        topics: Iterable[str],
        *,
        group: str,
        on_assigned: RebalanceCallback | None = None,
        on_revoked: RebalanceCallback | None = None,
    ) -> Member:
        """Join a group; unread partitions begin at their start. `on_revoked` runs before another member gets them."""
