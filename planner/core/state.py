"""The state of one region's planner, and its only mutator.

`RegionState.apply` treats a new change and a change read from the decision topic in the same way, so folding the records
rebuilds the state and its hash. Derived values (heaps, counts, the edges that a device reaches) are rebuilt by `apply` and
are not hashed. Leases are soft state: see `restart_leases`.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Final

from bus.errors import InvariantError
from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    CircuitChanged,
    Decision,
    Ended,
    Moved,
    NodeAnnounced,
    NodeJoined,
    NodeLost,
    Overran,
    Placed,
    Retried,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.values import Role
from planner.core.circuits import Circuit
from planner.core.records import HASH_MASK, HISTORY, NEVER, EndedTasks, Node, Task, content_of, hash_of
from planner.core.transitions import ENDING, TRANSITIONS, Step, next_state
from planner.search.cost import PlatformRow, RowTable
from planner.search.ledger import Ledger, Reservation

DEFAULT_PATIENCE_S: Final = 600.0
DEFAULT_REMEMBER_ENDED: Final = 10_000
_QUEUED: Final = (TaskState.WAITING, TaskState.SCHEDULED)


class RegionState:
    """The state of a region. Raises `InvariantError` for an impossible change and is unusable afterwards."""

    def __init__(
        self,
        region: int = 0,
        *,
        patience_s: float = DEFAULT_PATIENCE_S,
        remember_ended: int = DEFAULT_REMEMBER_ENDED,
    ) -> None:
        self.region = region
        self.patience_s = patience_s  # longest time that a task may be WAITING
        self.now_s = float("-inf")  # the latest `now` seen
        self.ledger = Ledger()
        self.tasks: dict[str, Task] = {}  # live tasks
        self.ended = EndedTasks(remember_ended)
        self.nodes: dict[str, Node] = {}
        self.circuits: dict[str, Circuit] = {}  # of nodes at which the last attempt failed
        self._edge_names: list[str] = []  # ascending
        self._cloud_names: list[str] = []
        self._waiting: dict[str, Task] = {}
        self._queued_by_device: Counter[str] = Counter()  # tasks that wait or are scheduled
        self._running = 0
        self._seq = 0  # tasks admitted so far
        self._hash = 0  # sum of all hashes; changes of the tasks in _touched are still missing
        self._touched: dict[str, Task] = {}
        self._rows = RowTable()
        self._cloud_rows: dict[tuple[str, str], PlatformRow | None] = {}
        self._ends: list[tuple[float, int, str]] = []  # heap of predicted ends of running tasks
        self._deadlines: list[tuple[float, int, str]] = []  # heap
        self._leases: dict[str, float] = {}  # node -> ledger time at which its lease expires
        self._lease_heap: list[tuple[float, str]] = []
        # Edges and devices changed since the last `settled`: name -> time until which resources were freed. NEVER: any
        # other change, so every scheduled task there must be checked.
        self._changed_edges: dict[str, float] = {}
        self._changed_devices: dict[str, float] = {}

    # --- the only mutator --------------------------------------------------------------------------------------------

    def fold(self, decision: Decision) -> None:
        """Apply a recorded decision. The caller compares `state_hash` with the hash in the record."""
        for change in decision.changes:
            self.apply(change, decision.now_s)
        self.settled(decision.now_s)

    def settled(self, now: float) -> None:
        """Mark all changes of a record as applied: the record contains the walk, so no further walk is needed."""
        self.now_s = max(self.now_s, now)
        self._changed_edges.clear()
        self._changed_devices.clear()

    def apply(self, change: Change, now: float) -> None:
        """Apply one change, newly decided or recorded earlier. Raises `InvariantError` for an impossible change."""
        APPLY[type(change)](self, change, now)

    def _live(self, task_id: str, change: Change) -> Task:
        """The live task that a change names; its hash is marked as outdated."""
        task = self.tasks.get(task_id)
        if task is None:
            raise InvariantError(f"{change!r} names task {task_id}, which is not live")
        self._touched[task_id] = task
        return task

    def _apply_admitted(self, change: Admitted, now: float) -> None:
        submitted = change.task
        task_id = submitted.task_id
        if task_id in self.tasks:
            raise InvariantError(f"task {task_id} is admitted twice")
        self._seq += 1
        task = Task(submitted, self._seq, now)
        task.history.append((None, Step.ADMITTED, now))
        self.tasks[task_id] = self._touched[task_id] = self._waiting[task_id] = task
        self._count_queued(task, +1)
        if task.deadline_s != NEVER:
            heappush(self._deadlines, (task.deadline_s, task.seq, task_id))

    def _apply_placed(self, change: Placed, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.PLACED, change.start_s)
        if change.attempt != task.attempt:
            raise InvariantError(f"{task!r}: placement names attempt {change.attempt}")
        task.placed = change
        del self._waiting[task.task_id]
        self.ledger.reserve(reservation_of(task, change), now)
        if task.avoided or self.circuits:
            for node in self._places(change):
                if node in task.avoided:
                    task.avoided = ()  # no other node was available, so the list starts again
                circuit = self.circuits.get(node)
                if circuit is not None and circuit.wants_probe(now):
                    self._set_circuit(node, circuit._replace(probe=task.task_id))

    def _apply_grant(self, change: BandwidthGrant, now: float) -> None:
        self._live(change.task_id, change)
        r = self.ledger.reservations.get(change.task_id)
        if r is None or r.edge != change.edge or change.bps != (r.link1_bps if change.link == 1 else r.link2_bps):
            raise InvariantError(f"{change!r} differs from the reservation {r}")

    def _apply_start(self, change: Start, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.START, change.at_s)
        r = self.ledger.reservations[task.task_id]
        if r.start_s != change.at_s:
            self._note(r, NEVER)
            self.ledger.move(task.task_id, change.at_s)
        self.ledger.start(task.task_id)
        self._running += 1
        heappush(self._ends, (r.end_s, task.seq, task.task_id))

    def _apply_moved(self, change: Moved, now: float) -> None:
        for task_id, start_s in zip(change.task_ids, change.starts_s, strict=True):
            self._step(self._live(task_id, change), Step.MOVED, start_s)
            self._note(self.ledger.reservations[task_id], NEVER)
            self.ledger.move(task_id, start_s)

    def _apply_overran(self, change: Overran, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.OVERRAN, change.to_s)
        r = self.ledger.reservations[task.task_id]
        self.ledger.prolong(task.task_id, change.to_s)
        heappush(self._ends, (change.to_s, task.seq, task.task_id))
        # If the longer reservation overlaps scheduled tasks, the walk must move them; otherwise no other task is affected.
        self._note(r, NEVER if self.ledger.overbooked(r, max(change.from_s, now)) else now)

    def _apply_retried(self, change: Retried, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.RETRIED, now)
        if change.attempt <= task.attempt:
            raise InvariantError(f"{task!r}: retry names attempt {change.attempt}, which is not a later one")
        if task.task_id in self.ledger.reservations:
            self._release(task, now)
        self._drop_probes(task)
        if change.failed_at is not None and change.failed_at not in task.avoided:
            task.avoided = (*task.avoided, change.failed_at)
        task.attempt = change.attempt
        task.placed = None
        task.waiting_since_s = now
        self._waiting[task.task_id] = task

    def _apply_ended(self, change: Ended, now: float) -> None:
        task = self._live(change.task_id, change)
        task_id = task.task_id
        self._step(task, ENDING[change.state], now)
        if task_id in self.ledger.reservations:
            r = self._release(task, now)
            released = (r.edge, r.slots, r.link1_bps, r.link2_bps)
            recorded = (change.edge, change.released_slots, change.released_link1_bps, change.released_link2_bps)
            if released != recorded:
                raise InvariantError(f"task {task_id} releases {released}, but the record says {recorded}")
        self._drop_probes(task)
        self._waiting.pop(task_id, None)
        del self.tasks[task_id]
        del self._touched[task_id]
        self._hash -= task.digest
        self.ended.add(task_id, change.state, task.submitted)

    def _apply_joined(self, change: NodeJoined, now: float) -> None:
        announced = change.node
        name = announced.node
        old = self.nodes.get(name)
        if old is not None and old.announced.role is not announced.role:
            raise InvariantError(f"node {name} joins as {announced.role}, but it is present as {old.announced.role}")
        node = self.nodes[name] = Node(announced, self._rows)
        self._hash += node.digest - (old.digest if old is not None else 0)
        self._forget_reach(announced)
        if announced.role is Role.EDGE:
            if old is None:
                insort(self._edge_names, name)
            self.ledger.open_edge(name, announced.slots, announced.link1_capacity_bps, announced.link2_capacity_bps)
            self._changed_edges[name] = NEVER
        elif announced.role is Role.DEVICE:
            for r in self.ledger.limit_device(name, announced.link1_capacity_bps):
                self._note(r, NEVER)
        elif announced.role is Role.CLOUD:
            if old is None:
                insort(self._cloud_names, name)
            self._cloud_rows.clear()

    def _apply_lost(self, change: NodeLost, now: float) -> None:
        node = self.nodes.pop(change.node, None)
        if node is None:
            raise InvariantError(f"{change!r}: the node is not present")
        self._hash -= node.digest
        self._forget_reach(node.announced)
        self._leases.pop(change.node, None)
        self._set_circuit(change.node, None)  # the node's next process starts with a closed circuit
        if node.announced.role is Role.EDGE:
            self._edge_names.remove(change.node)
            self.ledger.close_edge(change.node)
            self._changed_edges.pop(change.node, None)
        elif node.announced.role is Role.DEVICE:
            self.ledger.limit_device(change.node, 0)
        elif node.announced.role is Role.CLOUD:
            self._cloud_names.remove(change.node)
            self._cloud_rows.clear()

    def _apply_circuit(self, change: CircuitChanged, now: float) -> None:
        self._set_circuit(change.node, Circuit(change.failures, change.until_s) if change.failures else None)

    def _set_circuit(self, node: str, circuit: Circuit | None) -> None:
        old = self.circuits.pop(node, None)
        if old is not None:
            self._hash -= hash_of(old.text(node))
        if circuit is not None:
            self.circuits[node] = circuit
            self._hash += hash_of(circuit.text(node))

    def _places(self, placed: Placed) -> list[str]:
        """The nodes at which an attempt can fail: the edge and the clouds that it uses, or the device if it runs alone."""
        placement = placed.placement
        if placement.edge is None:
            return [placed.device]
        return [placement.edge, *self._cloud_names] if placement.uses_cloud else [placement.edge]

    def _drop_probes(self, task: Task) -> None:
        """Clear the task as the probe of every half-open circuit."""
        if self.circuits and task.placed is not None:
            for node in self._places(task.placed):
                circuit = self.circuits.get(node)
                if circuit is not None and circuit.probe == task.task_id:
                    self._set_circuit(node, circuit._replace(probe=None))

    def _release(self, task: Task, now: float) -> Reservation:
        r = self.ledger.release(task.task_id, now)
        self._running -= r.running
        self._note(r, max(r.end_s, now))  # an end on time (`now`) affects only tasks that are due
        return r

    def _note(self, r: Reservation, until: float) -> None:
        edge, device = r.edge, r.device
        if edge is not None and until >= self._changed_edges.get(edge, until):
            self._changed_edges[edge] = until
        if device is not None and until >= self._changed_devices.get(device, until):
            self._changed_devices[device] = until

    def _step(self, task: Task, step: Step, at_s: float) -> None:
        before, history = task.state, task.history
        to = TRANSITIONS.get((before, step))
        task.state = next_state(task.task_id, before, step, history) if to is None else to
        queued = task.state in _QUEUED
        if queued != (before in _QUEUED):
            self._count_queued(task, +1 if queued else -1)
        history.append((before, step, at_s))
        if len(history) > 2 * HISTORY:
            del history[:-HISTORY]

    def _count_queued(self, task: Task, by: int) -> None:
        """Add `by` to the number of queued tasks (WAITING or SCHEDULED) of the task's device."""
        device, counts = task.submitted.device, self._queued_by_device
        counts[device] += by
        if not counts[device]:
            del counts[device]

    def contradicts(self, submitted: TaskSubmitted) -> bool:
        """Whether a remembered task has the same id but different content."""
        task = self.tasks.get(submitted.task_id)
        known = self.ended.content(submitted.task_id) if task is None else content_of(task.submitted)
        return known is not None and known != content_of(submitted)

    # --- leases and timers -------------------------------------------------------------------------------------------

    def _renew(self, name: str, incarnation: str, now: float) -> None:
        node = self.nodes.get(name)
        if node is None or node.announced.incarnation != incarnation:
            return
        until = now + node.announced.lease_s
        if name not in self._leases or until < self._leases[name]:
            heappush(self._lease_heap, (until, name))
        self._leases[name] = until

    def _next_lease(self) -> float:
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

    def _next_deadline(self) -> float:
        heap = self._deadlines
        while heap:
            at_s, seq, task_id = heap[0]
            task = self.tasks.get(task_id)
            if task is not None and task.seq == seq:
                return at_s
            heappop(heap)
        return NEVER

    def _next_impatience(self) -> float:
        """Ledger time at which the patience of the longest WAITING task ends."""
        for task in self._waiting.values():  # in the order in which they became WAITING
            return task.waiting_since_s + self.patience_s
        return NEVER

    def restart_leases(self, now: float) -> None:
        """Start every lease again in full, after a restart."""
        self.now_s = max(self.now_s, now)
        self._leases = {name: now + node.announced.lease_s for name, node in self.nodes.items()}
        self._lease_heap = [(until, name) for name, until in self._leases.items()]
        heapify(self._lease_heap)

    def _forget_reach(self, changed: NodeAnnounced) -> None:
        """Clear the cached `reach` of every device that may use a node that joined, changed or left."""
        if changed.role is Role.DEVICE:
            return  # a device that joins gets a new `Node` with an empty cache
        for node in self.nodes.values():
            reachable = node.announced.reachable_edges
            if changed.role is Role.CLOUD or reachable is None or changed.node in reachable:
                node.reach.clear()

    def next_wakeup(self) -> float | None:
        """Ledger time of the next lease expiry, deadline or end of patience, or None; a `Tick` is due then."""
        wakeup = self._next_lease()
        if self._deadlines:
            wakeup = min(wakeup, self._next_deadline())
        if self._waiting:
            wakeup = min(wakeup, self._next_impatience())
        return None if wakeup == NEVER else wakeup

    # --- the state as a value ----------------------------------------------------------------------------------------

    @property
    def state_hash(self) -> str:
        """A 128-bit hash of tasks, reservations, nodes, circuits and ended tasks, updated incrementally."""
        if self._touched:
            reservations = self.ledger.reservations
            for task_id, task in self._touched.items():
                digest = hash_of(task.text(reservations.get(task_id)))
                self._hash += digest - task.digest
                task.digest = digest
            self._touched.clear()
        self._hash = (self._hash + self.ended.hash_change()) & HASH_MASK
        return f"{(self._hash + self._seq) & HASH_MASK:032x}"

    @property
    def live_tasks(self) -> int:
        """The number of tasks that have not ended."""
        return len(self.tasks)


def reservation_of(task: Task, placed: Placed) -> Reservation:
    """The reservation of a placement."""
    placement = placed.placement
    return Reservation(
        task.task_id,
        task.seq,
        placement.edge,
        placed.device,
        placed.start_s,
        placed.delay_s,
        int(placement.cut1 != placement.cut2),
        placement.link1_bps,
        placement.link2_bps,
        computes=placement.cut1 > 0,
    )


APPLY: Final[dict[type, Callable[[RegionState, Any, float], None]]] = {
    Admitted: RegionState._apply_admitted,
    Placed: RegionState._apply_placed,
    BandwidthGrant: RegionState._apply_grant,
    Start: RegionState._apply_start,
    Moved: RegionState._apply_moved,
    Overran: RegionState._apply_overran,
    Retried: RegionState._apply_retried,
    Ended: RegionState._apply_ended,
    NodeJoined: RegionState._apply_joined,
    NodeLost: RegionState._apply_lost,
    CircuitChanged: RegionState._apply_circuit,
}
"""The handler of each type of change; `apply` looks it up here."""
