"""The planner's core: events in, changes out. No I/O, no clock, no logging, no randomness.

`handle(event, now)` decides. Every change goes through one mutator, `apply(change, now)`, so folding the recorded changes
rebuilds the same state and the same `state_hash`. The core processes an event in four steps:

1. It applies the event itself: a task ends, a node joins or is lost (its tasks are retried or failed first), or a lease or
   deadline expires.
2. It expires tasks that have not started by their deadline, and gives running tasks that are past their predicted end a
   later one (`Overran`); these keep their reservations.
3. It walks the scheduled tasks of every edge and device that changed (`planner.core.reschedule`): each starts, moves to
   another start, or is retried.
4. It places the retried tasks and the tasks that waited for a node, in order of admission; the new task comes last.

So a task starts only when the resources reserved for it are free of running tasks. Special cases:

* Duplicate submission: ignored if the task is live or among the last `remember_ended` ended tasks.
* Device absent, or no present node can serve the task: the task is WAITING. After `patience_s` it is REJECTED (`no_device`)
  if its device never joined, otherwise FAILED (`device_lost`, `no_node`).
* All edges that the device names are present, but none fits: REJECTED (`never_fits`, `unreachable`). The device does not run
  the model: REJECTED (`unknown_model`).
* Every placement is predicted to end after the deadline: REJECTED (`deadline`) or placed anyway, as `WhenLate` says.
* The task cannot start at once and the queue is full: REJECTED (`queue_full` for more than `max_waiting` queued tasks,
  `device_queue_full` for more than `max_waiting_per_device` of its device).
* An edge or the last cloud is lost: its tasks are retried with the next attempt number. A device is lost: its tasks are
  FAILED (`input_lost`) if only the device had the input; otherwise they wait for it under the next attempt number.
* `TaskCompleted` from the task's device ends the task, whichever attempt it names, because the device has all results.
  `TaskFailed` is ignored unless it names the current attempt; a retryable failure is retried up to `max_attempts` attempts.
* A draining node gets no new tasks and keeps its running ones. Its scheduled tasks are placed elsewhere or wait; tasks of a
  draining device wait.
* Handling an input raised an error: `planner.service.leader_term` rolls the input back, and its task is REJECTED or FAILED
  (`planner_error`). A user's policy raised an error or made an invalid choice: the task is REJECTED (`policy_error`).
* Progress, heartbeats of unknown nodes or old incarnations, and events of tasks that are not live change nothing.

Heartbeats are soft state: they renew leases and are neither recorded nor hashed. After a restart every lease starts again in
full (`restart_leases`). Leases, deadlines and patience are checked only on `Tick`, so a planner that is still catching up
declares no node lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final

from bus.messages import (
    Admitted,
    Change,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeLeft,
    Overran,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.unchecked_constructors import maker
from planner.core import snapshot
from planner.core.membership import Membership
from planner.core.records import NEVER, Task
from planner.core.reschedule import pull, walk
from planner.search.ledger import Reservation

OVERRUN_SHARE: Final = 0.1
"""Share of its delay by which an overrunning task is prolonged, unless it is already later than that."""
OVERRUN_LEAST_S: Final = 0.001
"""Shortest time by which an overrunning task is prolonged."""
MOVES_A_CHANGE: Final = 1_000
"""Limit of moves in one `Moved` change, so that the change fits one record of the decisions topic."""

# Changes are built without validation: their values come from validated messages or are computed here from them.
_admitted, _start, _moved, _overran = maker(Admitted), maker(Start), maker(Moved), maker(Overran)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the core checks leases, deadlines and patience."""


@dataclass(frozen=True, slots=True)
class Unhandled:
    """An input whose handling raised an error and was rolled back; its task ends with cause `planner_error`."""

    message: Any  # the input
    detail: str  # the error text, for people


Event = (
    TaskSubmitted
    | TaskCancelled
    | NodeAnnounced
    | NodeLeft
    | NodeHeartbeat
    | TaskProgress
    | TaskCompleted
    | TaskFailed
    | Tick
    | Unhandled
)


class PlannerCore(Membership):
    """The state of one region's planner and its decisions.

    Raises `InvariantError` for a bug in the planner (a transition missing from the table, a second release). The core is
    unusable after such an error.
    """

    # --- the only entry point ----------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Change]:
        """Process an event at ledger time `now`. Return its changes in order; they are already applied."""
        # ledger time never decreases
        self.now_s = now = float(now) if now > self.now_s else self.now_s
        changes = self._changes = []
        _HANDLERS[type(event)](self, event, now)
        if changes and (
            self._changed_edges or self._changed_devices or self._replan or (self._ends and self._ends[0][0] <= now)
        ):
            self._settle(now)
        self._changes = []
        return changes

    # --- events ------------------------------------------------------------------------------------------------------

    def _on_submitted(self, submitted: TaskSubmitted, now: float) -> None:
        task_id = submitted.task_id
        if task_id in self.tasks or self.ended.get(task_id) is not None:
            return
        self._do(_admitted(task=submitted), now)
        # Overruns and due starts come first, so that the new task is placed against the actual state.
        self._settle(now)
        self._place(self.tasks[task_id], now, fresh=True)

    def _on_completed(self, completed: TaskCompleted, now: float) -> None:
        task = self.tasks.get(completed.task_id)
        if task is not None and task.submitted.device == completed.node:
            placed = task.placed if task.attempt == completed.attempt else None
            self._end(task, TaskState.COMPLETED, now, completed=completed)
            if placed is not None and self.circuits:
                self._count_success(placed, now)

    def _on_failed(self, failed: TaskFailed, now: float) -> None:
        task = self.tasks.get(failed.task_id)
        if task is None or task.attempt != failed.attempt or task.state is TaskState.WAITING:
            return
        failed_at = self._failed_at(task, failed) if failed.retryable else None
        if failed.retryable and task.attempt < self.max_attempts:
            self._retry(task, failed.cause, now, failed.detail, failed_at)
        else:
            self._end(task, TaskState.FAILED, now, cause=failed.cause, detail=failed.detail)
        if failed_at is not None:
            self._count_failure(failed_at, now)

    def _failed_at(self, task: Task, failed: TaskFailed) -> str | None:
        """The node to which the failure of an attempt is attributed, or None if the attempt was not placed.

        This is the reporting node if the attempt used it. If the device reports the failure of an attempt that used an edge,
        the edge did not answer, so the failure is attributed to the edge.
        """
        if task.placed is None:
            return None
        places = self._places(task.placed)
        return failed.node if failed.node in places else places[0]

    def _on_heartbeat(self, heartbeat: NodeHeartbeat, now: float) -> None:
        self._renew(heartbeat.node, heartbeat.incarnation, now)

    def _on_progress(self, progress: TaskProgress, now: float) -> None:
        """Ignore progress: it is meant for people and affects no decision."""

    def _on_cancelled(self, cancelled: TaskCancelled, now: float) -> None:
        task = self.tasks.get(cancelled.task_id)
        if task is not None:
            self._end(task, TaskState.FAILED, now, cause="cancelled")

    def _on_unhandled(self, unhandled: Unhandled, now: float) -> None:
        message = unhandled.message
        if isinstance(message, TaskSubmitted):
            if message.task_id in self.tasks or self.ended.get(message.task_id) is not None:
                return
            self._do(_admitted(task=message), now)
        task = self.tasks.get(getattr(message, "task_id", ""))
        if task is not None:
            state = TaskState.REJECTED if isinstance(message, TaskSubmitted) else TaskState.FAILED
            self._end(task, state, now, cause="planner_error", detail=unhandled.detail)

    def _on_tick(self, tick: Tick, now: float) -> None:
        while self._next_lease() <= now:
            self._lose(self.nodes[self._lease_heap[0][1]], "lease_expired", now)
        while self._next_deadline() <= now:
            self._end(self.tasks[heappop(self._deadlines)[2]], TaskState.EXPIRED, now, cause="deadline")
        while self._next_impatience() <= now:
            task = next(iter(self._waiting.values()))
            device = task.submitted.device
            if device not in self.nodes and task.attempt == 1:
                detail = f"{device} has not joined for {self.patience_s:g} s"
                self._end(task, TaskState.REJECTED, now, cause="no_device", detail=detail)
            elif device not in self.nodes:
                detail = f"{device} has not come back for {self.patience_s:g} s"
                self._end(task, TaskState.FAILED, now, cause="device_lost", detail=detail)
            else:
                self._end(task, TaskState.FAILED, now, cause="no_node", detail=self._waited_for(task))

    def _waited_for(self, task: Task) -> str:
        return f"waited for {', or '.join(self.missing(task.submitted)) or 'a node that it may use'}"

    # --- consequences of a change ------------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """Run steps 2 to 4 until nothing changes: expiry and overruns, the walk, and placing of retried or waiting tasks."""
        while True:
            if self._deadlines:
                self._expire_unstarted(now)
            if self._ends and self._ends[0][0] <= now:
                self._prolong_overdue(now)
            if self._changed_edges or self._changed_devices:
                self._walk(now)
            if not self._replan:
                return
            again, self._replan = sorted(self._replan), []
            for _, task_id in again:
                task = self.tasks.get(task_id)
                if task is not None and task.state is TaskState.WAITING:
                    self._place(task, now)

    def _expire_unstarted(self, now: float) -> None:
        """Expire tasks that have not started by their deadline.

        Running tasks expire on `Tick` only, because their completion may already be on its way.
        """
        running = []
        while self._next_deadline() <= now:
            entry = heappop(self._deadlines)
            task = self.tasks[entry[2]]
            if task.state is TaskState.RUNNING:
                running.append(entry)
            else:
                self._end(task, TaskState.EXPIRED, now, cause="deadline")
        for entry in running:
            heappush(self._deadlines, entry)

    def _prolong_overdue(self, now: float) -> None:
        ends = self._ends
        while ends and ends[0][0] <= now:
            end, _, task_id = heappop(ends)
            r = self.ledger.reservations.get(task_id)
            if r is None or not r.running or r.end_s != end:
                continue  # the task has ended or has a later end already
            late = now - (r.start_s + r.length_s)
            to_s = now + max(OVERRUN_SHARE * r.length_s, late, OVERRUN_LEAST_S)
            self._do(_overran(task_id=task_id, attempt=self.tasks[task_id].attempt, from_s=end, to_s=to_s), now)

    def _walk(self, now: float) -> None:
        edges, devices = self._changed_edges, self._changed_devices
        found: Sequence[tuple[Reservation, float | None]]
        promised = self.ledger.concerned(edges, devices, now)
        if promised is None:
            found = ()
        elif promised < now or NEVER in edges.values() or NEVER in devices.values():
            found = walk(self.ledger, edges, devices, now)
        else:
            found = pull(self.ledger, dict(edges), dict(devices), now)
        moves: list[tuple[str, float]] = []
        for r, start in found:
            task = self.tasks[r.task_id]
            if start is None:
                self._retry(task, "no_longer_fits", now)
            elif start <= now:
                self._do(_start(task_id=r.task_id, attempt=task.attempt, device=task.submitted.device, at_s=start), now)
            else:
                moves.append((r.task_id, start))
        for first in range(0, len(moves), MOVES_A_CHANGE):
            task_ids, starts_s = zip(*moves[first : first + MOVES_A_CHANGE], strict=True)
            self._do(_moved(task_ids=task_ids, starts_s=starts_s), now)
        # The walk has already covered every task that its own moves affect, so no second walk is needed.
        self._changed_edges.clear()
        self._changed_devices.clear()

    # --- the state as a value ----------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """All state that affects later decisions, as JSON values. Equal profiles are written once."""
        return snapshot.to_state(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state of `to_state` into a new core. Leases: see `restart_leases`.

        Raises `ConfigError` for a state of another version or region.
        """
        snapshot.restore(self, state)

    @classmethod
    def from_state(cls, state: dict[str, Any], **settings: Any) -> PlannerCore:
        """A core with a state of `to_state` and the settings of `__init__`."""
        core = cls(state["region"], **settings)
        core.restore(state)
        return core

    def validate(self) -> None:
        """Check the invariants that hold between events; see `snapshot.validate`. Raises `InvariantError`. For tests."""
        snapshot.validate(self)


_HANDLERS: Final[dict[type, Callable[[PlannerCore, Any, float], None]]] = {
    TaskSubmitted: PlannerCore._on_submitted,
    TaskCompleted: PlannerCore._on_completed,
    NodeHeartbeat: PlannerCore._on_heartbeat,
    Tick: PlannerCore._on_tick,
    TaskFailed: PlannerCore._on_failed,
    NodeAnnounced: PlannerCore._on_announced,
    NodeLeft: PlannerCore._on_left,
    TaskCancelled: PlannerCore._on_cancelled,
    TaskProgress: PlannerCore._on_progress,
    Unhandled: PlannerCore._on_unhandled,
}
