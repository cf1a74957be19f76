"""Which link measurements a heartbeat carries: those that differ from what the planner was told last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from bus.messages import LinkMeasurement
from stages.measuring.clock import exact_clock
from stages.measuring.probes import Latency
from stages.measuring.throughput import LinkThroughput

SAME_SHARE = 0.1
SAME_S = 0.000_2
SAME_DEVIATION_SHARE = 0.5
SAME_DEVIATION_S = 0.000_5
"""Smaller changes of a latency or its deviation are not reported: each report is a decision record of the planner."""


def measurement(link: Literal[1, 2], edge: str, latency: Latency, throughput: LinkThroughput | None) -> LinkMeasurement:
    """What a node reports of one link now."""
    bps = None if throughput is None else throughput.limit_bps(exact_clock()())
    return LinkMeasurement(link=link, edge=edge, latency_s=latency.latency_s, deviation_s=latency.deviation_s, bps=bps)


class LinkReports:
    """What a node has reported about its links."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str], LinkMeasurement] = {}

    def news(self, measured: Iterable[LinkMeasurement]) -> tuple[LinkMeasurement, ...]:
        """The measurements to report."""
        return tuple(one for one in measured if _differs(self._told.get((one.link, one.edge)), one))

    def told(self, reported: Iterable[LinkMeasurement]) -> None:
        """Record that a heartbeat with these measurements was acknowledged."""
        for one in reported:
            self._told[one.link, one.edge] = one

    def forget(self) -> None:
        """Report everything again, for example to a planner that has declared this node lost."""
        self._told.clear()


def _differs(told: LinkMeasurement | None, now: LinkMeasurement) -> bool:
    if told is None or told.bps != now.bps:
        return True
    return abs(now.latency_s - told.latency_s) > max(SAME_S, SAME_SHARE * told.latency_s) or abs(
        now.deviation_s - told.deviation_s
    ) > max(SAME_DEVIATION_S, SAME_DEVIATION_SHARE * told.deviation_s)
