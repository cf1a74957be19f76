"""The window: how many samples of a task are in the pipeline at once, and which of them have no result yet.

It bounds every buffer from the device to the last stage.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from bus.frames import AttemptPlan
from bus.routes.interleave import LEAST_WINDOW
from bus.routes.windows import MAX_WINDOW, window_samples
from bus.values import Execution
from stages.measuring.clock import exact_clock

IN_FLIGHT_BYTES = 32 << 20
"""Limit for samples that are on their way because of a latency: 250 ms of a link of 1 Gbit/s."""


def window_of(plan: AttemptPlan, cut_bytes: Sequence[int]) -> int:
    """The window of a plan for a model with these sizes at its cuts.

    It is `window_samples`, plus the samples that are in flight on links with latencies. A task of several routes has
    `LEAST_WINDOW`, without those of the device-only route: with fewer, some station is idle too often; with more, those that
    skip a station run far ahead of those that wait for it.
    """
    execution = plan.execution if plan.session is None else Execution.STREAMING
    window, cuts = window_samples(execution, cut_bytes), plan.placement.cut_pairs
    if len(cuts) > 1 and execution is Execution.STREAMING:
        window = LEAST_WINDOW
    if plan.in_flight is None:
        return window
    sizes = (plan.input_bytes, *cut_bytes[1:]) if plan.input_bytes is not None else cut_bytes
    sent_bytes = max(1, *(sizes[cut] for pair in cuts for cut in pair))
    return min(MAX_WINDOW, window + min(plan.in_flight, IN_FLIGHT_BYTES // sent_bytes))


class Window:
    """The places of one attempt's window: each sample takes a place, and its result gives the place back."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(0)
        self._freed_s: deque[float] = deque()  # when each free place became free

    def open(self, size: int) -> None:
        """Free all places, once the attempt is ready to send."""
        for _ in range(size):
            self.wake()

    async def take(self) -> float:
        """Wait for a free place and take it; returns when it became free."""
        await self._free.acquire()
        return self._freed_s.popleft()

    def give(self) -> None:
        """Free one place: a result arrived."""
        self.wake()

    def wake(self) -> None:
        """Let one waiting `take` return without a result, because the attempt failed."""
        self._freed_s.append(exact_clock()())
        self._free.release()


class MissingResults:
    """The samples of one attempt that have no result yet."""

    def __init__(self, samples: Iterable[int]) -> None:
        self._samples = set(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def remove(self, sample: int) -> bool:
        """Remove a sample whose result arrived; False if its result arrived before, so that this one is a duplicate."""
        if sample not in self._samples:
            return False
        self._samples.remove(sample)
        return True
