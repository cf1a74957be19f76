"""One partition of a `MemoryBroker`: records in order, offsets that never change, retention and compaction."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import Protocol

from bus.port import Record, TopicPartition
from bus.topics import TopicSpec

_BY_OFFSET = attrgetter("offset")
COMPACT_FROM = 64
"""A partition is compacted when its record count exceeds twice its keys by this many. A negative number compacts always."""


class Follower(Protocol):
    """A listener for new records of a partition."""

    def wake(self) -> None:
        """New records may be available."""


class PartitionLog:
    """Records `start` .. `end - 1`, minus what compaction took; readers see those before `visible`."""

    __slots__ = (
        "_compact_from",
        "_keys",
        "_records",
        "bytes_held",
        "due",
        "end",
        "followers",
        "gone",
        "partition",
        "spec",
        "start",
        "tp",
        "trim_at",
        "visible",
    )

    def __init__(self, spec: TopicSpec, partition: int, compact_from: int = COMPACT_FROM) -> None:
        self.spec = spec
        self._compact_from = compact_from
        self.partition = partition
        self.tp: TopicPartition = (spec.name, partition)
        self.start = 0  # the first offset that can still be read
        self.end = 0  # the offset of the next record
        self.visible = 0  # records before this offset are delivered
        self.due = 0.0  # earliest loop time at which later records are delivered: keeps them in order
        self.bytes_held = 0
        self.trim_at = 0  # bytes held at which retention runs next
        self.gone = False  # the topic is deleted: nothing is readable until it is created again
        self.followers: list[Follower] = []
        self._records: list[Record] = []
        self._keys: dict[str, int] = {}  # compacted topics only: the last offset of each key

    def __repr__(self) -> str:
        return f"<{self.spec.name}[{self.partition}] {self.start}..{self.end}, {self.bytes_held:,} bytes>"

    def append(self, record: Record) -> None:
        """Append a record whose offset is the current `end`."""
        self._records.append(record)
        self.end = record.offset + 1
        self.bytes_held += held_bytes(record)
        if self.spec.compacted and record.key is not None:
            self._keys[record.key] = record.offset

    def reveal(self, offset: int) -> None:
        """Deliver records before `offset` and notify the followers."""
        if offset > self.visible:
            self.visible = offset
            for follower in self.followers:
                follower.wake()

    def read(self, offset: int, limit: int) -> list[Record]:
        """At most `limit` delivered records from `offset` on; from the earliest if `offset` is out of range."""
        if not self.start <= offset <= self.end:
            offset = self.start
        first = self._index(offset)
        last = min(first + limit, self._index(self.visible))
        return self._records[first:last] if last > first else []

    def next_offset(self, offset: int) -> int:
        """The effective position of a reader: the earliest if out of range, and past a compacted tail."""
        if not self.start <= offset <= self.end:
            return self.start
        first = self._index(offset)
        return offset if first < len(self._records) else max(offset, self.visible)

    def drop_before(self, offset: int, spare_bytes: int) -> None:
        """Delete records before `offset`, oldest first, until at most `spare_bytes` are held."""
        gone = 0
        records = self._records
        while gone < len(records) and self.bytes_held > spare_bytes and records[gone].offset < offset:
            self.bytes_held -= held_bytes(records[gone])
            gone += 1
        if gone:
            self.start = records[gone].offset if gone < len(records) else self.end
            del records[:gone]

    def reset(self, spec: TopicSpec) -> None:
        """Start again, empty, after the topic is created again: offsets begin at 0; followers keep their positions."""
        self.spec = spec
        self.gone = False
        self.start = self.end = self.visible = self.bytes_held = self.trim_at = 0
        self.due = 0.0
        self._records.clear()
        self._keys.clear()

    def compact(self) -> None:
        """Keep the last record of each key, once enough stale ones exist; the pass after also removes tombstones."""
        if len(self._records) < 2 * len(self._keys) + self._compact_from:
            return
        last = len(self._records) - 1  # the newest record stays, as in Kafka's active segment
        kept = []
        for index, record in enumerate(self._records):
            key = record.key
            if index == last or (key is not None and self._keys[key] == record.offset and record.value is not None):
                kept.append(record)
            elif key is not None and self._keys[key] == record.offset:
                del self._keys[key]  # an obsolete tombstone
        self._records = kept
        self.bytes_held = sum(map(held_bytes, kept))

    def _index(self, offset: int) -> int:
        records = self._records
        if not records:
            return 0
        if not self.spec.compacted:  # no gaps: the index is a difference
            return min(max(offset - records[0].offset, 0), len(records))
        return bisect_left(records, offset, key=_BY_OFFSET)


def held_bytes(record: Record) -> int:
    """The size of a record for retention, in bytes."""
    return len(record.value or b"") + len(record.key or "") + sum(len(content) for _, content in record.headers) + 64
