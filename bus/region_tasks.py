"""The live tasks of a region, folded from its decisions: the one interpretation of `Decision` outside the planner.

Stages, views, the load generator, traces and commands read their task states here. The planner itself folds decisions into
its core. The oracle of the live campaign (`loadgen.chaos.live.oracle`) has its own fold on purpose: it must be able to find
errors in this one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    Decision,
    Ended,
    Moved,
    Overran,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.snapshots import STATE_VERSION
from bus.values import Placement


@dataclass(slots=True)
class KnownTask:
    """What the decisions read so far say about one task. The object stays valid after the task has ended."""

    task_id: str
    submitted: TaskSubmitted | None = None  # None: the admission was not read
    admitted_s: float | None = None  # ledger time; None: the admission was not read
    state: TaskState = TaskState.WAITING
    attempt: int = 0  # the latest attempt; 0 before the first placement
    placed: Placed | None = None  # the current placement, or the last one of an ended task
    start_s: float | None = None  # ledger time, planned; real once the task runs
    end_s: float | None = None  # ledger time, predicted; real once the task has ended
    moved_from_s: float | None = None  # start before the latest move
    cause: str = ""  # of the latest retry or of the end

    @property
    def placement(self) -> Placement | None:
        """Nodes, cuts and bandwidth of the current placement."""
        return None if self.placed is None else self.placed.placement

    def start_at(self, start_s: float) -> None:
        """Set the start, and the end that follows from the predicted delay. A session has no predicted end."""
        placed = self.placed
        self.start_s = start_s
        self.end_s = start_s + (0.0 if placed is None else placed.delay_s)
        if placed is not None and placed.session is not None:
            self.end_s = None


class RegionTasks:
    """The tasks of one region that have not ended. A reader that joins in the middle knows only what it has read."""

    def __init__(self, *, follow_moves: bool = True) -> None:
        """`follow_moves`: whether `Moved` updates the starts of waiting tasks, at a cost for each task in the queue."""
        self._follow_moves = follow_moves
        self.tasks: dict[str, KnownTask] = {}
        self.placed: dict[str, KnownTask] = {}  # those that hold a reservation, in order of placement

    def apply(self, decision: Decision) -> Iterator[tuple[Change, KnownTask | None]]:
        """Fold a decision change by change: yields each change with the task it led to, None if it is not about one task.

        The caller must consume the iterator completely. A task that ends is yielded a last time and forgotten.
        """
        now_s = decision.now_s
        for change in decision.changes:
            yield change, self._fold(change, now_s)

    def _fold(self, change: Change, now_s: float) -> KnownTask | None:
        match change:
            case BandwidthGrant():  # repeats the rates of the placement
                return self._known(change.task_id)
            case Admitted(task=submitted):
                task_id = submitted.task_id
                task = self.tasks[task_id] = KnownTask(task_id, submitted, now_s)
            case Placed():
                task = self._known(change.task_id)
                task.state, task.attempt, task.placed = TaskState.SCHEDULED, change.attempt, change
                task.start_at(change.start_s)
                self.placed[task.task_id] = task
            case Start():
                task = self._known(change.task_id)
                task.state = TaskState.RUNNING
                task.start_at(change.at_s)
            case Ended():
                task = self._known(change.task_id)
                task.state, task.end_s, task.cause = change.state, now_s, change.cause
                self.placed.pop(task.task_id, None)
                del self.tasks[task.task_id]
            case Retried():
                task = self._known(change.task_id)
                task.state, task.attempt, task.cause = TaskState.WAITING, change.attempt, change.cause
                task.placed = task.start_s = task.end_s = None
                self.placed.pop(task.task_id, None)
            case Overran():
                task = self._known(change.task_id)
                task.end_s = change.to_s
            case Rerouted():
                task = self._known(change.task_id)
                if task.placed is not None:
                    start_s = task.placed.start_s if task.start_s is None else task.start_s
                    task.placed = change.applied_to(task.placed, start_s)
                task.end_s = change.from_s + change.delay_s
            case Moved():
                if self._follow_moves:
                    self._move(change)
                return None
            case _:
                return None
        return task

    def _move(self, moved: Moved) -> None:
        for task_id, start_s in zip(moved.task_ids, moved.starts_s, strict=True):
            task = self._known(task_id)
            task.moved_from_s = task.start_s
            task.start_at(start_s)

    def _known(self, task_id: str) -> KnownTask:
        task = self.tasks.get(task_id)
        if task is None:
            task = self.tasks[task_id] = KnownTask(task_id)
        return task

    def retain(self, live: Container[str]) -> None:
        """Forget all tasks except these, e.g. after a snapshot skipped the ends of others."""
        for task_id in [task_id for task_id in self.tasks if task_id not in live]:
            del self.tasks[task_id]
            self.placed.pop(task_id, None)

    def restore(self, state: dict[str, Any]) -> None:
        """Add the live tasks of a planner's snapshot.

        Raises LookupError, TypeError or ValueError if the state has another version or is malformed.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"the state has version {state.get('version')}; this reader knows version {STATE_VERSION}")
        for entry in state.get("tasks", []):
            submitted = TaskSubmitted.model_validate(entry["submitted"])
            task = KnownTask(submitted.task_id, submitted, attempt=int(entry["attempt"]))
            if entry.get("state"):
                task.state = TaskState(entry["state"])
            task.start_s, task.end_s = entry.get("start_s"), entry.get("end_s")
            self.tasks[task.task_id] = task
            if entry.get("placed"):
                task.placed = Placed.model_validate(entry["placed"])
                self.placed[task.task_id] = task


__all__ = ["KnownTask", "RegionTasks"]
