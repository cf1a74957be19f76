"""The planner's core: events in, changes out. No I/O, no clock, no logging, no randomness.

`handle(event, now)` decides, and every change that it decides goes through one mutator, `apply(change, now)`; so folding
recorded changes rebuilds the same state, and with it the same `state_hash`. An event is taken in this order:

1. what it says itself: a task ends, a node joins or is lost (its tasks are taken back first), a lease or deadline is over;
2. tasks that have not started by their deadline are EXPIRED;
   running tasks whose predicted end has passed are given a later one (`Overran`): they hold what they hold;
3. the scheduled tasks of every edge and device that changed are walked (`planner.core.reschedule`): they start,
move, or are taken back;
4. tasks that were taken back, and tasks that waited for a node, are placed, in order of admission; then the new task.

So a task starts only when no running task holds what it was promised. What the core does with the odd cases:

* A second submission of a task is ignored while it is among the live or the last `remember_ended` ended ones.
* A task whose device is not there, or that nothing which is there can serve, is WAITING. After `patience_s` it is REJECTED
  (`no_device`) where its device never came, else FAILED (`device_lost`, `no_node`).
  With every edge there that its device names and still no candidate, it is REJECTED (`never_fits`, `unreachable`); a device
  without the model: REJECTED, `unknown_model`.
* A task that no placement is predicted to end by its deadline is REJECTED (`deadline`), or placed all the same
  (`WhenLate`).
* A task that cannot start at once is REJECTED (`queue_full`) when `max_waiting` tasks wait or are scheduled, or
  `max_waiting_per_device` of its own device's (`device_queue_full`).
* A lost edge's (or the last cloud's) tasks are retried: attempt + 1, placed again. A lost device's tasks are FAILED
  (`input_lost`) if only it had the input, and WAITING for it under the next attempt otherwise.
* `TaskCompleted` from the task's device ends it whatever attempt it names, even one that was taken back: the device has all
  results. `TaskFailed` of another attempt than the present one is ignored; a retryable one is retried, at most
  `max_attempts` times.
* A node that announces that it drains gets no new task and keeps what runs there; what was scheduled there is placed
  elsewhere, or waits, as while a draining device's tasks do.
* An input whose handling raised is taken back with all it did (`planner.service.leader_term`); its task is REJECTED or FAILED
  (`planner_error`). A task for which a user's policy raises, or chooses what cannot be, is REJECTED (`policy_error`).
* Progress, heartbeats of strangers and of old incarnations, events of tasks that are not live: no change.

Heartbeats are soft state: they renew a lease, are in no record and in no hash; after a restart leases begin anew
(`restart_leases`). Leases, deadlines and patience are looked at on `Tick` only, so a planner that is still catching up
declares nobody lost.
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
"""A task past its predicted end is assumed to take a tenth of its delay more, or as long as it is late, if that is longer."""
OVERRUN_LEAST_S: Final = 0.001
MOVES_A_CHANGE: Final = 1_000
"""A longer queue is moved by several changes, so that each fits a record of the decisions."""

# Decisions carry what has been validated when it came in, or was computed here from that.
_admitted, _start, _moved, _overran = maker(Admitted), maker(Start), maker(Moved), maker(Overran)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: leases, deadlines and patience are looked at."""


@dataclass(frozen=True, slots=True)
class Unhandled:
    """Handling an input failed in an earlier try, which left no trace; its task ends with the cause."""

    message: Any  # the input
    detail: str  # the error, for people


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
    """All that the planner of one region knows, and how it decides.

    Raises `InvariantError` where a bug of ours shows (a transition that is not in the table, a second release); such an
    error leaves the core unusable.
    """

    # --- the one way in ----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Change]:
        """Take an event at ledger time `now`; the changes it makes, already applied, in order."""
        # ledger time does not go back
        self.now_s = now = float(now) if now > self.now_s else self.now_s
        changes = self._changes = []
        _TAKE[type(event)](self, event, now)
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
        # overruns and due starts first: the new task plans with what is so, not with what was predicted
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
        """Where an attempt failed that may succeed elsewhere: the node that says so, if the attempt could have used another.

        A device that says so has waited in vain for its edge, unless it ran the task alone.
        """
        if task.placed is None:
            return None
        places = self._places(task.placed)
        return failed.node if failed.node in places else places[0]

    def _on_heartbeat(self, heartbeat: NodeHeartbeat, now: float) -> None:
        self._renew(heartbeat.node, heartbeat.incarnation, now)

    def _on_progress(self, progress: TaskProgress, now: float) -> None:
        """For people; nothing is decided by it."""

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

    # --- what follows from a change ----------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """Steps 2 to 4: overruns, the walk, and placing what is without a place."""
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
        """What has not started by its deadline never starts. What runs is looked at on `Tick`: its end may be on its way."""
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
                continue  # it has ended, or been prolonged
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
        # what the walk did needs no other walk: it has looked at all that its moves concern
        self._changed_edges.clear()
        self._changed_devices.clear()

    # --- the state as a value ----------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Everything that decides what will happen, as JSON can carry it. Equal profiles are written once."""
        return snapshot.to_state(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Take on a state of `to_state`; the core must be new. Leases: see `restart_leases`.

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
        """Check all that must hold between events; see `snapshot.validate`. Raises `InvariantError`. For tests."""
        snapshot.validate(self)


_TAKE: Final[dict[type, Callable[[PlannerCore, Any, float], None]]] = {
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
