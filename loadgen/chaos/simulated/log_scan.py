"""Inspection of `MemoryBroker` partitions: a callback per delivered record, and the offsets at which samples complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bus.errors import ProtocolError
from bus.frames import decode_frame
from bus.memory.partition_log import PartitionLog
from bus.port import Record

Sample = tuple[str, int, int, int]
"""Task, attempt, revision of its plan, sample."""


class Tap:
    """Calls a function for every record of a partition when it is delivered."""

    def __init__(self, log: PartitionLog, tell: Callable[[Record], None]) -> None:
        self._log, self._tell, self._next = log, tell, 0
        log.followers.append(self)

    def wake(self) -> None:
        for record in self._log.read(self._next, 1 << 30):
            self._next = record.offset + 1
            self._tell(record)


class Scan:
    """Offsets at which samples become complete on a partition of a data topic."""

    def __init__(self, log: PartitionLog) -> None:
        self._log = log
        self._next = 0
        self._filled: dict[Sample, int] = {}
        self._order: list[tuple[int, Sample]] = []
        self.whole: set[Sample] = set()

    def go_on(self) -> None:
        """Read the records delivered since the last call."""
        for record in self._log.read(self._next, 1 << 30):
            self._next = record.offset + 1
            try:
                frame = decode_frame(record.value)
            except ProtocolError:
                continue
            for piece in frame.pieces:
                sample = (frame.task_id, frame.attempt, frame.revision, piece.sample)
                filled = self._filled.get(sample, 0)
                if piece.at <= filled:
                    filled = self._filled[sample] = max(filled, piece.at + piece.data.nbytes)
                if filled >= piece.size_bytes and sample not in self.whole:
                    self.whole.add(sample)
                    self._order.append((record.offset, sample))

    def between(self, first: int, end: int) -> Iterable[tuple[int, Sample]]:
        """Samples that became complete at offsets first .. end - 1, with their offsets."""
        return [entry for entry in self._order if first <= entry[0] < end]
