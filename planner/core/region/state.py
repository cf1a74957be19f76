"""The state of one region's planner, and its only mutator.

`RegionState.apply` treats a new change and a change read from the decision topic in the same way, so folding the records
rebuilds the state and its hash. Derived values (heaps and counts) are rebuilt by `apply` and are not hashed. Leases are soft
state: see `restart_leases`. Other objects read the public members; only the methods of this class change them.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from bus.errors import InvariantError
from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    CircuitChanged,
    Decision,
    Ended,
    Learned,
    Moved,
    NodeAnnounced,
    NodeJoined,
    NodeLost,
    Overran,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.values import Role
from planner.core.region.circuits import Circuit
from planner.core.region.records import (
    HASH_MASK,
    HISTORY,
    NEVER,
    REVIEW_S,
    EndedTasks,
    KnownNode,
    Task,
    content_of,
    hash_of,
)
from planner.core.region.timers import Timers
from planner.core.region.transitions import ENDING, TRANSITIONS, Step, next_state
from planner.core.region.under_way import UnderWay
from planner.learning.table import EstimateTable, SavedEstimate
from planner.search.cost import RowTable
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import FOREVER, LOAD_UNITS, Load, Reservation

_SESSIONS_FIRST: Final = 1 << 120  # of tasks with the same start, sessions come first, ...
_OVERTAKERS_FIRST: Final = 1 << 100  # ... then those that were put before others, by rank
_QUEUED: Final = (TaskState.WAITING, TaskState.SCHEDULED)


class SavedTask(NamedTuple):
    """A live task as a value."""

    submitted: TaskSubmitted
    seq: int
    state: TaskState
    attempt: int
    deadline_s: float
    waiting_since_s: float
    placed: Placed | None
    avoided: tuple[str, ...]
    held: tuple[float, float, int] | None  # start, end and moves of its reservation
    uncounted: int  # attempts that do not count
    admitted_s: float


class SavedRegion(NamedTuple):
    """The state of a region as a value, except its nodes, which are restored by `NodeJoined`."""

    now_s: float
    admitted: int
    circuits: list[tuple[str, Circuit]]  # by name
    tasks: list[SavedTask]
    ended: list[list[str]]
    taught: int  # tasks that have taught something
    estimates: list[SavedEstimate]


class RegionState:
    """The state of a region. Raises `InvariantError` for an impossible change and is unusable afterwards."""

    def __init__(
        self, region: int, ledger: Ledger, *, patience_s: float, remember_ended: int, max_estimates: int
    ) -> None:
        """`ledger` is empty. The limits are those of `planner.core.options.CoreOptions`."""
        self.region = region
        self.patience_s = patience_s
        self.now_s = float("-inf")  # the latest `now` seen
        self.ledger = ledger
        self.tasks: dict[str, Task] = {}  # live tasks
        self.waiting: dict[str, Task] = {}  # WAITING tasks, in the order in which they became WAITING
        self.queued_by_device: Counter[str] = Counter()  # tasks that wait or are scheduled
        self.running = 0  # number of RUNNING tasks
        self.under_way = UnderWay()  # the same by edge and model
        self.admitted = 0  # tasks admitted so far
        self.ended = EndedTasks(remember_ended)
        self.nodes: dict[str, KnownNode] = {}
        self.edge_names: list[str] = []  # ascending
        self.cloud_names: list[str] = []  # ascending
        self.circuits: dict[str, Circuit] = {}  # of nodes at which the last attempt failed
        self.estimates = EstimateTable(max_estimates)
        self.timers = Timers(self.tasks, self.ledger.reservations)
        # Edges and devices changed since the last `settled`: name -> time until which resources were freed. NEVER: any
        # other change, so every scheduled task there must be checked.
        self.changed_edges: dict[str, float] = {}
        self.changed_devices: dict[str, float] = {}
        self.overtaken = False  # since the last `walked`: whether a task was put before scheduled ones
        self.session_ended = False  # since the last `settled`: sessions that wait may fit now
        self._hash = 0  # sum of all hashes; changes of the tasks in _touched are still missing
        self._touched: dict[str, Task] = {}
        self._rows = RowTable()
        self._watchers: list[Callable[[NodeAnnounced], None]] = []
        self._load_watchers: list[Callable[[str], None]] = []

    def watch_nodes(self, watcher: Callable[[NodeAnnounced], None]) -> None:
        """Call `watcher` whenever a node has joined, changed or left, so that it can drop what it has cached."""
        self._watchers.append(watcher)

    def watch_loads(self, watcher: Callable[[str], None]) -> None:
        """Call `watcher` with the name of an edge or device whose sessions have changed."""
        self._load_watchers.append(watcher)

    def _tell_load(self, r: Reservation) -> None:
        for watcher in self._load_watchers:
            for name in (r.edge, r.device):
                if name is not None:
                    watcher(name)

    # --- the only mutator --------------------------------------------------------------------------------------------

    def fold(self, decision: Decision) -> None:
        """Apply a recorded decision. The caller compares `state_hash` with the hash in the record."""
        for change in decision.changes:
            self.apply(change, decision.now_s)
        self.settled(decision.now_s)

    def settled(self, now: float) -> None:
        """Mark all changes of a record as applied: the record contains the walk, so no further walk is needed."""
        self.now_s = max(self.now_s, now)
        self.session_ended = False
        self.walked()

    def walked(self) -> None:
        """Mark every changed edge and device as rescheduled."""
        self.changed_edges.clear()
        self.changed_devices.clear()
        self.overtaken = False

    def advance(self, now: float) -> float:
        """Advance ledger time to `now`; it never decreases. Return ledger time."""
        if now > self.now_s:
            self.now_s = float(now)
        return self.now_s

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
        self.admitted += 1
        task = Task(submitted, self.admitted, now)
        task.history.append((None, Step.ADMITTED, now))
        self.tasks[task_id] = self._touched[task_id] = self.waiting[task_id] = task
        self._count_queued(task, +1)
        self.timers.add_deadline(task)

    def _apply_placed(self, change: Placed, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.PLACED, change.start_s)
        if change.attempt != task.attempt:
            raise InvariantError(f"{task!r}: placement names attempt {change.attempt}")
        task.placed = change
        del self.waiting[task.task_id]
        r = reservation_of(task, change)
        self.ledger.reserve(r, now)
        if r.load is not None:
            self._note(r, NEVER)  # a session goes before all scheduled tasks, which the walk moves
            self._tell_load(r)
        if change.line is not None and change.line.overtakes:
            self.overtaken = True
            self._note(r, NEVER)
        if task.avoided or self.circuits:
            for node in self.places(change):
                if node in task.avoided:
                    task.avoided = ()  # no other node was available, so the list starts again
                circuit = self.circuits.get(node)
                if circuit is not None and circuit.wants_probe(now) and r.load is None:
                    self._set_circuit(node, circuit._replace(probe=task.task_id))
        if r.load is None:  # a session ends much later, so it cannot test a stale estimate soon
            self.estimates.placed(change, self.cloud_names, now)

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
        self.running += 1
        if task.placed is not None:
            self.under_way.add(task.placed)
        if r.load is None:
            self.timers.add_end(task, r.end_s)
        else:
            self.timers.add_review(task, change.at_s + REVIEW_S)

    def _apply_moved(self, change: Moved, now: float) -> None:
        for task_id, start_s in zip(change.task_ids, change.starts_s, strict=True):
            self._step(self._live(task_id, change), Step.MOVED, start_s)
            self._note(self.ledger.reservations[task_id], NEVER)
            self.ledger.move(task_id, start_s, counts=not change.overtaken)

    def _apply_overran(self, change: Overran, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.OVERRAN, change.to_s)
        r = self.ledger.reservations[task.task_id]
        self.ledger.prolong(task.task_id, change.to_s)
        self.timers.add_end(task, change.to_s)
        # If the longer reservation overlaps scheduled tasks, the walk must move them; otherwise no other task is affected.
        self._note(r, NEVER if self.ledger.overbooked(r, max(change.from_s, now)) else now)

    def _apply_rerouted(self, change: Rerouted, now: float) -> None:
        task = self._live(change.task_id, change)
        self._step(task, Step.REROUTED, change.from_s)
        placed = task.placed
        if placed is None or change.attempt != task.attempt or placed.session is not None:
            raise InvariantError(f"{task!r} has no placement that {change!r} could change")
        r = self.ledger.reservations[task.task_id]
        new = change.applied_to(placed, r.start_s)
        if self.places(new) != self.places(placed):
            self._drop_probes(task)
        self.under_way.add(placed, -1)
        self.under_way.add(new)
        task.placed = placed = new
        self._note(r, max(r.end_s, now))  # what it takes is free, so only what it gives back affects other tasks
        self.ledger.rebook(r, reservation_of(task, placed), now)
        self.timers.add_end(task, r.end_s)

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
        if not task.counts(change.cause, now):
            task.uncounted += 1
        task.attempt = change.attempt
        task.placed = None
        task.waiting_since_s = now
        self.waiting[task.task_id] = task

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
        self.waiting.pop(task_id, None)
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
        node = self.nodes[name] = KnownNode(announced, self._rows)
        self._hash += node.digest - (old.digest if old is not None else 0)
        if announced.role is Role.EDGE:
            if old is None:
                insort(self.edge_names, name)
            self.ledger.open_edge(name, announced.slots, announced.link1_capacity_bps, announced.link2_capacity_bps)
            self.changed_edges[name] = NEVER
        elif announced.role is Role.DEVICE:
            for r in self.ledger.limit_device(name, announced.link1_capacity_bps):
                self._note(r, NEVER)
        elif announced.role is Role.CLOUD and old is None:
            insort(self.cloud_names, name)
        self._tell_watchers(announced)
        changed = node.other_batches(old) if old is not None else ()
        self.estimates.joined(name, [(row.model, row.compute_s[-1]) for row in node.rows.values()], changed)

    def _apply_lost(self, change: NodeLost, now: float) -> None:
        node = self.nodes.pop(change.node, None)
        if node is None:
            raise InvariantError(f"{change!r}: the node is not present")
        self._hash -= node.digest
        self.timers.drop_lease(change.node)
        self._set_circuit(change.node, None)  # the node's next process starts with a closed circuit
        if node.announced.role is Role.EDGE:
            self.edge_names.remove(change.node)
            self.ledger.close_edge(change.node)
            self.changed_edges.pop(change.node, None)
        elif node.announced.role is Role.DEVICE:
            self.ledger.limit_device(change.node, 0)
        elif node.announced.role is Role.CLOUD:
            self.cloud_names.remove(change.node)
        self._tell_watchers(node.announced)

    def _tell_watchers(self, changed: NodeAnnounced) -> None:
        for watcher in self._watchers:
            watcher(changed)

    def _apply_circuit(self, change: CircuitChanged, now: float) -> None:
        self._set_circuit(change.node, Circuit(change.failures, change.until_s) if change.failures else None)

    def _apply_learned(self, change: Learned, now: float) -> None:
        self.estimates.apply(change, self._whole_s, now)

    def _whole_s(self, node: str, model: str) -> float:
        """The time of one sample of a model on a node, by its profile; 0 if it does not run the model."""
        present = self.nodes.get(node)
        row = None if present is None else present.rows.get(model)
        return 0.0 if row is None else row.compute_s[-1]

    def _set_circuit(self, node: str, circuit: Circuit | None) -> None:
        old = self.circuits.pop(node, None)
        if old is not None:
            self._hash -= hash_of(old.text(node))
        if circuit is not None:
            self.circuits[node] = circuit
            self._hash += hash_of(circuit.text(node))

    def places(self, placed: Placed) -> list[str]:
        """The nodes at which an attempt can fail: the edge and the clouds that it uses, or the device if it runs alone."""
        placement = placed.placement
        if placement.edge is None:
            return [placed.device]
        return [placement.edge, *self.cloud_names] if placement.uses_cloud else [placement.edge]

    def _drop_probes(self, task: Task) -> None:
        """Clear the task as the probe of every half-open circuit."""
        if self.circuits and task.placed is not None:
            for node in self.places(task.placed):
                circuit = self.circuits.get(node)
                if circuit is not None and circuit.probe == task.task_id:
                    self._set_circuit(node, circuit._replace(probe=None))

    def _release(self, task: Task, now: float) -> Reservation:
        r = self.ledger.release(task.task_id, now)
        self.running -= r.running
        if r.running and task.placed is not None:
            self.under_way.add(task.placed, -1)
        self._note(r, max(r.end_s, now))  # an end on time (`now`) affects only tasks that are due
        if r.load is not None:
            self.session_ended = True
            self._tell_load(r)
        return r

    def _note(self, r: Reservation, until: float) -> None:
        edge, device = r.edge, r.device
        if edge is not None and until >= self.changed_edges.get(edge, until):
            self.changed_edges[edge] = until
        if device is not None and until >= self.changed_devices.get(device, until):
            self.changed_devices[device] = until

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
        device, counts = task.submitted.device, self.queued_by_device
        counts[device] += by
        if not counts[device]:
            del counts[device]

    def contradicts(self, submitted: TaskSubmitted) -> bool:
        """Whether a remembered task has the same id but different content."""
        task = self.tasks.get(submitted.task_id)
        known = self.ended.content(submitted.task_id) if task is None else content_of(task.submitted)
        return known is not None and known != content_of(submitted)

    # --- leases and timers -------------------------------------------------------------------------------------------

    def renew(self, name: str, incarnation: str, now: float) -> None:
        """Renew the lease of a node that is present in this incarnation."""
        node = self.nodes.get(name)
        if node is not None and node.announced.incarnation == incarnation:
            self.timers.renew(node, now)

    def next_impatience(self) -> float:
        """Ledger time at which the patience of the longest WAITING task ends."""
        for task in self.waiting.values():
            return task.waiting_since_s + self.patience_s
        return NEVER

    def restart_leases(self, now: float) -> None:
        """Start every lease again in full, after a restart."""
        self.now_s = max(self.now_s, now)
        self.timers.restart_leases(self.nodes, now)

    def next_wakeup(self) -> float | None:
        """Ledger time of the next lease expiry, deadline, end of patience or review, or None; a `Tick` is due then."""
        timers = self.timers
        wakeup = timers.next_lease()
        if timers.deadlines:
            wakeup = min(wakeup, timers.next_deadline())
        if self.waiting:
            wakeup = min(wakeup, self.next_impatience())
        wakeup = min(wakeup, timers.next_review())
        return None if wakeup == NEVER else wakeup

    # --- the state as a value ----------------------------------------------------------------------------------------

    def export(self) -> SavedRegion:
        """A copy of the state, as it is at this moment. It costs about one microsecond per task."""
        reservations = self.ledger.reservations
        tasks = [
            SavedTask(
                task.submitted,
                task.seq,
                task.state,
                task.attempt,
                task.deadline_s,
                task.waiting_since_s,
                task.placed,
                task.avoided,
                None if (r := reservations.get(task.task_id)) is None else (r.start_s, r.end_s, r.moves),
                task.uncounted,
                task.admitted_s,
            )
            for task in self.tasks.values()
        ]
        circuits, ended, estimates = sorted(self.circuits.items()), self.ended.to_state(), self.estimates
        return SavedRegion(self.now_s, self.admitted, circuits, tasks, ended, estimates.taught, estimates.export())

    def load(self, saved: SavedRegion) -> None:
        """Load an exported state into a region that has only nodes. Its nodes must have joined before."""
        self.now_s = saved.now_s
        for task in saved.tasks:
            self._load_task(task)
        for name, circuit in saved.circuits:
            self._set_circuit(name, circuit)
        self.admitted = saved.admitted
        self._hash += self.ended.restore(saved.ended)
        self.estimates.load(saved.taught, saved.estimates)
        self.walked()

    def _load_task(self, saved: SavedTask) -> None:
        task = Task(saved.submitted, saved.seq, saved.waiting_since_s)
        task.state, task.attempt, task.avoided = saved.state, saved.attempt, saved.avoided
        task.deadline_s, task.uncounted = saved.deadline_s, saved.uncounted
        task.admitted_s = saved.admitted_s
        self.tasks[task.task_id] = self._touched[task.task_id] = task
        self.timers.add_deadline(task)
        if task.state is not TaskState.RUNNING:
            self._count_queued(task, +1)
        if saved.placed is None or saved.held is None:
            self.waiting[task.task_id] = task
            return
        task.placed = saved.placed
        r = reservation_of(task, saved.placed)
        r.start_s, r.end_s, r.moves = saved.held
        r.running = task.state is TaskState.RUNNING
        self.ledger.reserve(r, self.now_s)
        if r.load is not None:
            self._tell_load(r)
        if r.running:
            self.running += 1
            self.under_way.add(saved.placed)
            if r.load is None:
                self.timers.add_end(task, r.end_s)
            else:
                self.timers.add_review(task, r.start_s + REVIEW_S)

    @property
    def state_hash(self) -> str:
        """A 128-bit hash of tasks, reservations, nodes, circuits, ended tasks and estimates, updated incrementally."""
        if self._touched:
            reservations = self.ledger.reservations
            for task_id, task in self._touched.items():
                digest = hash_of(task.text(reservations.get(task_id)))
                self._hash += digest - task.digest
                task.digest = digest
            self._touched.clear()
        self._hash = (self._hash + self.ended.hash_change()) & HASH_MASK
        return f"{(self._hash + self.admitted + self.estimates.digest()) & HASH_MASK:032x}"

    @property
    def live_tasks(self) -> int:
        """The number of tasks that have not ended."""
        return len(self.tasks)


def reservation_of(task: Task, placed: Placed) -> Reservation:
    """The reservation of a placement."""
    placement, session = placed.placement, placed.session
    if session is None:
        seq, length_s, load = task.seq, placed.delay_s, None
        slots, computes = int(placement.uses_slot), placement.uses_device
    else:
        # A session goes before every other task with the same start.
        seq, length_s, slots, computes = task.seq - _SESSIONS_FIRST, FOREVER, 0, False
        load = Load(round(session.device_load * LOAD_UNITS), round(session.edge_load * LOAD_UNITS))
    if placed.line is not None and placed.line.overtakes:
        seq += (round(1000.0 * placed.line.rank_s) << 40) - _OVERTAKERS_FIRST  # still unique: fewer than 2**40 tasks
    r = Reservation(
        task.task_id,
        seq,
        placement.edge,
        placed.device,
        placed.start_s,
        length_s,
        slots,
        placement.link1_bps,
        placement.link2_bps,
        computes=computes,
        load=load,
    )
    r.rank = task.rank(placed)
    if placed.rest is not None:
        r.end_s = placed.rest.from_s + placed.rest.delay_s
    return r


APPLY: Final[dict[type, Callable[[RegionState, Any, float], None]]] = {
    Admitted: RegionState._apply_admitted,
    Placed: RegionState._apply_placed,
    BandwidthGrant: RegionState._apply_grant,
    Start: RegionState._apply_start,
    Moved: RegionState._apply_moved,
    Overran: RegionState._apply_overran,
    Rerouted: RegionState._apply_rerouted,
    Retried: RegionState._apply_retried,
    Ended: RegionState._apply_ended,
    NodeJoined: RegionState._apply_joined,
    NodeLost: RegionState._apply_lost,
    CircuitChanged: RegionState._apply_circuit,
    Learned: RegionState._apply_learned,
}
"""The handler of each type of change; `apply` looks it up here."""
