"""Counts of the tasks that run on each edge, and in the cloud through each edge, by model.

A batching node computes the samples of all of them together. Sessions do not count: the planner books their load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from bus.messages import Placed

_NONE: Final[Counter[str]] = Counter()


class UnderWay:
    """The counts of one region; `watch` reports changes."""

    def __init__(self) -> None:
        self._on_edge: dict[str, Counter[str]] = {}  # by model and edge
        self._in_cloud: dict[str, Counter[str]] = {}  # by model and the edge that sends to the cloud
        self._watchers: list[Callable[[Placed], None]] = []

    def watch(self, watcher: Callable[[Placed], None]) -> None:
        """Call `watcher` with the placement of each task that begins or ends."""
        self._watchers.append(watcher)

    def add(self, placed: Placed, by: int = 1) -> None:
        """Count a task that begins (1) or ends (-1) to run with this placement."""
        placement, model = placed.placement, placed.model
        if placed.session is not None or placement.edge is None:
            return
        if placement.uses_slot:
            _add(self._on_edge, model, placement.edge, by)
        if placement.uses_cloud:
            _add(self._in_cloud, model, placement.edge, by)
        for watcher in self._watchers:
            watcher(placed)

    def on_edge(self, edge: str, model: str) -> int:
        """The tasks whose layers of a model run on an edge."""
        return self._on_edge.get(model, _NONE)[edge]

    def in_cloud(self, model: str) -> Iterable[tuple[str, int]]:
        """The edges whose tasks run layers of a model in the cloud, and how many tasks."""
        return self._in_cloud.get(model, _NONE).items()


def _add(counts: dict[str, Counter[str]], model: str, edge: str, by: int) -> None:
    of_model = counts.setdefault(model, Counter())
    of_model[edge] += by
    if not of_model[edge]:
        del of_model[edge]
        if not of_model:
            del counts[model]
