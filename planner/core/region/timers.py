"""The timers of a region: leases of nodes, deadlines of tasks, predicted ends of running tasks, and reviews of sessions.

Each heap may hold outdated entries. They are dropped when they reach the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from planner.core.region.records import NEVER, KnownNode, Task
from planner.search.ledger.reservation import Reservation

Entry = tuple[float, int, str]
"""Ledger time, order of admission, and id of a task."""


class Timers:
    """Leases, deadlines and ends. `tasks` are the live tasks and `reservations` those of the ledger; both are only read."""

    def __init__(self, tasks: Mapping[str, Task], reservations: Mapping[str, Reservation]) -> None:
        self.ends: list[Entry] = []  # heap of predicted ends of running tasks
        self.deadlines: list[Entry] = []  # heap
        self._reviews: list[tuple[float, int, str, int]] = []  # heap of sessions to look at again; with their attempt
        self._tasks = tasks
        self._reservations = reservations
        self._leases: dict[str, float] = {}  # node -> ledger time at which its lease expires
        self._lease_heap: list[tuple[float, str]] = []

    # --- leases ------------------------------------------------------------------------------------------------------

    def renew(self, node: KnownNode, now: float) -> None:
        """Start the lease of a node again in full."""
        name, until = node.announced.node, now + node.announced.lease_s
        if name not in self._leases or until < self._leases[name]:
            heappush(self._lease_heap, (until, name))
        self._leases[name] = until

    def drop_lease(self, name: str) -> None:
        """Forget the lease of a node that is lost."""
        self._leases.pop(name, None)

    def restart_leases(self, nodes: Mapping[str, KnownNode], now: float) -> None:
        """Start every lease again in full."""
        self._leases = {name: now + node.announced.lease_s for name, node in nodes.items()}
        self._lease_heap = [(until, name) for name, until in self._leases.items()]
        heapify(self._lease_heap)

    def next_lease(self) -> float:
        """Ledger time at which the next lease expires."""
        heap, leases = self._lease_heap, self._leases
        while heap:
            until, name = heap[0]
            real = leases.get(name)
            if real == until:
                return until
            heappop(heap)
            if real is not None and real > until:
                heappush(heap, (real, name))
        return NEVER

    def expired_lease(self, now: float) -> str | None:
        """The node whose lease expired first, or None if no lease has expired."""
        return self._lease_heap[0][1] if self.next_lease() <= now else None

    # --- deadlines ---------------------------------------------------------------------------------------------------

    def add_deadline(self, task: Task) -> None:
        """Add the deadline of a task, if it has one."""
        if task.deadline_s != NEVER:
            heappush(self.deadlines, (task.deadline_s, task.seq, task.task_id))

    def next_deadline(self) -> float:
        """The earliest deadline of a live task."""
        heap = self.deadlines
        while heap:
            at_s, seq, task_id = heap[0]
            task = self._tasks.get(task_id)
            if task is not None and task.seq == seq:
                return at_s
            heappop(heap)
        return NEVER

    def pop_expired(self, now: float) -> Task | None:
        """Remove the earliest deadline that has passed, and return its task."""
        return self._tasks[heappop(self.deadlines)[2]] if self.next_deadline() <= now else None

    # --- reviews of running sessions ----------------------------------------------------------------------------------

    def add_review(self, task: Task, at_s: float) -> None:
        """Look at a running session again at this time. Like leases, reviews are soft state."""
        heappush(self._reviews, (at_s, task.seq, task.task_id, task.attempt))

    def next_review(self) -> float:
        """Ledger time of the next review of a running session."""
        heap = self._reviews
        while heap:
            at_s, seq, task_id, attempt = heap[0]
            task, r = self._tasks.get(task_id), self._reservations.get(task_id)
            if task is not None and (task.seq, task.attempt) == (seq, attempt) and r is not None and r.running:
                return at_s
            heappop(heap)
        return NEVER

    def pop_review(self, now: float) -> Task | None:
        """Remove the earliest review that is due, and return its session."""
        return self._tasks[heappop(self._reviews)[2]] if self.next_review() <= now else None

    # --- ends --------------------------------------------------------------------------------------------------------

    def add_end(self, task: Task, end_s: float) -> None:
        """Add the predicted end of a running task. It replaces an earlier one. A session has none."""
        if end_s != NEVER:
            heappush(self.ends, (end_s, task.seq, task.task_id))

    def pop_overdue(self, now: float) -> Reservation | None:
        """Remove the earliest predicted end that has passed, and return the reservation of its running task."""
        ends = self.ends
        while ends and ends[0][0] <= now:
            end_s, _, task_id = heappop(ends)
            r = self._reservations.get(task_id)
            if r is not None and r.running and r.end_s == end_s:
                return r  # otherwise the task has ended, or has a later end
        return None
