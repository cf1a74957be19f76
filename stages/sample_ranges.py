"""Which samples of an attempt a stage has finished, as ranges of numbers.

Samples finish nearly in order, so a few ranges hold millions of them. A stage that takes over in the middle of a session has
a gap in front, and a sample that is sent again after later ones closes its gap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class SampleRanges:
    """A set of sample numbers that needs memory for its gaps only."""

    def __init__(self) -> None:
        self._begins: list[int] = []  # of the ranges, ascending; neighbours do not touch
        self._ends: list[int] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, sample: int) -> bool:
        at = bisect_right(self._begins, sample) - 1
        return at >= 0 and sample < self._ends[at]

    @property
    def ranges(self) -> int:
        """Number of ranges: the memory that the set needs."""
        return len(self._begins)

    def update(self, samples: Iterable[int]) -> None:
        """Add samples."""
        for sample in samples:
            self.add(sample)

    def add(self, sample: int) -> None:
        """Add one sample; without effect if it is there."""
        at = bisect_right(self._begins, sample)  # of the first range behind the sample
        if at and sample < self._ends[at - 1]:
            return
        self._count += 1
        extends = at > 0 and self._ends[at - 1] == sample
        reaches = at < len(self._begins) and self._begins[at] == sample + 1
        if extends and reaches:
            self._ends[at - 1] = self._ends.pop(at)
            del self._begins[at]
        elif extends:
            self._ends[at - 1] = sample + 1
        elif reaches:
            self._begins[at] = sample
        else:
            self._begins.insert(at, sample)
            self._ends.insert(at, sample + 1)
