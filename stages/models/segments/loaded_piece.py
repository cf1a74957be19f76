"""A loaded piece of a model: consecutive layers with the interpreters that run them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from stages.models.runtime.litert import SegmentRunner
from stages.models.slicer import SlicedPart


class LoadedPiece:
    """Consecutive layers in one interpreter, or in several where tasks overlap and memory allows.

    With `keep` off, every sample loads an interpreter and frees it afterwards. This suits running without the delegate:
    loading then only maps the file, and freeing releases the kernels' scratch memory and the weight pages for the next piece.
    """

    def __init__(self, part: SlicedPart, load: Callable[[], SegmentRunner], size_bytes: int, *, keep: bool) -> None:
        self.reads, self.makes = part.reads, part.makes
        self.size_bytes = size_bytes  # estimated memory of one interpreter
        self.loaded = 1  # number of interpreters
        self._load = load
        self._keep = keep
        first = load()  # also with `keep` off, so that a model that the runtime refuses fails here
        self._idle = [first] if keep else []
        self._waiting = 0  # threads waiting for an interpreter
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether an interpreter is free at this moment."""
        return bool(self._idle)

    def take(self, may_grow: Callable[[LoadedPiece], bool], on_wait: Callable[[float], None]) -> SegmentRunner:
        """Takes an interpreter for the calling thread until `give`; waits for a free one, or loads another if `may_grow`.

        `on_wait` receives the seconds for which other threads delayed this one.
        """
        if not self._keep:
            return self._load()
        try:
            return self._idle.pop()  # `pop` is atomic; a lock would cost as much as running a small piece
        except IndexError:
            begin_s = time.monotonic()
            runner = self._waited_for(may_grow)
            on_wait(time.monotonic() - begin_s)
            return runner

    def _waited_for(self, may_grow: Callable[[LoadedPiece], bool]) -> SegmentRunner:
        with self._changed:
            self._waiting += 1  # before checking `_idle`: `give` first refills `_idle` and then reads `_waiting`
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
        """Returns an interpreter taken with `take`."""
        if self._keep:
            self._idle.append(runner)
            if self._waiting:
                with self._changed:
                    self._changed.notify()
