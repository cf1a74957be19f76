"""A segment of a model: consecutive layers, which any thread may run for one sample or for several together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from bus.errors import ConfigError, ModelError
from bus.tensors import Array
from bus.values import TensorSpec
from stages.models.model import Model
from stages.models.segments.loaded_piece import LoadedPiece

SegmentKey: TypeAlias = tuple[str, int, int]
"""Model, begin and end of a segment."""

OnWait: TypeAlias = Callable[[float], None]
"""Receives the seconds for which other calls delayed one."""


class Pieces(Protocol):
    """What a segment uses of the store of its model."""

    model: Model
    small: bool  # its loaded pieces stay loaded
    stateful: bool  # an interpreter is reset before every sample
    changes: int  # a segment looks up its pieces again when this has changed

    def chain(self, begin: int, end: int) -> list[LoadedPiece]:
        """The pieces of layers begin+1..end; loads those that are missing."""

    def joined(self, begin: int, end: int) -> LoadedPiece | None:
        """The joined piece of layers begin+1..end, if it is loaded."""

    def is_ready(self, begin: int, end: int) -> bool:
        """Whether all pieces of layers begin+1..end are loaded."""

    def may_grow(self, piece: LoadedPiece) -> bool:
        """Whether the piece may load another interpreter."""

    def interpreters(self, piece: LoadedPiece) -> int:
        """How many interpreters the piece has, or may get."""

    def released(self, segment: Segment) -> None:
        """Marks the segment as out of use."""


class Segment:
    """Layers begin+1..end, which any thread may run. If begin = end, it returns its inputs."""

    def __init__(self, store: Pieces, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        graph = store.model.graph
        self.inputs: tuple[TensorSpec, ...] = tuple(graph.spec(tensor) for tensor in graph.live(begin))
        self.outputs: tuple[TensorSpec, ...] = tuple(graph.spec(tensor) for tensor in graph.live(end))
        self._reads = tuple(spec.name for spec in self.inputs)
        self._makes = tuple(spec.name for spec in self.outputs)
        self._store = store
        self._chain: tuple[int, list[LoadedPiece]] = (-1, [])  # (store.changes at the lookup, pieces)
        self.waited_s = 0.0  # time that calls of `run` have waited for interpreters that others used

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Computes the tensors that cross `end` from those that cross `begin`, each in the boundary's order.

        Blocks without holding the GIL: call it from a worker thread. A model that keeps state is reset before every sample.
        Raises `ModelError` if the computation fails.
        """
        return self._computed(inputs, 1, self._count_wait)

    def _computed(self, inputs: Sequence[Array], batch: int, on_wait: OnWait) -> list[Array]:
        if len(inputs) != len(self.inputs):
            raise ConfigError(f"{self} takes {len(self.inputs)} tensors, not {len(inputs)}")
        pieces = self._pieces()
        if len(pieces) == 1 and pieces[0].reads == self._reads and pieces[0].makes == self._makes:
            return self._run_piece(pieces[0], inputs, batch, on_wait)
        known = dict(zip(self._reads, inputs, strict=True))
        for piece in pieces:
            made = self._run_piece(piece, [known[name] for name in piece.reads], batch, on_wait)
            known.update(zip(piece.makes, made, strict=True))
        return [known[name] for name in self._makes]

    def run_batch(self, samples: Sequence[Sequence[Array]], on_wait: OnWait | None = None) -> list[list[Array]]:
        """What `run` computes for each of several samples, together; only for segments that passed `check_batches`.

        `on_wait` receives the seconds for which other calls delayed this one; without it, `waited_s` counts them. Raises
        `ModelError` if the computation fails, or if a tensor of any sample has the wrong type or shape.
        """
        on_wait = on_wait or self._count_wait
        if len(samples) == 1:
            return [self._computed(samples[0], 1, on_wait)]
        stacked = [
            _stacked(self, spec, values) for spec, values in zip(self.inputs, zip(*samples, strict=True), strict=True)
        ]
        made = self._computed(stacked, len(samples), on_wait)
        for spec, values in zip(self.outputs, made, strict=True):
            if values.shape != (len(samples), *spec.shape[1:]):
                raise ModelError(str(self), f"the shape of {spec.name} does not follow the number of samples")
        # copies, so that a sample that leaves late does not hold the memory of the whole batch
        return [[values[at : at + 1].copy() for values in made] for at in range(len(samples))]

    def _run_piece(self, piece: LoadedPiece, inputs: Sequence[Array], batch: int, on_wait: OnWait) -> list[Array]:
        # A context manager would cost as much as running a small piece.
        runner = piece.take(self._store.may_grow, on_wait)
        try:
            if self._store.stateful:
                runner.reset()
            return runner.run(inputs, batch)
        finally:
            piece.give(runner)

    def _count_wait(self, seconds: float) -> None:
        self.waited_s += seconds

    @property
    def interpreters(self) -> int:
        """How many samples, or batches, can be computed at the same time."""
        if not self._store.is_ready(self.begin, self.end):
            return 1  # looking would load the missing pieces
        return min(self._store.interpreters(piece) for piece in self._pieces())

    @property
    def idle(self) -> bool:
        """Whether the model is small and every piece of the segment is loaded and has a free interpreter."""
        store = self._store
        if not store.small:
            return False
        if self._chain[0] != store.changes and not store.is_ready(self.begin, self.end):
            return False
        return all(piece.idle for piece in self._pieces())

    def _pieces(self) -> list[LoadedPiece]:
        """The pieces to run. For a small model, whose lookup costs as much as its computation, they are cached.

        A large model's pieces are looked up every time, so that the store can unload them.
        """
        store = self._store
        if not store.small:
            return store.chain(self.begin, self.end)
        changes = store.changes
        if self._chain[0] != changes:
            joined = store.joined(self.begin, self.end)
            self._chain = (changes, store.chain(self.begin, self.end) if joined is None else [joined])
        return self._chain[1]

    def release(self) -> None:
        """Tells the store that this segment is out of use; garbage collection of the segment has the same effect."""
        self._store.released(self)

    def __repr__(self) -> str:
        return f"{self._store.model.name} {self.begin + 1}..{self.end}"


def _stacked(segment: Segment, spec: TensorSpec, values: Sequence[Array]) -> Array:
    """One tensor of several samples. Raises `ModelError` where a sample's differs in type or shape."""
    for value in values:
        if value.shape != spec.shape or value.dtype != spec.dtype:
            raise ModelError(
                str(segment), f"{spec.name} is {spec.dtype} {spec.shape}, not {value.dtype} {value.shape} of a sample"
            )
    return np.concatenate(values)
