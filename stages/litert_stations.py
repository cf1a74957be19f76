"""The stations and coders of a LiteRT runner, and the worker threads in which they compute."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from bus.codecs.coding import decode_sample, encode_sample
from bus.tensors import Array, Encoded, bytes_in
from bus.values import Codec, CodecProfile, TensorSpec
from stages.models.gpu.accelerator import RunsSegment
from stages.runner import PaceClock, sleep_until

T = TypeVar("T")

WORKERS = 4 * max(2, os.cpu_count() or 1)
"""More threads than cores, so that a small inference does not queue behind a large one: the system shares the cores."""

INLINE_CODED_BYTES = 60_000
"""Smaller samples are encoded and decoded on the event loop, as passing them to a thread costs several times as much."""

YIELD_S = 0.001
"""Inline stations give other tasks a turn after computing on the event loop for this long."""


class Workers:
    """Worker threads, and how long samples wait while all of them are busy."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._jobs = 0  # samples that are computed or wait for a thread

    async def run(self, work: Callable[[], T]) -> tuple[T, float]:
        """What `work` returns, and the seconds that the sample waited because every thread was busy."""
        crowded = self._jobs >= WORKERS
        asked_s = time.monotonic()

        def timed() -> tuple[float, T]:
            return time.monotonic(), work()

        self._jobs += 1
        try:
            begin_s, outputs = await asyncio.get_running_loop().run_in_executor(self._pool, timed)
        finally:
            self._jobs -= 1
        return outputs, begin_s - asked_s if crowded else 0.0  # else it is the time to wake a thread


class LitertStation:
    """Computes in a worker thread and returns the result as soon as it is computed."""

    def __init__(self, segment: RunsSegment, workers: Workers) -> None:
        self._segment = segment
        self._workers = workers
        self._queued_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._queued_s + self._segment.waited_s

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        outputs, queued_s = await self._workers.run(lambda: self._segment.run(inputs))
        self._queued_s += queued_s
        return outputs

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None

    def close(self) -> None:
        self._segment.release()


class LitertCoder:
    """Encodes and decodes large samples in a worker thread, small ones on the event loop."""

    def __init__(self, codec: Codec, specs: Sequence[TensorSpec], limit_bytes: int, workers: Workers) -> None:
        """`limit_bytes`: the largest size of the tensors of a sample."""
        self._codec, self._specs = codec, specs
        self._limit_bytes = limit_bytes
        self._workers = workers
        self.waited_s = 0.0

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        return await self._run(partial(encode_sample, self._codec, tensors, self._specs), bytes_in(tensors))

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        return await self._run(partial(decode_sample, encoded, self._limit_bytes), encoded.raw_bytes)

    async def _run(self, work: Callable[[], T], size_bytes: int) -> T:
        if size_bytes < INLINE_CODED_BYTES:
            return work()
        outcome, waited_s = await self._workers.run(work)
        self.waited_s += waited_s
        return outcome


class PacedCoder:
    """Returns when the emulated slower machine would."""

    waited_s = 0.0

    def __init__(self, coder: LitertCoder, measured: CodecProfile, pace: PaceClock) -> None:
        self._coder, self._measured, self._pace = coder, measured, pace

    async def encode(self, tensors: Sequence[Array], ready_s: float) -> Encoded:
        encoded = await self._coder.encode(tensors, ready_s)
        await sleep_until(self._pace.done_at(ready_s, self._measured.encode_s))
        return encoded

    async def decode(self, encoded: Encoded, ready_s: float) -> list[Array]:
        tensors = await self._coder.decode(encoded, ready_s)
        await sleep_until(self._pace.done_at(ready_s, self._measured.decode_s))
        return tensors


class InlineStation(LitertStation):
    """Computes on the event loop, for layers that take less time than waking a thread.

    It uses a thread where the event loop would have to wait for an interpreter or load one.
    """

    def __init__(self, segment: RunsSegment, workers: Workers) -> None:
        super().__init__(segment, workers)
        self._yielded_s = time.perf_counter()

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        if (now := time.perf_counter()) - self._yielded_s > YIELD_S:
            await asyncio.sleep(0)
            self._yielded_s = time.perf_counter()
            self._queued_s += self._yielded_s - now
        if not self._segment.idle:  # checked after the sleep, during which another task may take the interpreter
            return await super().run(sample, inputs, ready_s)
        return self._segment.run(inputs)

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return self._segment.run(inputs) if self._segment.idle else None


class PacedStation:
    """Computes as another station does and returns the result when the emulated slower machine would."""

    waited_s = 0.0  # an emulated platform computes its tasks side by side

    def __init__(self, station: LitertStation, busy_s: float, pace: PaceClock) -> None:
        self._station = station
        self._busy_s = busy_s
        self._pace = pace

    async def run(self, sample: int, inputs: Sequence[Array], ready_s: float) -> list[Array]:
        outputs = await self._station.run(sample, inputs, ready_s)
        await sleep_until(self._pace.done_at(ready_s, self._busy_s))
        return outputs

    def run_now(self, inputs: Sequence[Array]) -> list[Array] | None:
        return None  # it takes the emulated time

    def close(self) -> None:
        self._station.close()
