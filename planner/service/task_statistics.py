"""Histograms over the tasks that have ended: how long they took, and how well that was predicted.

Told of what the log has proven, never of what is folded: a planner that replays history counts no task twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from bus.messages import Admitted, Decision, Ended, Placed, TaskState
from planner.core.records import Task

DELAY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
RATIO_BOUNDS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
NOT_PLACED = "none"
"""The kind of a task that had no placement at its end."""


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound, as Prometheus has them; the last count is of what lies above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value; a value on a bound belongs to it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class _Known:
    """What the end of a task does not say."""

    admitted_s: float | None  # ledger time; None where its admission was not read
    placed: Placed | None = None


class TaskStatistics:
    """Remembers live tasks until they end. Memory is bounded by the live tasks."""

    def __init__(self) -> None:
        self.delays: dict[tuple[str, str], Histogram] = {}  # admission to end, by outcome and kind
        self.ratios: dict[str, Histogram] = {}  # measured over predicted delay of completed tasks, by kind
        self._live: dict[str, _Known] = {}

    def keep(self, live: Mapping[str, Task]) -> None:
        """The log is read anew, from a state with these tasks: forget the others, whose ends may not be read again."""
        known = self._live
        self._live = {task_id: known.get(task_id) or _Known(None, task.placed) for task_id, task in live.items()}

    def fold(self, decision: Decision) -> None:
        """A decision of the past, or of another planner."""
        self._read(decision, count=False)

    def tell(self, decision: Decision) -> None:
        """A decision of ours that counts now."""
        self._read(decision, count=True)

    def _read(self, decision: Decision, *, count: bool) -> None:
        for change in decision.changes:
            match change:
                case Admitted():
                    self._live[change.task.task_id] = _Known(decision.now_s)
                case Placed() if (known := self._live.get(change.task_id)) is not None:
                    known.placed = change
                case Ended():
                    known = self._live.pop(change.task_id, None)
                    if count and known is not None:
                        self._count(known, change, decision.now_s)
                case _:
                    pass

    def _count(self, known: _Known, ended: Ended, now_s: float) -> None:
        placed = known.placed
        kind = NOT_PLACED if placed is None else placed.placement.kind.value
        if known.admitted_s is not None:
            delays = self.delays.setdefault((ended.state.value.lower(), kind), Histogram(DELAY_BOUNDS_S))
            delays.observe(max(0.0, now_s - known.admitted_s))
        if (
            ended.state is TaskState.COMPLETED
            and placed is not None
            and ended.delay_s is not None
            and placed.delay_s > 0
        ):
            self.ratios.setdefault(kind, Histogram(RATIO_BOUNDS)).observe(ended.delay_s / placed.delay_s)
