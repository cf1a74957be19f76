"""One task as the screens show it: where it is, how long it was predicted to take, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass

from bus.messages import Placed, PlacedSession, TaskState
from bus.region_tasks import KnownTask
from bus.values import Parts, Placement
from planner.search.cost import parts_s


@dataclass(slots=True)
class TaskView:
    """One task. Moments are ledger times."""

    task_id: str
    device: str
    model: str
    samples: int
    admitted_s: float
    state: TaskState = TaskState.WAITING
    attempt: int = 1
    placed: Placed | None = None  # where it is placed
    start_s: float | None = None  # planned; real once the task runs
    end_s: float | None = None  # predicted; real once the task has ended
    measured: Parts | None = None
    delay_s: float | None = None  # from its start to the last result, on the device's clock
    done: int | None = None  # samples with a result, if a stage reported it
    cause: str = ""
    version: int = 0  # version of the view at the latest change

    @property
    def session(self) -> PlacedSession | None:
        """How its placement serves a session; None: a task with a known number of samples, or not placed."""
        return None if self.placed is None else self.placed.session

    @property
    def wait_s(self) -> float | None:
        """Time from admission to the start, planned or real."""
        return None if self.start_s is None else max(0.0, self.start_s - self.admitted_s)

    @property
    def placement(self) -> Placement | None:
        """Nodes, cuts and bandwidth."""
        return None if self.placed is None else self.placed.placement

    @property
    def predicted(self) -> Parts | None:
        """Predicted busy times."""
        return None if self.placed is None else self.placed.parts

    @property
    def predicted_delay_s(self) -> float | None:
        """Predicted time from its start to the last result; of a session: of one sample."""
        return None if self.placed is None else self.placed.delay_s

    @property
    def predicted_rest_s(self) -> float | None:
        """Latency and overheads in the predicted delay."""
        if self.placed is None or self.placed.overhead is None:
            return None
        return self.placed.overhead.latency_s + self.placed.overhead.task_s

    @property
    def measured_rest_s(self) -> float | None:
        """The share of the measured delay that the stations' busy times do not explain."""
        placed = self.placed
        if placed is None or self.measured is None or self.delay_s is None:
            return None
        return self.delay_s - parts_s(self.measured, placed)

    @property
    def error(self) -> float | None:
        """Measured over predicted delay, minus 1."""
        if self.delay_s is None or not self.predicted_delay_s:
            return None
        return self.delay_s / self.predicted_delay_s - 1.0

    def follow(self, task: KnownTask) -> None:
        """Copy the task's state, as the decisions give it."""
        self.state, self.attempt, self.cause = task.state, task.attempt or 1, task.cause
        self.start_s, self.end_s, self.placed = task.start_s, task.end_s, task.placed
