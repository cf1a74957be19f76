"""Finds the estimates that have become stale, without looking at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heappop, heappush
from typing import Any, Final

from planner.learning.values import MOST_STALE, NO_PATH, NODE_PRIOR, NodeEstimate, PathEstimate

AGING: Final = ("node", "path")
"""The sorts of estimates that become stale."""


class DueEstimates:
    """The times at which estimates become stale; derived from the estimates."""

    def __init__(self) -> None:
        self._by_count: list[tuple[int, float, str, Any]] = []  # heap by the count of tasks that must be reached
        self._by_time: list[tuple[float, int, str, Any]] = []  # heap by time; the count is reached

    def put(self, name: str, key: Any, value: NodeEstimate | PathEstimate) -> None:
        """Note when an estimate becomes stale."""
        if _may_step(value):
            count, at_s = value.age.due(len(value.observed))
            heappush(self._by_count, (count, at_s, name, key))

    def first(self, taught: int, now: float, tables: Mapping[str, Mapping[Any, Any]]) -> tuple[str, Any] | None:
        """Sort and key of the first estimate that is due."""
        by_count, by_time = self._by_count, self._by_time
        while by_count and by_count[0][0] <= taught:
            count, at_s, name, key = heappop(by_count)
            heappush(by_time, (at_s, count, name, key))
        while by_time and by_time[0][0] <= now:
            at_s, count, name, key = by_time[0]
            value = tables[name].get(key)
            if value is not None and value.age.due(len(value.observed)) == (count, at_s):
                return name, key
            heappop(by_time)  # it has changed since
        return None

    def tidy(self, tables: Mapping[str, Mapping[Any, Any]]) -> None:
        """Drop the entries of estimates that have changed, once these are the most."""
        if len(self._by_count) + len(self._by_time) > 1_000 + 2 * sum(map(len, tables.values())):
            self._by_count, self._by_time = [], []
            for name in AGING:
                for key, value in tables[name].items():
                    self.put(name, key, value)


def _may_step(value: NodeEstimate | PathEstimate) -> bool:
    """Whether a step towards the prior can change the predictions."""
    most = 1 if value.age.jumped else MOST_STALE
    prior = NODE_PRIOR.line if isinstance(value, NodeEstimate) else NO_PATH.line
    return value.age.steps < most and (value.line.a > prior.a or value.line.b > prior.b)
