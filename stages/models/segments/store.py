"""A store of loaded pieces of one model, which together run any segment and hold every weight once.

Consecutive *pieces* meet at *bounds*: the useful cuts, and later every position that a placement asks for. A segment (layers
begin+1..end) runs the pieces between its ends, so overlapping segments share pieces and weights. A piece is a `.tflite`
file in the cache that the runtime maps; a small one stays in memory. Splitting a piece copies its weights from the mapped
model, loads both halves, and then removes the piece, so running tasks are not interrupted. In a small model the step from
one piece to the next costs as much as the layers, so the store also loads each of its segments as one joined piece.

A memory budget limits the pieces. Above it, the store removes joined pieces, then merges pieces at bounds that no segment
uses, oldest first, then unloads the least recently used pieces.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from bus.errors import ConfigError
from stages.models.cuts import useful_positions
from stages.models.files.cache import cache_dir
from stages.models.model import Model
from stages.models.runtime.litert import DEFAULT_INTERPRETER, InterpreterOptions
from stages.models.runtime.malloc_trim import give_back, map_large_blocks
from stages.models.runtime.trial_run import trial_folder
from stages.models.sandbox import Sandbox
from stages.models.segments.loaded_piece import LoadedPiece
from stages.models.segments.piece_loader import PieceLoader, weight_factor
from stages.models.segments.segment import Segment
from stages.models.slicer import slice_model

IN_MEMORY_BYTES = 4 << 20
"""Pieces up to this size stay in memory without a file, and keep their interpreter between samples."""

SPARE_BYTES = 24 << 20
"""Minimum memory allowance beyond the weights, so that small models stay within their budget."""

JOINED_BYTES = SPARE_BYTES // 2
"""Share of `SPARE_BYTES` for joined pieces; the rest is for parallel interpreters."""

PROCESS_BYTES = 80 << 20
"""Memory of the Python interpreter, the libraries and the allocator; subtracted from a large model's activation allowance."""

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much memory a store may use, and how many interpreters."""

    budget_bytes: int | None = None  # of all pieces; None derives it from the model
    in_memory_bytes: int = IN_MEMORY_BYTES  # the largest piece without a file
    joined_bytes: int = JOINED_BYTES  # of all joined pieces
    replicas: int = 1  # interpreters of one piece, for as many parallel tasks


class SegmentStore:
    """The pieces of one model in one process; all methods are thread-safe.

    Each piece has at most `limits.replicas` interpreters, if the budget allows.
    `limits.budget_bytes` limits the memory of all pieces; pieces of a segment in use are loaded even beyond it. The default
    is the size of the weights (twice with the delegate, which repacks them) plus a fifth for activations, less the memory of
    the process itself. `sandbox` admits each piece before it is loaded; the default is a new one.
    """

    def __init__(
        self,
        model: Model,
        folder: Path | None = None,
        limits: StoreLimits | None = None,
        *,
        options: InterpreterOptions = DEFAULT_INTERPRETER,
        sandbox: Sandbox | None = None,
    ) -> None:
        self._limits = limits or StoreLimits()
        self.small = model.size_bytes <= IN_MEMORY_BYTES
        if not self.small:
            map_large_blocks()
        self.model = model
        self.stateful = model.graph.stateful
        spare_bytes = max(SPARE_BYTES, model.size_bytes // 5 - PROCESS_BYTES)
        default_bytes = weight_factor(options) * model.size_bytes + spare_bytes
        self.budget_bytes = default_bytes if self._limits.budget_bytes is None else self._limits.budget_bytes
        self._sandbox = sandbox or Sandbox(model, delegate=options.delegate)
        folder = folder or cache_dir("segments", model.sha256[:16])
        self._loader = PieceLoader(model, folder, options, self._sandbox, self._limits.in_memory_bytes)
        self._bounds: list[int] = sorted({0, *useful_positions(model.manifest), model.graph.depth})
        self._asked: OrderedDict[int, None] = OrderedDict()  # bounds added by `prepare`, least recently used first
        self._pieces: OrderedDict[tuple[int, int], LoadedPiece] = OrderedDict()  # least recently used first
        self._joined: OrderedDict[tuple[int, int], LoadedPiece] = OrderedDict()  # small segments, oldest first
        self._segments: weakref.WeakSet[Segment] = weakref.WeakSet()  # in use
        self.changes = 0  # counts changes of bounds and pieces; a segment with another count looks up its pieces again
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"prepare-{model.name}")
        self._looking = threading.Lock()  # guards the tables above; held briefly
        self._preparing = threading.RLock()  # serializes slicing and loading; held for seconds

    def warm(self, say: Say | None = None) -> None:
        """Loads all pieces between the useful cuts, so that a placement at these cuts starts without delay.

        A small model's whole, heads and tails are loaded as joined pieces, too, as far as half of their budget allows.
        """
        with self._sandbox:
            for begin, end in pairwise(list(self._bounds)):
                if say is not None:
                    say(f"preparing {self.model.name} {begin + 1}..{end}")
                self._require(begin, end)
            if self.small:
                self._join_common()
        give_back()

    def _join_common(self) -> None:
        first, *inner, last = self._bounds
        ends = [(first, last), *(pair for cut in inner for pair in ((first, cut), (cut, last)))]
        for begin, end in ends:
            if self._joined_bytes() >= self._limits.joined_bytes // 2:
                return
            if len(self.chain(begin, end)) > 1:
                self._join(begin, end)

    def prepare(self, begin: int, end: int) -> Segment:
        """Makes layers begin+1..end ready and returns them.

        Copying and repacking large weights takes seconds: call it in a thread that runs no tasks. Raises `CutError` if the
        model cannot be cut there, and `ModelError` if the disk is full or the runtime refuses a piece.
        """
        for position in (begin, end):
            self.model.graph.require_cuttable(position)
        if begin > end:
            raise ConfigError(f"a segment cannot begin at position {begin} and end at {end}: give begin <= end")
        segment = Segment(self, begin, end)
        with self._looking:
            self._segments.add(segment)
        with self._preparing, self._sandbox:
            self._split_at(begin)
            self._split_at(end)
            if len(self.chain(begin, end)) > 1 and self.small:
                self._join(begin, end)
            self._trim()
            give_back()
        return segment

    async def ready(self, begin: int, end: int) -> Segment:
        """Runs `prepare` in the store's own thread, so that the event loop and running tasks continue.

        A prepared segment is returned at once: a thread would cost more than a small model's whole computation.
        """
        if self._prepared(begin, end):
            return self.get(begin, end)
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.prepare, begin, end)

    def get(self, begin: int, end: int) -> Segment:
        """Returns the segment immediately; its first `run` loads the pieces that are missing."""
        segment = Segment(self, begin, end)
        with self._looking:
            self._segments.add(segment)
        return segment

    def is_ready(self, begin: int, end: int) -> bool:
        """Whether all pieces of layers begin+1..end are loaded."""
        with self._looking:
            if begin not in self._bounds or end not in self._bounds:
                return False
            return all(pair in self._pieces for pair in self._pairs(begin, end))

    def _prepared(self, begin: int, end: int) -> bool:
        """Whether `prepare` has nothing to do; marks the segment's bounds and joined piece as recently used."""
        if not self.is_ready(begin, end):
            return False
        with self._looking:
            joined = not self.small or len(self._pairs(begin, end)) < 2 or (begin, end) in self._joined
            if joined:
                for position in (begin, end):
                    if position in self._asked:
                        self._asked.move_to_end(position)
                if (begin, end) in self._joined:
                    self._joined.move_to_end((begin, end))
            return joined

    @property
    def loaded_bytes(self) -> int:
        """Estimated memory of the loaded pieces."""
        with self._looking:
            return self._loaded_bytes()

    def close(self) -> None:
        """Unloads all pieces. Segments must not be used afterwards."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        with self._preparing, self._looking:
            self._pieces.clear()
            self._joined.clear()
            self.changes += 1
            self._segments.clear()
        give_back()

    # --- called by segments --------------------------------------------------------------------------------------

    def chain(self, begin: int, end: int) -> list[LoadedPiece]:
        """The pieces of layers begin+1..end; loads those that are missing."""
        with self._looking:
            ends_there = begin in self._bounds and end in self._bounds
            pairs = self._pairs(begin, end)
            found = [self._pieces.get(pair) for pair in pairs]
            for pair in pairs:
                if pair in self._pieces:
                    self._pieces.move_to_end(pair)
        if ends_there and None not in found:
            return [piece for piece in found if piece is not None]
        if ends_there:
            with self._preparing, self._sandbox:
                return [piece or self._require(*pair) for pair, piece in zip(pairs, found, strict=True)]
        with self._preparing:  # a bound of this segment was removed since it was prepared
            self._split_at(begin)
            self._split_at(end)
            return self.chain(begin, end)

    def joined(self, begin: int, end: int) -> LoadedPiece | None:
        """The joined piece of layers begin+1..end of a small model, if it is loaded."""
        with self._looking:
            return self._joined.get((begin, end))

    def may_grow(self, piece: LoadedPiece) -> bool:
        """Whether the piece may load another interpreter."""
        return piece.loaded < self._limits.replicas and self.loaded_bytes + piece.size_bytes <= self.budget_bytes

    def interpreters(self, piece: LoadedPiece) -> int:
        """How many interpreters the piece has, or may get."""
        more = max(0, self.budget_bytes - self.loaded_bytes) // max(1, piece.size_bytes)
        return min(self._limits.replicas, piece.loaded + more)

    def activation_bytes(self, begin: int, end: int) -> int:
        """Estimated memory of one sample's tensors while layers begin+1..end are computed."""
        with self._looking:
            pairs = self._pairs(begin, end)
        return max(self._loader.tensor_bytes(*pair) for pair in pairs)

    def try_batch(self, begin: int, end: int, batch: int) -> None:
        """Computes a batch in the sandbox. Raises `ModelError` where that crashes or does not end."""
        if not self.model.trusted:
            part = slice_model(self.model, begin + 1, end)
            with self._sandbox, tempfile.NamedTemporaryFile(suffix=".tflite", dir=trial_folder()) as copy:
                for chunk in part.chunks():
                    copy.write(chunk)
                copy.flush()
                self._sandbox.admit(part, Path(copy.name), batch)

    def released(self, segment: Segment) -> None:
        """Marks the segment as out of use, so that its bounds may be removed."""
        with self._looking:
            self._segments.discard(segment)

    # --- pieces and bounds ---------------------------------------------------------------------------------------

    def _loaded_bytes(self) -> int:
        pieces = (*self._pieces.values(), *self._joined.values())
        return sum(piece.size_bytes * piece.loaded for piece in pieces)

    def _joined_bytes(self) -> int:
        return sum(piece.size_bytes * piece.loaded for piece in self._joined.values())

    def _pairs(self, begin: int, end: int) -> list[tuple[int, int]]:
        inner = self._bounds[bisect_left(self._bounds, begin) : bisect_right(self._bounds, end)]
        return list(pairwise(inner))

    def _require(self, begin: int, end: int) -> LoadedPiece:
        """Returns the piece between two adjacent bounds; loads it if needed."""
        with self._preparing:
            with self._looking:
                piece = self._pieces.get((begin, end))
            if piece is None:
                piece = self._loader.load(begin, end)
                with self._looking:
                    self._pieces[begin, end] = piece
                    self.changes += 1
            return piece

    def _join(self, begin: int, end: int) -> None:
        """Loads a small segment as one joined piece, to save the steps between interpreters."""
        with self._looking:
            known = (begin, end) in self._joined
            if known:
                self._joined.move_to_end((begin, end))
        if known:
            return
        piece = self._loader.load(begin, end)
        with self._looking:
            self._joined[begin, end] = piece
            while self._joined_bytes() > self._limits.joined_bytes:
                self._joined.popitem(last=False)
            self.changes += 1

    def _split_at(self, position: int) -> None:
        """Adds a bound: loads both halves of the piece around it, then replaces the piece."""
        with self._looking:
            if position in self._bounds:
                if position in self._asked:
                    self._asked.move_to_end(position)
                return
            at = bisect_left(self._bounds, position)
            begin, end = self._bounds[at - 1], self._bounds[at]
            was_loaded = (begin, end) in self._pieces
        halves = {}
        if was_loaded:
            halves = {pair: self._loader.load(*pair) for pair in ((begin, position), (position, end))}
        with self._looking:
            insort(self._bounds, position)
            self.changes += 1
            self._asked[position] = None
            self._pieces.update(halves)
            self._pieces.pop((begin, end), None)
        self._loader.delete(begin, end)

    def _trim(self) -> None:
        """Frees memory until the budget holds: joined pieces first, then pieces at unused bounds, then unused pieces."""
        while self.loaded_bytes > self.budget_bytes:
            with self._looking:
                if self._joined:
                    self._joined.popitem(last=False)
                    self.changes += 1
                    continue
                used = {position for segment in self._segments for position in (segment.begin, segment.end)}
                stale = next((position for position in self._asked if position not in used), None)
            if stale is not None:
                self._join_at(stale)
                continue
            with self._looking:
                needed = {pair for segment in self._segments for pair in self._pairs(segment.begin, segment.end)}
                idle = next((pair for pair in self._pieces if pair not in needed), None)
                if idle is None:
                    return
                del self._pieces[idle]
                self.changes += 1
            self._loader.delete(*idle)

    def _join_at(self, position: int) -> None:
        """Removes a bound. If a segment in use spans it, the merged piece is loaded before the halves are removed."""
        with self._looking:
            at = self._bounds.index(position)
            begin, end = self._bounds[at - 1], self._bounds[at + 1]
            spanned = any(segment.begin < position < segment.end for segment in self._segments)
        joined = self._loader.load(begin, end) if spanned else None
        with self._looking:
            self._bounds.remove(position)
            self.changes += 1
            del self._asked[position]
            for pair in ((begin, position), (position, end)):
                self._pieces.pop(pair, None)
            if joined is not None:
                self._pieces[begin, end] = joined
        for pair in ((begin, position), (position, end)):
            self._loader.delete(*pair)
