"""The ledger of offsets: which offsets of a consumer may be committed.

Records finish out of order, because tasks do not wait for each other. Each record has a `Receipt`, which is held once for
every piece of work that depends on the record. The committable offset of a partition is that of its oldest open record.
Uncommitted records are delivered again after a crash or a rebalance (at-least-once delivery).
"""

from __future__ import annotations

from collections.abc import Callable

from bus.errors import InvariantError
from bus.port import Record, TopicPartition


class Receipt:
    """Counts the work that still depends on one record."""

    __slots__ = ("_holds", "_open", "offset")

    def __init__(self, still_open: dict[int, int], offset: int) -> None:
        # The partition's open records at the time of this one. After a rebalance the same offset may be delivered again
        # with a new receipt and a new dictionary; this receipt must not close that delivery.
        self._open = still_open
        self._holds = 1
        self.offset = offset

    def hold(self) -> None:
        """Add one piece of work that depends on the record."""
        self._holds += 1

    def release(self) -> None:
        """Remove one piece of work, done or dropped. Raises `InvariantError` where none is left."""
        if self._holds <= 0:
            raise InvariantError(f"the record at offset {self.offset} was released more often than held")
        self._holds -= 1
        if self._holds == 0:
            self._open[self.offset] -= 1
            if not self._open[self.offset]:
                del self._open[self.offset]


class OffsetLedger:
    """The open records of one consumer."""

    def __init__(self, make_receipt: Callable[[dict[int, int], int], Receipt] = Receipt) -> None:
        """`make_receipt` has the parameters of `Receipt`."""
        self._make_receipt = make_receipt
        self._open: dict[TopicPartition, dict[int, int]] = {}  # offset -> number of open receipts
        self._next: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}

    def open(self, record: Record) -> Receipt:
        """Add a record; the returned receipt is held once, by the caller."""
        partition = (record.topic, record.partition)
        still_open = self._open.setdefault(partition, {})
        still_open[record.offset] = still_open.get(record.offset, 0) + 1
        self._next[partition] = max(self._next.get(partition, 0), record.offset + 1)
        return self._make_receipt(still_open, record.offset)

    @property
    def open_records(self) -> int:
        """Number of records with unfinished work."""
        return sum(len(still_open) for still_open in self._open.values())

    def committable(self) -> dict[TopicPartition, int]:
        """Offsets that may be committed and are not committed yet."""
        ready = {}
        for partition, following in self._next.items():
            # The smallest offset, not the first key: a redelivered record was added after newer ones.
            offset = min(self._open[partition], default=following)
            if offset > self._committed.get(partition, -1):
                ready[partition] = offset
        return ready

    def committed(self, offsets: dict[TopicPartition, int]) -> None:
        """Record that these offsets are committed."""
        for partition, offset in offsets.items():
            if partition in self._next:  # else another member has the partition now
                self._committed[partition] = max(offset, self._committed.get(partition, -1))

    def forget(self, partitions: frozenset[TopicPartition]) -> None:
        """Forget partitions that were assigned to another member."""
        for partition in partitions:
            for known in (self._open, self._next, self._committed):
                known.pop(partition, None)
