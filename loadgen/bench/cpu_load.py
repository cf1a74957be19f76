"""CPU load during a measurement. Ratios measured on a machine without idle time are unreliable."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

MIN_IDLE_SHARE = 0.05
"""Minimum idle share of the processors. Below it, measured delays include waiting for a processor."""

MAX_LOOP_LAG_S = 0.050
"""Maximum p99 lag of the event loop. Above it, measured delays include waiting for the loop."""

_TICK_S = 0.010


@dataclass(frozen=True, slots=True)
class Busyness:
    """CPU load during one measurement."""

    idle_share: float | None  # of all processors, 0..1; None if the system does not report it
    loop_lag_p50_s: float  # delay of a timer
    loop_lag_p99_s: float

    @property
    def too_busy(self) -> bool:
        """Whether the load was too high to judge the measurement."""
        starved = self.idle_share is not None and self.idle_share < MIN_IDLE_SHARE
        return starved or self.loop_lag_p99_s > MAX_LOOP_LAG_S

    def as_json(self) -> dict[str, Any]:
        """The report's form."""
        return {
            "idle_share": None if self.idle_share is None else round(self.idle_share, 3),
            "loop_lag_p50_s": round(self.loop_lag_p50_s, 6),
            "loop_lag_p99_s": round(self.loop_lag_p99_s, 6),
            "too_busy": self.too_busy,
        }


class BusynessWatch:
    """Measures the load inside `async with`; entered again, it adds to the earlier measurement."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._idle = 0.0
        self._total = 0.0
        self._before: tuple[float, float] | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._before = _processor_times()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.wait([self._ticking])
        after = _processor_times()
        if self._before is not None and after is not None:
            self._idle += after[0] - self._before[0]
            self._total += after[1] - self._before[1]

    def seen(self) -> Busyness:
        """The load so far."""
        lags_s = sorted(self._lags_s) or [0.0]
        idle_share = self._idle / self._total if self._total > 0 else None
        return Busyness(idle_share, lags_s[len(lags_s) // 2], lags_s[min(len(lags_s) * 99 // 100, len(lags_s) - 1)])

    async def _tick(self) -> None:
        while True:
            due = perf_counter() + _TICK_S  # not the loop's clock: uvloop's counts whole milliseconds
            await asyncio.sleep(_TICK_S)
            self._lags_s.append(max(perf_counter() - due, 0.0))


def _processor_times() -> tuple[float, float] | None:
    """Idle and total seconds of all processors since the machine started (Linux); None on other systems."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    per_s = os.sysconf("SC_CLK_TCK")
    return (ticks[3] + ticks[4]) / per_s, sum(ticks) / per_s  # idle and iowait; user..steal
