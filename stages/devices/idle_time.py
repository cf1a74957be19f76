"""Device-only samples in the time in which a device has nothing to do for the other routes of the same task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus.tensors import Activations, Array
from stages.computing import Computing, Segment, tensors_of
from stages.measuring.clock import exact_clock

LOOKS = 8
"""How often it looks for a sample while a device-only sample could be computed, where there was none to take."""


SHORTEST_S = 0.001
"""Shortest pause between two such looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleWork:
    """What there is to do in idle time."""

    steps: Sequence[tuple[Segment, float]]  # of the model, in order, and the share of its time
    predicted_s: float  # of a sample, in the plan
    length_s: Callable[[], float]  # of a sample, as far as it is measured
    take: Callable[[], int | None]  # the next sample; None: too little of the task is left now
    inputs: Callable[[int], list[Array]]
    done: Callable[[int, list[Array]], None]  # called with the outputs of a sample
    more: Callable[[], bool]  # whether there may be samples to take later


class IdleTime:
    """Computes one sample at a time, step by step. After each step the other routes come first."""

    def __init__(self, computing: Computing, work: IdleWork) -> None:
        self._computing, self._work = computing, work
        self._device = asyncio.Lock()
        self._idle = asyncio.Event()  # the other routes do not need the device
        self._idle.set()
        self._share_left = 0.0  # of the present sample

    @property
    def begun_s(self) -> float:
        """How long the present sample still takes."""
        return self._share_left * self._work.length_s()

    async def interrupt(
        self, segment: Segment, sample: int, inputs: Activations, ready_s: float, predicted_s: float
    ) -> tuple[Activations, float]:
        """As `Computing.run`, for a sample of another route: it waits for the end of the present step only."""
        self._idle.clear()
        async with self._device:
            outputs = await self._computing.run(segment, sample, inputs, ready_s, predicted_s)
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
            self._share_left = 1.0
            for step, share in self._work.steps:
                await self._until_idle()
                predicted_s = share * self._work.predicted_s
                async with self._device:
                    outputs, _ = await self._computing.run(step, sample, tensors, exact_clock()(), predicted_s)
                tensors = tensors_of(outputs)
                self._share_left -= share
            self._work.done(sample, tensors)

    async def _until_idle(self) -> None:
        while not self._idle.is_set():
            await self._idle.wait()
