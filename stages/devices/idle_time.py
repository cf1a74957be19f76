"""Device-only samples in the time in which a device has nothing to do for the other routes of the same task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus.tensors import Array
from stages.computing import Computing, Segment
from stages.measuring.clock import exact_clock

LOOKS = 8
"""How often it looks for a sample while a device-only sample could be computed, where there was none to take."""


SHORTEST_S = 0.001
"""Shortest pause between two such looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleWork:
    """What there is to do in idle time."""

    steps: Sequence[Segment]  # of the model, in order
    length_s: Callable[[], float]  # of a sample
    take: Callable[[], int | None]  # the next sample; None: too little of the task is left now
    inputs: Callable[[int], list[Array]]
    done: Callable[[int, list[Array]], object]  # called with the outputs of a sample
    more: Callable[[], bool]  # whether there may be samples to take later


class IdleTime:
    """Computes one sample at a time, step by step. After each step the other routes come first."""

    def __init__(self, computing: Computing, work: IdleWork) -> None:
        self._computing, self._work = computing, work
        self._device = asyncio.Lock()
        self._idle = asyncio.Event()  # the other routes do not need the device
        self._idle.set()
        self._steps_left = 0

    @property
    def begun_s(self) -> float:
        """About how long the present sample still takes."""
        return self._steps_left / len(self._work.steps) * self._work.length_s()

    async def interrupt(
        self, segment: Segment, sample: int, inputs: Sequence[Array], ready_s: float
    ) -> tuple[list[Array], float]:
        """As `Computing.run`, for a sample of another route: it waits for the end of the present step only."""
        self._idle.clear()
        async with self._device:
            outputs = await self._computing.run(segment, sample, inputs, ready_s)
        self._idle.set()
        return outputs

    async def run(self) -> None:
        """Compute samples until there are no more to take."""
        while self._work.more():
            await self._until_idle()
            sample = self._work.take()
            if sample is None:
                await asyncio.sleep(max(SHORTEST_S, self._work.length_s() / LOOKS))
                continue
            tensors = self._work.inputs(sample)
            self._steps_left = len(self._work.steps)
            for step in self._work.steps:
                await self._until_idle()
                async with self._device:
                    tensors, _ = await self._computing.run(step, sample, tensors, exact_clock()())
                self._steps_left -= 1
            self._work.done(sample, tensors)

    async def _until_idle(self) -> None:
        while not self._idle.is_set():
            await self._idle.wait()
