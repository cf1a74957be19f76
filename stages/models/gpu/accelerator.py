"""Which segments run on the GPU, and which on the CPU and why.

A segment runs on the GPU only after its results on random inputs agreed with those of the CPU: some drivers compute wrong
numbers without an error, for example for a fully-connected layer that flattens its input itself. A segment in doubt runs on
the CPU, and a sample that the GPU fails to compute is computed again on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import structlog

from bus.errors import ModelError
from bus.tensors import Array
from bus.values import ModelProfile, TensorSpec
from stages.models.difference import relative_difference
from stages.models.gpu.batched_files import BatchedFiles
from stages.models.gpu.gpu_profile import on_cpu, on_gpu
from stages.models.gpu.normalization import for_gpu
from stages.models.gpu.process import LONGEST_RUN_S, GpuEndedError, GpuFaultError, GpuProcess
from stages.models.gpu.segment_file import SegmentFile, batchable, unsuited
from stages.models.model import Model
from stages.models.random_samples import random_sample
from stages.models.segments.segment import OnWait, Segment, SegmentKey
from stages.models.segments.store import SegmentStore
from stages.models.slicer import SlicedPart, slice_model

log = structlog.get_logger("gpu")

CHECKS = 4
"""Random inputs on which GPU and CPU must agree."""

MEASURE_S = 0.5
"""Time for measuring one size of batch of a whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorOptions:
    """When a segment runs on the GPU."""

    tolerance: float = 1e-4  # largest difference from the CPU, relative to the largest value of the tensor
    only_if_faster: bool = False  # use the CPU where it computes the segment faster
    batches: tuple[int, ...] = (8,)  # sizes of batches to try beside single samples
    most_segments: int = 32  # segments on the GPU at a time
    most_bytes: int = 4 << 30  # weights of all segments on the GPU; each size of batch has its own copy


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a segment runs."""

    files: BatchedFiles | None  # on the GPU; None: the segment runs on the CPU
    reason: str = ""  # why it runs on the CPU


class RunsSegment(Protocol):
    """What a station needs of a segment, on the CPU or on the GPU."""

    @property
    def waited_s(self) -> float:
        """Total time for which other samples delayed those of this segment."""

    @property
    def idle(self) -> bool:
        """Whether `run` would start at once and is short."""

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Compute one sample."""

    def run_batch(self, samples: Sequence[Sequence[Array]], on_wait: OnWait | None = None) -> list[list[Array]]:
        """Compute several samples together; only where batches of the segment were found to be right.

        `on_wait` receives the seconds for which other calls delayed this one; without it, `waited_s` counts them.
        """

    def release(self) -> None:
        """Tell the store that the segment is out of use."""


class Accelerator:
    """The segments of all models of a node, on one GPU. All methods are thread-safe."""

    def __init__(
        self,
        options: AcceleratorOptions,
        process: GpuProcess | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._options = options
        self._process = process or GpuProcess()
        self._clock = clock
        self._placed: dict[SegmentKey, Placed] = {}
        self._unbatched: set[SegmentKey] = set()  # segments whose batches caused a fault
        self._users: dict[SegmentKey, int] = {}  # stations of each segment
        self._looking = threading.Lock()  # guards `_placed` and `_users`; held briefly
        self._preparing = threading.Lock()  # serializes loading; held for seconds

    @property
    def tolerance(self) -> float:
        """Largest difference from the CPU, relative to the largest value of a tensor."""
        return self._options.tolerance

    def is_ready(self, model: str, begin: int, end: int) -> bool:
        """Whether it is known where the segment runs."""
        return self._find((model, begin, end)) is not None

    def prepare(self, store: SegmentStore, begin: int, end: int) -> None:
        """Load a segment, check it and decide where it runs. Takes seconds: call it in a thread."""
        name = (store.model.name, begin, end)
        with self._preparing:
            if self._find(name) is not None:
                return
            segment = store.get(begin, end)
            try:
                placed = self._try(segment, store)
            except (GpuFaultError, OSError) as error:
                placed = Placed(None, str(error))
            finally:
                segment.release()
            self._place(name, placed)

    def segment(self, model: str, cpu: Segment) -> RunsSegment:
        """The segment on the GPU if it passed its check, else the given one."""
        name = (model, cpu.begin, cpu.end)
        placed = self._find(name)
        if placed is None or placed.files is None:
            return cpu
        with self._looking:
            self._users[name] = self._users.get(name, 0) + 1
        return _GpuSegment(self, name, cpu)

    def holds(self, model: str, begin: int, end: int) -> bool:
        """Whether the segment runs on the GPU."""
        placed = self._find((model, begin, end))
        return placed is not None and placed.files is not None

    def profile(self, profile: ModelProfile, store: SegmentStore) -> ModelProfile:
        """The GPU's profile, made from the CPU's, if it computes the whole model; measuring takes about a second.

        Else the CPU's and the reason, since a segment with a layer that the GPU does not compute runs on the CPU.
        """
        name = (store.model.name, 0, store.model.graph.depth)
        self.prepare(store, *name[1:])
        placed = self._find(name)
        if placed is None or placed.files is None:
            return on_cpu(profile, placed.reason if placed is not None else "the GPU process ended")
        try:
            return on_gpu(profile, placed.files.measure(MEASURE_S, self._clock))
        except GpuFaultError as error:
            if not isinstance(error, GpuEndedError):  # else another segment ended the process
                self._place(name, Placed(None, str(error)))
            return on_cpu(profile, str(error))

    def placements(self) -> dict[SegmentKey, Placed]:
        """Where each known segment runs."""
        with self._looking:
            return dict(self._placed)

    def close(self) -> None:
        """End the GPU process."""
        self._process.close()

    # --- called by segments ---------------------------------------------------------------------------------------

    def compute(
        self,
        name: SegmentKey,
        cpu: Segment,
        samples: Sequence[Sequence[Array]],
        on_wait: Callable[[float], None],
    ) -> list[list[Array]] | None:
        """The results of the GPU; None if the CPU has to compute the samples."""
        placed = self._find(name)
        if placed is None or placed.files is None or self._process.loading:
            return None
        if not all(_fits(sample, cpu.inputs) for sample in samples):
            return None  # the CPU reports what is wrong
        try:
            return placed.files.run(samples, on_wait)
        except GpuEndedError:
            return None  # another sample ended the process; the next task loads the segment again
        except GpuFaultError as error:
            self._place(name, Placed(None, str(error)))
            return None

    def most_at_once(self, name: SegmentKey) -> int:
        """The largest batch of a segment on the GPU; 1 if it runs on the CPU."""
        placed = self._find(name)
        return 1 if placed is None or placed.files is None else placed.files.most_at_once

    def released(self, name: SegmentKey) -> None:
        """A station ended."""
        with self._looking:
            self._users[name] -= 1

    # --------------------------------------------------------------------------------------------------------------

    def _find(self, name: SegmentKey) -> Placed | None:
        """Where it runs; None if it must be loaded first, for example after a crash of the GPU process."""
        with self._looking:
            placed = self._placed.get(name)
            if placed is not None and placed.files is not None and not placed.files.loaded:
                del self._placed[name]
                return None
            return placed

    def _place(self, name: SegmentKey, placed: Placed) -> None:
        with self._looking:
            before = self._placed.get(name)
            self._placed[name] = placed
        if before is not None and before.files is not None:
            before.files.unload()
        if placed.files is not None:
            log.info("segment runs on the GPU", **_named(name))
        else:
            say = log.info if self._options.only_if_faster else log.warning
            say("segment runs on the CPU", **_named(name), reason=placed.reason)

    def _try(self, segment: Segment, store: SegmentStore) -> Placed:
        if (reason := unsuited(segment, stateful=store.stateful)) is not None:
            return Placed(None, reason)
        part = for_gpu(slice_model(store.model, segment.begin + 1, segment.end))
        if not self._make_room(part.size_bytes):
            return Placed(None, "the segments in use fill the GPU")
        file = SegmentFile(self._process, segment, part)
        try:
            found = self._check(file, segment)
        except (GpuFaultError, ModelError) as error:
            found = str(error)
        if isinstance(found, str):
            file.unload()
            return Placed(None, found)
        files = BatchedFiles(segment, file, found)
        self._add_batches(files, segment, store, part)
        return Placed(files)

    def _add_batches(self, files: BatchedFiles, segment: Segment, store: SegmentStore, part: SlicedPart) -> None:
        """Load the file for larger batches, as far as there is room and they pay."""
        name = (store.model.name, segment.begin, segment.end)
        if name in self._unbatched or not batchable(segment):
            return
        for batch in self._options.batches:
            if not self._make_room(files.weight_bytes + part.size_bytes):
                return
            if batch * files.times_s[1] > LONGEST_RUN_S:
                return  # the process would be ended for being late
            larger = None
            try:
                larger = SegmentFile(self._process, segment, part, batch)
                reason = files.add(larger, self._options.tolerance, self._clock)
            except (GpuFaultError, OSError) as error:
                if larger is not None:
                    larger.unload()
                self._unbatched.add(name)  # it may have ended the process: the next load tries no batches
                log.warning("segment runs without batches on the GPU", **_named(name), reason=str(error))
                return
            if reason is not None:
                larger.unload()
                log.info("batch size not used on the GPU", **_named(name), reason=reason)

    def _check(self, file: SegmentFile, segment: Segment) -> str | float:
        """Why the CPU has to run the segment; else the seconds that the GPU takes for one sample."""
        took = {"cpu": math.inf, "gpu": math.inf}
        for number in range(CHECKS):
            inputs = random_sample(segment.inputs, number)
            begin_s = self._clock()
            expected = segment.run(inputs)
            middle_s = self._clock()
            (found,) = file.run([inputs])
            took = {
                "cpu": min(took["cpu"], middle_s - begin_s),
                "gpu": min(took["gpu"], self._clock() - middle_s),
            }
            for spec, right, value in zip(segment.outputs, expected, found, strict=True):
                difference = relative_difference(value, right)
                if not difference <= self._options.tolerance:
                    return (
                        f"the GPU's {spec.name} differs from the CPU's by {difference:.2g} of its largest value, "
                        f"more than {self._options.tolerance:g}"
                    )
        if self._options.only_if_faster and took["gpu"] >= took["cpu"]:
            return f"the CPU is faster: {took['cpu'] * 1e3:.3g} ms, the GPU {took['gpu'] * 1e3:.3g} ms"
        return took["gpu"]

    def _make_room(self, wanted_bytes: int) -> bool:
        """Unload segments that no task uses, oldest first, until another one fits."""
        while True:
            with self._looking:
                loaded = {name: placed.files for name, placed in self._placed.items() if placed.files is not None}
                used_bytes = sum(files.weight_bytes for files in loaded.values())
                fits = used_bytes + wanted_bytes <= self._options.most_bytes
                if fits and len(loaded) < self._options.most_segments:
                    return True
                idle = next((name for name in loaded if not self._users.get(name)), None)
                if idle is None:
                    return False
                del self._placed[idle]
            loaded[idle].unload()


@contextlib.contextmanager
def accelerated(model: Model, options: AcceleratorOptions) -> Iterator[tuple[SegmentStore, Accelerator]]:
    """The segments of a model, and an accelerator for them; both are closed at the end."""
    store, accelerator = SegmentStore(model), Accelerator(options)
    try:
        yield store, accelerator
    finally:
        accelerator.close()
        store.close()


class _GpuSegment:
    """A segment that runs on the GPU, and on the CPU where the GPU fails."""

    def __init__(self, accelerator: Accelerator, name: SegmentKey, cpu: Segment) -> None:
        self._accelerator, self._name, self._cpu = accelerator, name, cpu
        self._released = False
        self._waited_s = 0.0

    idle = False  # the event loop must not wait for the GPU

    @property
    def waited_s(self) -> float:
        return self._waited_s + self._cpu.waited_s

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return self.run_batch([inputs])[0]

    def run_batch(self, samples: Sequence[Sequence[Array]], on_wait: OnWait | None = None) -> list[list[Array]]:
        """Compute several samples, in the batches that take the least time."""
        found = self._accelerator.compute(self._name, self._cpu, samples, on_wait or self._count_wait)
        return [self._cpu.run_batch([one], on_wait)[0] for one in samples] if found is None else found

    @property
    def most_at_once(self) -> int:
        """The largest batch that pays; 1 after a fault."""
        return self._accelerator.most_at_once(self._name)

    def _count_wait(self, seconds: float) -> None:
        self._waited_s += seconds

    def release(self) -> None:
        self._cpu.release()
        if not self._released:
            self._released = True
            self._accelerator.released(self._name)


def _named(key: SegmentKey) -> dict[str, str]:
    """A segment in the fields of a log event."""
    model, begin, end = key
    return {"model": model, "layers": f"{begin + 1}..{end}"}


def _fits(sample: Sequence[Array], specs: Sequence[TensorSpec]) -> bool:
    return len(sample) == len(specs) and all(
        value.dtype == np.float32 and value.shape == spec.shape for value, spec in zip(sample, specs, strict=True)
    )
