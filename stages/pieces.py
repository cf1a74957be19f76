"""One piece of a model: consecutive layers, loaded into the runtime."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

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

    @contextlib.contextmanager
    def runner(self, may_grow: Callable[[Piece], bool]) -> Iterator[SegmentRunner]:
        """An interpreter for this thread alone; waits for one, or adds one if `may_grow`."""
        found: SegmentRunner | None = None
        with self._changed:
            if self._keep and not self._idle and may_grow(self):
                self.loaded += 1
            elif self._keep:
                self._changed.wait_for(lambda: self._idle)
                found = self._idle.pop()
        runner = found or self._load()
        try:
            yield runner
        finally:
            if self._keep:
                with self._changed:
                    self._idle.append(runner)
                    self._changed.notify()
