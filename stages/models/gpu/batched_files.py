"""The files of one segment in the GPU process, each for batches of another size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from bus.tensors import Array
from stages.models.difference import relative_difference
from stages.models.gpu.segment_file import SegmentFile
from stages.models.random_samples import random_sample
from stages.models.segments.segment import Segment

PAYS = 1.1
"""A larger batch is used if it makes a sample at least this many times as fast."""


class BatchedFiles:
    """Runs any number of samples in the batches that take the least time. Methods raise `GpuFaultError`."""

    def __init__(self, segment: Segment, alone: SegmentFile, took_s: float) -> None:
        """`alone` takes `took_s` for its one sample."""
        self._segment = segment
        self._files = [(alone, took_s)]  # with the time of a batch

    @property
    def loaded(self) -> bool:
        """Whether the process that loaded them still runs."""
        return all(file.loaded for file, _ in self._files)

    @property
    def weight_bytes(self) -> int:
        """The weights of all files."""
        return sum(file.weight_bytes for file, _ in self._files)

    @property
    def most_at_once(self) -> int:
        """The largest batch."""
        return max(file.batch for file, _ in self._files)

    @property
    def times_s(self) -> dict[int, float]:
        """The time of each size of batch, as measured when it was loaded."""
        return {file.batch: took_s for file, took_s in self._files}

    def add(self, file: SegmentFile, tolerance: float, clock: Callable[[], float]) -> str | None:
        """Use a file for a larger batch, if it is right and faster; returns why it is not used.

        Each sample of a batch must have the results that it has alone, within the tolerance.
        """
        samples = [random_sample(self._segment.inputs, number) for number in range(file.batch)]
        alone, took_alone_s = self._files[0]
        right = [alone.run([sample])[0] for sample in samples]
        took_s = float("inf")
        for _ in range(2):
            begin_s = clock()
            found = file.run(samples)
            took_s = min(took_s, clock() - begin_s)
        pairs = [pair for one, other in zip(found, right, strict=True) for pair in zip(one, other, strict=True)]
        difference = max(relative_difference(*pair) for pair in pairs)
        if not difference <= tolerance:
            return f"a batch of {file.batch} differs from single samples by {difference:.2g} of the largest value"
        if took_s * PAYS > file.batch * took_alone_s:
            return f"a batch of {file.batch} takes {took_s * 1e3:.3g} ms, one sample {took_alone_s * 1e3:.3g} ms"
        self._files.append((file, took_s))
        return None

    def run(
        self, samples: Sequence[Sequence[Array]], on_wait: Callable[[float], None] = lambda _: None
    ) -> list[list[Array]]:
        """The outputs of each sample."""
        done: list[list[Array]] = []
        while left := len(samples) - len(done):
            file, _ = min(self._files, key=lambda timed: timed[1] / min(timed[0].batch, left))
            done += file.run(samples[len(done) : len(done) + file.batch], on_wait)
        return done

    def measure(self, longest_s: float, clock: Callable[[], float]) -> dict[int, float]:
        """The time of each size of batch, once the GPU has been busy for a while: an idle one computes at half its speed."""
        return {file.batch: _busy_time(file, self._segment, longest_s, clock) for file, _ in self._files}

    def unload(self) -> None:
        """Free their device memory."""
        for file, _ in self._files:
            file.unload()


def _busy_time(file: SegmentFile, segment: Segment, longest_s: float, clock: Callable[[], float]) -> float:
    """The median time of the later half of the runs."""
    samples = [random_sample(segment.inputs, number) for number in range(file.batch)]
    took_s: list[float] = []
    begin_s = clock()
    while not took_s or clock() - begin_s < longest_s:
        before_s = clock()
        file.run(samples)
        took_s.append(clock() - before_s)
    return median(took_s[len(took_s) // 2 :])
