"""Check of a node's profiles: one that the planner's learned values contradict is measured again.

Batches are measured once the node has computed some.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bus.messages import Learned
from stages.runner import MeasuresBatches, Runner

CONTRADICTED = 2.0
"""A learned speed factor above this, or below its inverse, contradicts the profile."""
CONFIRMED = 3
"""Observations that an estimate needs before it contradicts a profile."""
IDLE_S = 1.0
"""Interval at which a busy node checks whether it may measure."""
AGAIN_S = 600.0
"""Minimum time between two measurements of a model; doubles whenever a measurement confirms the profile."""
MAX_AGAIN_S = 24 * 3600.0
BATCHES_S = 5.0
"""Interval at which a node checks whether it should measure batches."""


@dataclass(slots=True)
class _Due:
    """When a model may be measured again."""

    from_s: float = float("-inf")
    again_s: float = AGAIN_S


class ProfileCheck:
    """Measures contradicted profiles again, one at a time, while the node is idle. `run` must be running."""

    def __init__(
        self, node: str, runner: Runner, idle: Callable[[], bool], announce: Callable[[], Awaitable[None]], log: Any
    ) -> None:
        """`announce` publishes the node's profiles to the region."""
        self._node, self._runner, self._idle, self._announce, self._log = node, runner, idle, announce, log
        self._contradicted: dict[str, float] = {}  # learned factors by model
        self._due: dict[str, _Due] = {}
        self._found = asyncio.Event()
        self.measuring = False  # whether it measures now

    def learned(self, change: Learned) -> None:
        """Note what the planner learned about this node."""
        for one in change.nodes:
            if one.node != self._node:
                continue
            if one.kept >= CONFIRMED and not 1 / CONTRADICTED <= one.factor <= CONTRADICTED:
                self._contradicted[one.model] = one.factor
                self._found.set()
            else:
                self._contradicted.pop(one.model, None)

    async def run(self) -> None:
        """Measure until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._found.wait()
            self._found.clear()
            for model in list(self._contradicted):
                due = self._due.setdefault(model, _Due())
                if clock() < due.from_s:
                    continue  # the next completed task contradicts it again, if it is still wrong
                while self.measuring or not self._idle():
                    await asyncio.sleep(IDLE_S)
                if (factor := self._contradicted.pop(model, None)) is not None:
                    await self._measure(model, factor, due)
                    due.from_s = clock() + due.again_s

    async def run_batches(self, runner: MeasuresBatches) -> None:
        """Measure batches while the node is idle, until cancelled."""
        while True:
            await asyncio.sleep(BATCHES_S)
            model = runner.unmeasured_batches()
            if model is None or self.measuring or not self._idle():
                continue
            self.measuring = True
            try:
                changed = await runner.measure_batches(model)
            except Exception as error:  # the profile without batches goes on
                self._log.warning("batches not measured", model=model, error=f"{type(error).__name__}: {error}")
                changed = False
            finally:
                self.measuring = False
            if changed:
                self._log.info("batches measured", model=model)
                await self._announce()

    async def _measure(self, model: str, factor: float, due: _Due) -> None:
        self.measuring = True
        try:
            changed = await self._runner.remeasure(model)
        except Exception as error:  # the old profile goes on
            self._log.warning("profile not measured again", model=model, error=f"{type(error).__name__}: {error}")
            changed = False
        finally:
            self.measuring = False
        due.again_s = AGAIN_S if changed else min(MAX_AGAIN_S, 2 * due.again_s)
        if changed:
            self._log.warning("profile contradicted by learning; measured again", model=model, learned_factor=factor)
            await self._announce()
        else:
            self._log.info("profile contradicted by learning; not changed", model=model, learned_factor=factor)
