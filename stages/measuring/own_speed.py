"""A node's own speed: while it has no work, it runs each model in memory and compares the time with its profile.

A node that became slow gets no tasks, so no task shows that it is fast again; the node itself sees it within seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import count, islice
from statistics import median
from typing import Any

from bus.errors import DeeparError
from bus.messages import SpeedMeasurement
from bus.values import ModelProfile

CHECK_S = 3.0
"""Least time between two checks."""
SHARE = 0.01
"""Share of its time for which an idle node checks itself, and as much again while it confirms changes."""
RESERVE_S = 0.5
"""Time of runs that a change may take at once, without a longer pause after them."""
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
        self._reserve_s = RESERVE_S  # left for changes
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
        """Measure until cancelled: one model in turn, and all others if that one has changed."""
        for turn in count():
            pause_s = max(CHECK_S, self._spent_s / SHARE)
            await asyncio.sleep(pause_s)
            self._spent_s, self._reserve_s = 0.0, min(RESERVE_S, self._reserve_s + SHARE * pause_s)
            profiles = [one for one in self._profiles() if 0 < sum(one.layer_s) <= LONGEST_S]
            first = turn % max(1, len(profiles))
            for number, profile in enumerate(profiles[first:] + profiles[:first]):
                if not await self._changed(profile, for_change=number > 0) and number == 0:
                    break

    def _known(self, profile: ModelProfile) -> float:
        """The factor that the planner knows."""
        factor, of = self._told.get(profile.model, (1.0, profile))
        return factor if of == profile else 1.0

    async def _changed(self, profile: ModelProfile, for_change: bool) -> bool:
        """Measure a model, and report it if it has changed."""
        try:
            factor = await self._confirmed(profile, for_change)
        except DeeparError as error:
            self._log.info("own speed not measured", model=profile.model, error=str(error))
            return False
        if factor is None:
            return False  # a task needs the node
        self._found[profile.model] = (factor, profile)
        changed = _differs(factor, self._known(profile), profile)
        if changed:
            self._on_change()
        return changed

    async def _confirmed(self, profile: ModelProfile, for_change: bool) -> float | None:
        """The factor of a model; one that differs from what the planner knows is measured again."""
        factors: list[float] = []
        while len(factors) <= CONFIRMATIONS:
            if factors:
                await asyncio.sleep(CONFIRM_S)
            factor = await self._measure(profile, for_change or bool(factors))
            if factor is None or not _differs(factor, self._known(profile), profile):
                return factor
            factors.append(factor)
        return median(factors)

    async def _measure(self, profile: ModelProfile, for_change: bool) -> float | None:
        """Time of the whole model relative to its profile; None if the node is not idle."""
        times: list[float] = []
        while len(times) < RUNS and sum(times) < ENOUGH_S:
            if not self._idle():
                return None
            times.append(await self._run_model(profile))
            self._spend(times[-1], for_change)
        return median(times) / sum(profile.layer_s) if self._idle() else None

    def _spend(self, took_s: float, for_change: bool) -> None:
        """Count the time of a run: a pause follows, unless it belongs to a change and the reserve covers it."""
        covered_s = min(took_s, self._reserve_s) if for_change else 0.0
        self._reserve_s -= covered_s
        self._spent_s += took_s - covered_s


def _differs(factor: float, known: float, profile: ModelProfile) -> bool:
    change = abs(factor - known)
    return change > SAME_SHARE * known and change * sum(profile.layer_s) > SAME_S
