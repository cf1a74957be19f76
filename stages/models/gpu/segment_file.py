"""A segment's file in the GPU process, for batches of a fixed size."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from bus.tensors import Array
from stages.models.gpu.part_for_batch import part_for_batch
from stages.models.gpu.process import GpuProcess
from stages.models.runtime.trial_run import trial_folder
from stages.models.segments.segment import Segment
from stages.models.slicer import SlicedPart


class SegmentFile:
    """Computes up to `batch` samples at a time. The constructor loads the file, which takes seconds.

    All methods raise `GpuFaultError`. A segment that reads its inputs only to pass them on does not send them to the GPU.
    """

    def __init__(self, process: GpuProcess, segment: Segment, part: SlicedPart, batch: int = 1) -> None:
        """`part` is the segment's slice, for one sample."""
        specs = {spec.name: spec for spec in (*segment.inputs, *segment.outputs)}
        self._reads, self._makes = (tuple(specs[name] for name in names) for names in (part.reads, part.makes))
        self._inputs, self._outputs = ([spec.name for spec in side] for side in (segment.inputs, segment.outputs))
        self._process = process
        self.batch = batch
        self.weight_bytes = part.size_bytes
        inputs, outputs = ([_batched(spec.shape, batch) for spec in side] for side in (self._reads, self._makes))
        with file_of(part_for_batch(part, batch)) as path:
            self._key = process.load(path, inputs, outputs)

    @property
    def loaded(self) -> bool:
        """Whether the process that loaded it still runs."""
        return self._process.holds(self._key)

    def run(
        self, samples: Sequence[Sequence[Array]], on_wait: Callable[[float], None] = lambda _: None
    ) -> list[list[Array]]:
        """The segment's outputs for each sample. `on_wait` receives the seconds for which other batches delayed this one."""
        known = [dict(zip(self._inputs, sample, strict=True)) for sample in samples]
        parts: list[Array] = []
        for spec in self._reads:
            parts += [values[spec.name] for values in known]
            parts += [_padding(spec.shape)] * (self.batch - len(samples))
        results = self._process.run(self._key, parts, on_wait)
        ends = np.cumsum([0, *(self.batch * math.prod(spec.shape) for spec in self._makes)])
        for spec, begin, end in zip(self._makes, ends[:-1], ends[1:], strict=True):
            rows = results[begin:end].reshape(self.batch, -1)
            for values, row in zip(known, rows, strict=False):  # the last rows are padding
                values[spec.name] = row.reshape(spec.shape)
        return [[values[name] for name in self._outputs] for values in known]

    def unload(self) -> None:
        """Free its device memory."""
        self._process.unload(self._key)


@contextlib.contextmanager
def file_of(part: SlicedPart) -> Iterator[Path]:
    """A temporary file with the part."""
    with tempfile.NamedTemporaryFile(suffix=".tflite", dir=trial_folder()) as copy:
        for chunk in part.chunks():
            copy.write(chunk)
        copy.flush()
        yield Path(copy.name)


def batchable(segment: Segment) -> bool:
    """Whether every input and output has a first dimension of 1, which may stand for samples."""
    return all(spec.shape[:1] == (1,) for spec in (*segment.inputs, *segment.outputs))


def unsuited(segment: Segment, *, stateful: bool) -> str | None:
    """Why a segment of a model that does or does not keep state cannot run on the GPU; None if it may."""
    if segment.begin == segment.end:
        return "it has no layers"
    if stateful:
        return "the model keeps state"
    other = sorted({spec.dtype for spec in (*segment.inputs, *segment.outputs)} - {"float32"})
    return f"its inputs or outputs are {', '.join(other)}; the GPU takes float32" if other else None


def _batched(shape: tuple[int, ...], batch: int) -> list[int]:
    return list(shape) if batch == 1 else [batch, *shape[1:]]


@lru_cache(maxsize=16)
def _padding(shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.float32(0.0), shape)
