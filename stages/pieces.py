"""One piece of a model: consecutive layers, loaded into the runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stages.litert import SegmentRunner
from stages.slicer import SlicedPart


class Piece:
    """Consecutive layers, loaded: one interpreter, more where several tasks meet and memory allows.

    With `keep` off, no interpreter outlives its sample. That is for running without the delegate: loading then only maps the
    file, and what is saved is the kernels' scratch memory and the pages of weights that other pieces need next.
    """

    def __init__(self, part: SlicedPart, load: Callable[[], SegmentRunner], size_bytes: int, *, keep: bool) -> None:
        self.reads, self.makes = part.reads, part.makes
        self.size_bytes = size_bytes  # of memory that one interpreter takes, an estimate
        self.loaded = 1  # interpreters there are
        self._load = load
        self._keep = keep
        first = load()  # also where nothing is kept: a model that the runtime refuses is to be known now
        self._idle = [first] if keep else []
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether an interpreter is free at this moment."""
        return bool(self._idle)

    def take(self, may_grow: Callable[[Piece], bool]) -> SegmentRunner:
        """An interpreter for this thread alone, until `give`; waits for one, or adds one if `may_grow`."""
        if not self._keep:
            return self._load()
        with self._changed:
            if not self._idle and not may_grow(self):
                self._changed.wait_for(lambda: self._idle)
            if self._idle:
                return self._idle.pop()
            self.loaded += 1
        return self._load()

    def give(self, runner: SegmentRunner) -> None:
        """The interpreter is free again."""
        if self._keep:
            with self._changed:
                self._idle.append(runner)
                self._changed.notify()
