"""Task statistics: histograms of the delay of ended tasks and of measured over predicted delay, and the last errors.

Only decisions that this planner wrote and read back are counted. Replayed decisions are only remembered, so a restart counts
no task twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from bus.messages import Admitted, Decision, Ended, Placed, TaskState
from planner.core.region.records import Task
from planner.service.prediction_errors import PredictionErrors

DELAY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
RATIO_BOUNDS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
NOT_PLACED = "none"
"""Kind label of a task that ended without a placement."""


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bound, as in Prometheus; the last count holds the values above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value; upper bounds are inclusive."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class _Known:
    """Facts about a live task that its `Ended` change does not contain."""

    admitted_s: float | None  # ledger time; None if the admission lies before the snapshot that was restored
    placed: Placed | None = None


class TaskStatistics:
    """Statistics of one region. Memory is bounded by the number of live tasks."""

    def __init__(self) -> None:
        self.delays: dict[tuple[str, str], Histogram] = {}  # admission to end, by outcome and kind
        self.ratios: dict[str, Histogram] = {}  # measured over predicted delay of completed tasks, by kind
        self.errors = PredictionErrors()  # of the last completed tasks
        self._live: dict[str, _Known] = {}

    def retain(self, live: Mapping[str, Task]) -> None:
        """Forget all tasks except these. Called after the state was rebuilt, which may skip the ends of other tasks."""
        known = self._live
        self._live = {task_id: known.get(task_id) or _Known(None, task.placed) for task_id, task in live.items()}

    def fold(self, decision: Decision) -> None:
        """Remember the tasks of a replayed decision without counting."""
        self._read(decision, count=False)

    def record(self, decision: Decision) -> None:
        """Count the tasks that a decision of this planner ended."""
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
        if placed is not None and placed.session is not None:
            return  # the length of a session says nothing about delays
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
            self.errors.observe(ended.delay_s, placed.delay_s)
