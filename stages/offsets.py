"""Which offsets may be committed: those before the first record whose work is not acknowledged downstream.

A consumer never waits at the head of a partition, so records finish out of order. A `Receipt` stands for one record and is
released once for every piece of work that came out of it; the committable offset of a partition is that of its oldest open
record. What is not committed is delivered again: at least once.
"""

from __future__ import annotations

from collections import OrderedDict

from bus.port import Record, TopicPartition


class Receipt:
    """One record under way."""

    __slots__ = ("_ledger", "_open", "_partition", "offset")

    def __init__(self, ledger: OffsetLedger, partition: TopicPartition, offset: int) -> None:
        self._ledger = ledger
        self._partition = partition
        self._open = 1
        self.offset = offset

    def hold(self) -> None:
        """One more piece of work depends on the record."""
        self._open += 1

    def release(self) -> None:
        """One piece of work is done, or for nobody."""
        self._open -= 1
        if self._open == 0:
            self._ledger.finish(self._partition, self.offset)


class OffsetLedger:
    """The open records of one consumer."""

    def __init__(self) -> None:
        self._open: dict[TopicPartition, OrderedDict[int, None]] = {}
        self._next: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}

    def open(self, record: Record) -> Receipt:
        """Take a record; its receipt is held once by the caller."""
        partition = (record.topic, record.partition)
        self._open.setdefault(partition, OrderedDict())[record.offset] = None
        self._next[partition] = record.offset + 1
        return Receipt(self, partition, record.offset)

    def finish(self, partition: TopicPartition, offset: int) -> None:
        """All work of a record is done; one of a partition that was taken away is ignored."""
        if partition in self._open:
            self._open[partition].pop(offset, None)

    def committable(self) -> dict[TopicPartition, int]:
        """What may be committed and has not been."""
        ready = {}
        for partition, following in self._next.items():
            offset = next(iter(self._open[partition]), following)
            if offset != self._committed.get(partition):
                ready[partition] = offset
        return ready

    def committed(self, offsets: dict[TopicPartition, int]) -> None:
        """These have been committed."""
        self._committed.update(offsets)

    def forget(self, partitions: frozenset[TopicPartition]) -> None:
        """These partitions are another member's now."""
        for partition in partitions:
            for known in (self._open, self._next, self._committed):
                known.pop(partition, None)
