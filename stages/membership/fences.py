"""Fences of a stage: which attempt of a task is current, which tasks have ended, and which nodes are there.

A stage drops work of ended tasks and of older attempts. Frames carry plans but no fences, so the fences come from the
decisions. A frame of an unknown task is not fenced, because its decision may arrive later.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from bus.messages import Admitted, Decision, Ended, NodeJoined, NodeLost, Placed, Retried
from bus.region_tasks import KnownTask, RegionTasks
from bus.values import Role

REMEMBERED_ENDS = 10_000
"""Number of ended tasks that are remembered, to drop their late frames; the planner remembers as many."""


def revision_of(placed: Placed) -> int:
    """How often the attempt was rerouted before this placement."""
    return 0 if placed.rest is None else placed.rest.reroutes


class Fences:
    """The tasks and nodes of a region as a stage knows them, and the ends that it remembers."""

    def __init__(self, remembered_ends: int = REMEMBERED_ENDS) -> None:
        self.remembered_ends = remembered_ends
        self._region = RegionTasks(follow_moves=False)  # stages start tasks when `Start` says so
        self._ended: OrderedDict[str, None] = OrderedDict()
        self.nodes: dict[str, Role] = {}  # nodes that have joined, by name

    @property
    def tasks(self) -> dict[str, KnownTask]:
        """The tasks that have not ended."""
        return self._region.tasks

    def apply(self, decision: Decision) -> set[str]:
        """Fold a decision; returns the tasks of which it fenced an attempt."""
        fenced: set[str] = set()
        for change, task in self._region.apply(decision):
            if isinstance(change, NodeJoined):
                self.nodes[change.node.node] = change.node.role
            elif isinstance(change, NodeLost):
                self.nodes.pop(change.node, None)
            if task is None:
                continue
            if isinstance(change, Ended):
                self._ended[task.task_id] = None
                fenced.add(task.task_id)
            elif isinstance(change, Retried):
                fenced.add(task.task_id)
            elif isinstance(change, Admitted):
                self._ended.pop(task.task_id, None)
        while len(self._ended) > self.remembered_ends:
            self._ended.popitem(last=False)
        return fenced

    def placed(self, task_id: str) -> Placed | None:
        """The current placement of a live task."""
        task = self._region.tasks.get(task_id)
        return None if task is None else task.placed

    def revised(self, task_id: str, attempt: int, revision: int) -> Placed | None:
        """The placement of an attempt after so many reroutes; None where it is not known."""
        task = self._region.tasks.get(task_id)
        if task is None or task.placed is None or task.attempt != attempt:
            return None
        placed, rest = task.placed, task.placed.rest
        if rest is None or revision == rest.reroutes:
            return placed if revision == revision_of(placed) else None
        if revision >= len(rest.before):
            return None
        earlier = rest.model_copy(update={"reroutes": revision, "before": rest.before[:revision]}) if revision else None
        return placed.model_copy(update={"placement": rest.before[revision], "rest": earlier})

    def holds(self, edge: str) -> bool:
        """Whether a live task is placed through this edge."""
        return any(placement.edge == edge for t in self._region.placed.values() if (placement := t.placement))

    def attempt(self, task_id: str) -> int:
        """The current attempt; 0 for a task that is unknown, not placed yet, or ended."""
        task = self._region.tasks.get(task_id)
        return 0 if task is None else task.attempt

    def ended(self, task_id: str) -> bool:
        """Whether the task is one of the remembered ones that have ended."""
        return task_id in self._ended

    def fenced(self, task_id: str, attempt: int) -> bool:
        """Whether this attempt is over, so that its frames and results are dropped."""
        return task_id in self._ended or attempt < self.attempt(task_id)

    def names(self, role: Role) -> list[str]:
        """Names of the nodes of a role, in the order in which they joined."""
        return [name for name, known in self.nodes.items() if known is role]

    def restore(self, state: dict[str, Any]) -> None:
        """Take the live and the ended tasks from a planner's snapshot.

        Raises LookupError, TypeError or ValueError if the state has another version or is malformed.
        """
        self._region.restore(state)
        for task_id, _ in state.get("ended", []):
            self._ended[task_id] = None
        for entry in state.get("nodes", []):
            announced = entry["announced"]
            self.nodes[announced["node"]] = Role(announced["role"])
