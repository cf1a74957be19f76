"""Which offsets may be committed: those before the first record whose work is not acknowledged downstream.

A consumer never waits at the head of a partition, so records finish out of order. A `Receipt` stands for one record and is
released once for every piece of work that came out of it; the committable offset of a partition is that of its oldest open
record. What is not committed is delivered again: at least once.
"""

from __future__ import annotations

from bus.errors import InvariantError
from bus.port import Record, TopicPartition


class Receipt:
    """Counts the work that still depends on one record."""

    __slots__ = ("_holds", "_open", "offset")

    def __init__(self, still_open: dict[int, int], offset: int) -> None:
        # The partition's records as they were when this one came: after a rebalance the same offset may come again,
        # under a new receipt, and this one must not close that.
        self._open = still_open
        self._holds = 1
        self.offset = offset

    def hold(self) -> None:
        """One more piece of work depends on the record."""
        self._holds += 1

    def release(self) -> None:
        """One piece of work is done or dropped. Raises `InvariantError` when nothing is left to release."""
        if self._holds <= 0:
            raise InvariantError(f"the record at {self.offset} is released more often than it was held")
        self._holds -= 1
        if self._holds == 0:
            self._open[self.offset] -= 1
            if not self._open[self.offset]:
                del self._open[self.offset]


class OffsetLedger:
    """The open records of one consumer."""

    def __init__(self) -> None:
        self._open: dict[TopicPartition, dict[int, int]] = {}  # offset -> receipts that are open
        self._next: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}

    def open(self, record: Record) -> Receipt:
        """Take a record; its receipt is held once by the caller."""
        partition = (record.topic, record.partition)
        still_open = self._open.setdefault(partition, {})
        still_open[record.offset] = still_open.get(record.offset, 0) + 1
        self._next[partition] = max(self._next.get(partition, 0), record.offset + 1)
        return Receipt(still_open, record.offset)

    @property
    def open_records(self) -> int:
        """Number of records that still have work open."""
        return sum(len(still_open) for still_open in self._open.values())

    def committable(self) -> dict[TopicPartition, int]:
        """What may be committed and has not been."""
        ready = {}
        for partition, following in self._next.items():
            # The smallest, not the first: a record that was delivered again stands behind those that came meanwhile.
            offset = min(self._open[partition], default=following)
            if offset > self._committed.get(partition, -1):
                ready[partition] = offset
        return ready

    def committed(self, offsets: dict[TopicPartition, int]) -> None:
        """Note that these offsets were committed."""
        for partition, offset in offsets.items():
            if partition in self._next:  # else it was given to another member meanwhile
                self._committed[partition] = max(offset, self._committed.get(partition, -1))

    def forget(self, partitions: frozenset[TopicPartition]) -> None:
        """Forget partitions that were assigned to another member."""
        for partition in partitions:
            for known in (self._open, self._next, self._committed):
                known.pop(partition, None)
