"""One piece of a model: consecutive layers, loaded into the runtime."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import SlicedPart


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
        self._waiting = 0  # threads that wait for one
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether an interpreter is free at this moment."""
        return bool(self._idle)

    def take(self, may_grow: Callable[[Piece], bool]) -> SegmentRunner:
        """An interpreter for this thread alone, until `give`; waits for one, or adds one if `may_grow`."""
        if not self._keep:
            return self._load()
        try:
            return self._idle.pop()  # one step of Python's: a lock would cost as much as a small piece's work
        except IndexError:
            return self._waited_for(may_grow)

    def _waited_for(self, may_grow: Callable[[Piece], bool]) -> SegmentRunner:
        with self._changed:
            self._waiting += 1  # before the look: `give` puts back before it looks here
            try:
                while True:
                    with contextlib.suppress(IndexError):
                        return self._idle.pop()
                    if may_grow(self):
                        self.loaded += 1
                        break
                    self._changed.wait()
            finally:
                self._waiting -= 1
        return self._load()

    def give(self, runner: SegmentRunner) -> None:
        """The interpreter is free again."""
        if self._keep:
            self._idle.append(runner)
            if self._waiting:
                with self._changed:
                    self._changed.notify()
