"""What a stage knows from the decisions: which attempt of a task counts, and which tasks are over.

The plan travels with the activations, fences do not: a stage that missed that a task was ended or planned again would work
for nobody. What it reads here tells it what to drop; a frame of a task it has never heard of is not fenced.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from bus.messages import Admitted, Decision, Ended, Placed, Retried, TaskSubmitted
from bus.snapshots import STATE_VERSION

REMEMBERED_ENDS = 10_000
"""Number of ended tasks that are remembered, to drop their late frames; the planner remembers as many."""


class Fences:
    """Folds decisions into what stages need of them."""

    def __init__(self, remembered_ends: int = REMEMBERED_ENDS) -> None:
        self.remembered_ends = remembered_ends
        self.tasks: dict[str, TaskSubmitted] = {}  # admitted and not ended
        self.placed: dict[str, Placed] = {}  # the newest placement of each of them
        self._attempt: dict[str, int] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def apply(self, decision: Decision) -> set[str]:
        """Fold one decision in; returns the tasks of which something older is now fenced."""
        fenced: set[str] = set()
        for change in decision.changes:
            match change:
                case Admitted(task=task):
                    self.tasks[task.task_id] = task
                    self._ended.pop(task.task_id, None)
                case Placed():
                    self.placed[change.task_id] = change
                    self._attempt[change.task_id] = change.attempt
                case Retried():
                    self._attempt[change.task_id] = change.attempt
                    self.placed.pop(change.task_id, None)
                    fenced.add(change.task_id)
                case Ended():
                    for known in (self.tasks, self.placed, self._attempt):
                        known.pop(change.task_id, None)
                    self._ended[change.task_id] = None
                    fenced.add(change.task_id)
                case _:
                    pass
        while len(self._ended) > self.remembered_ends:
            self._ended.popitem(last=False)
        return fenced

    def attempt(self, task_id: str) -> int:
        """The attempt that counts, 0 for a task that is unknown or over."""
        return self._attempt.get(task_id, 0)

    def fenced(self, task_id: str, attempt: int) -> bool:
        """Whether this attempt no longer counts, so that work on it is dropped."""
        return task_id in self._ended or attempt < self._attempt.get(task_id, 0)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a planner's snapshot tells: of live tasks submission, placement and attempt; which ones are over.

        Raises LookupError, TypeError or ValueError for a state of another version, or a broken one.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"a state of version {state.get('version')}, known is {STATE_VERSION}")
        for task in state.get("tasks", []):
            submitted = TaskSubmitted.model_validate(task["submitted"])
            self.tasks[submitted.task_id] = submitted
            self._attempt[submitted.task_id] = int(task["attempt"])
            if task.get("placed"):
                self.placed[submitted.task_id] = Placed.model_validate(task["placed"])
        for task_id, _ in state.get("ended", []):
            self._ended[task_id] = None
