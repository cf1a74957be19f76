"""A node's own speed: while it has no work, it runs each model in memory and compares the time with its profile.

A node that became slow gets no tasks, so no task shows that it is fast again; the node itself sees it within seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from statistics import median
from typing import Any

from bus.errors import DeeparError
from bus.messages import SpeedMeasurement
from bus.values import ModelProfile

CHECK_S = 3.0
"""Least time between two checks."""
SHARE = 0.01
"""Share of its time for which an idle node checks itself."""
RUNS = 5
"""Most runs of a model in one measurement; their median counts."""
ENOUGH_S = 0.02
"""A measurement ends after this time."""
LONGEST_S = 0.5
"""Models that take longer are not run only to measure them."""
CONFIRMATIONS = 2
"""Measurements that confirm one that differs; the median of all counts, so that a moment's load does not."""
CONFIRM_S = 0.3
"""Time between those."""
MOST = 100
"""Limit of models in one heartbeat; the others follow with the next one."""
SAME_SHARE = 0.1
SAME_S = 0.000_2
"""Smaller changes of the time that a model takes are not reported."""


class OwnSpeed:
    """Measures the models of one node while it is idle. `run` must be running."""

    def __init__(
        self,
        profiles: Callable[[], Sequence[ModelProfile]],
        run_model: Callable[[ModelProfile], Awaitable[float]],
        idle: Callable[[], bool],
        on_change: Callable[[], None],
        log: Any,
    ) -> None:
        """`run_model` runs a whole model once and returns how long that took; `on_change` is called when there is news."""
        self._profiles, self._run_model, self._idle, self._on_change = profiles, run_model, idle, on_change
        self._log = log
        self._found: dict[str, tuple[float, ModelProfile]] = {}  # factor by model, and the profile that it refers to
        self._spent_s = 0.0  # time of the runs since the last pause
        self._told: dict[str, tuple[float, ModelProfile]] = {}

    def news(self) -> tuple[SpeedMeasurement, ...]:
        """What the planner does not know yet. It takes a node that has reported nothing to be as fast as its profile."""
        news = (
            SpeedMeasurement(model=model, factor=factor)
            for model, (factor, profile) in self._found.items()
            if _differs(factor, self._known(profile), profile)
        )
        return tuple(islice(news, MOST))

    def told(self, reported: Sequence[SpeedMeasurement]) -> None:
        """Record that a heartbeat with these measurements was acknowledged."""
        for one in reported:
            self._told[one.model] = (one.factor, self._found[one.model][1])

    def forget(self) -> None:
        """Report everything again, for example to a planner that has declared this node lost."""
        self._told.clear()

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            await asyncio.sleep(max(CHECK_S, self._spent_s / SHARE))
            self._spent_s = 0.0
            for profile in self._profiles():
                try:
                    await self._check(profile)
                except DeeparError as error:
                    self._log.info("own speed not measured", model=profile.model, error=str(error))

    def _known(self, profile: ModelProfile) -> float:
        """The factor that the planner knows."""
        factor, of = self._told.get(profile.model, (1.0, profile))
        return factor if of == profile else 1.0

    async def _check(self, profile: ModelProfile) -> None:
        factors: list[float] = []
        while len(factors) <= CONFIRMATIONS:
            factor = await self._measure(profile)
            if factor is None:
                return  # a task needs the node
            if not _differs(factor, self._known(profile), profile):
                factors = [factor]
                break
            factors.append(factor)
            await asyncio.sleep(CONFIRM_S)
        factor = median(factors)
        self._found[profile.model] = (factor, profile)
        if _differs(factor, self._known(profile), profile):
            self._on_change()

    async def _measure(self, profile: ModelProfile) -> float | None:
        """Time of the whole model relative to its profile; None if the node is not idle."""
        whole_s = sum(profile.layer_s)
        if not 0 < whole_s <= LONGEST_S:
            return None
        times: list[float] = []
        while len(times) < RUNS and sum(times) < ENOUGH_S:
            if not self._idle():
                return None
            times.append(await self._run_model(profile))
            self._spent_s += times[-1]
        return median(times) / whole_s if self._idle() else None


def _differs(factor: float, known: float, profile: ModelProfile) -> bool:
    change = abs(factor - known)
    return change > SAME_SHARE * known and change * sum(profile.layer_s) > SAME_S
