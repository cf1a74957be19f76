"""The planner's core: events in, changes out. No I/O, no clock, no logging, no randomness.

`handle(event, now)` decides. Every change goes through one mutator, `RegionState.apply(change, now)`, so folding the
recorded changes rebuilds the same state and the same `state_hash`. The core processes an event in four steps:

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
* A session (an open-ended task) is placed by rate instead of length and holds its reservation until its device ends it
  (`planner.core.sessions`). Every 30 s the core looks for a better place for it.
* Progress, heartbeats of unknown nodes or old incarnations, and events of tasks that are not live change nothing.

With `CoreOptions.learning`, a completed attempt and the links in a heartbeat correct later predictions: a recorded change
(`Learned`) says what was observed and what follows (`planner.learning`). Running tasks keep their predictions.

Heartbeats are soft state: they renew leases and, except for changed links, are neither recorded nor hashed. After a restart
every lease starts again in full (`restart_leases`). Leases, deadlines and patience are checked only on `Tick`, so a planner
that is still catching up declares no node lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bus.messages import (
    Admitted,
    Change,
    Decision,
    NodeAnnounced,
    NodeHeartbeat,
    NodeLeft,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.unchecked_constructors import maker
from bus.values import Execution, Objective
from planner.core import snapshot
from planner.core.candidates.candidates import Candidates
from planner.core.candidates.searches import MAX_SEARCH_BYTES
from planner.core.change_recorder import ChangeRecorder
from planner.core.choices import check_choice
from planner.core.circuit_breakers import CircuitBreakers
from planner.core.membership import Membership
from planner.core.options import CoreOptions
from planner.core.placing import CheckChoice, Placer, PlacingRules, QueueLimits
from planner.core.region.circuits import Circuit
from planner.core.region.records import EndedTasks, KnownNode, Task
from planner.core.region.state import RegionState
from planner.core.rerouting import Rerouter
from planner.core.settling import Settler, SettlingRules
from planner.core.teacher import Teacher
from planner.learning.table import EstimateTable
from planner.search.ledger.ledger import Ledger
from planner.search.placements import Choice
from planner.search.policies import Policy, Restriction, check_objective, load_policy, mixes
from planner.search.request import Request

_admitted = maker(Admitted)  # built without validation: the submission is validated


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


@dataclass(frozen=True, slots=True)
class CoreComponents:
    """The replaceable components of a core. Tests replace one to compare it with an oracle, or to plant a bug."""

    check_choice: CheckChoice = check_choice
    settling: SettlingRules = field(default_factory=SettlingRules)
    max_search_bytes: int = MAX_SEARCH_BYTES  # memory limit for prepared searches
    teacher: Callable[[RegionState, Candidates, ChangeRecorder], Teacher] = Teacher
    ledger: Callable[[], Ledger] = Ledger  # creates an empty ledger
    queue_limits: Callable[[RegionState, CoreOptions], QueueLimits] = QueueLimits


class PlannerCore:
    """The state of one region's planner and its decisions.

    It owns the `RegionState` and hands it to the parts that decide: candidates, placing, membership, circuit breakers and
    settling. Raises `InvariantError` for a bug in the planner (a transition missing from the table, a second release). The
    core is unusable after such an error.
    """

    def __init__(
        self,
        region: int = 0,
        policy: str | Policy = "deepar",
        objective: Objective = Objective.SEQUENTIAL,
        execution: Execution | None = None,
        options: CoreOptions | None = None,
        components: CoreComponents | None = None,
    ) -> None:
        options = CoreOptions() if options is None else options
        components = CoreComponents() if components is None else components
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        check_objective(self.policy, objective)
        self.objective = objective
        self.execution = objective.executed_as(execution)
        self._options = options
        self._region = state = RegionState(
            region,
            components.ledger(),
            patience_s=options.patience_s,
            remember_ended=options.remember_ended,
            max_estimates=options.max_estimates,
        )
        self._candidates = Candidates(
            state, objective, components.max_search_bytes, learning=options.learning, mixes=mixes(self.policy)
        )
        self._recorder = ChangeRecorder(state, options.max_attempts)
        self._breakers = CircuitBreakers(state, self._recorder)
        self._membership = Membership(state, self._candidates.clouds, self._recorder)
        self._teacher = components.teacher(state, self._candidates, self._recorder)
        rules = PlacingRules(self.policy, self.execution, options.when_late, options.fair, components.check_choice)
        limits = components.queue_limits(state, options)
        self._placer = Placer(state, self._candidates, self._recorder, self._breakers, limits, rules)
        rerouter = None
        if isinstance(self.policy, Restriction) and self.policy.elastic:
            rerouter = Rerouter(state, self._candidates, self._recorder, self._placer, self.policy)
        self._settler = Settler(state, self._recorder, self._placer, components.settling, rerouter)

    # --- events ------------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Change]:
        """Process an event at ledger time `now`. Return its changes in order; they are already applied."""
        now = self._region.advance(now)
        changes = self._recorder.begin()
        _HANDLERS[type(event)](self, event, now)
        if changes:
            self._settler.settle_if_changed(now)
        return changes

    def _on_submitted(self, submitted: TaskSubmitted, now: float) -> None:
        task_id = submitted.task_id
        region = self._region
        if task_id in region.tasks or region.ended.get(task_id) is not None:
            return
        self._recorder.do(_admitted(task=submitted), now)
        # Overruns and due starts come first, so that the new task is placed against the actual state.
        self._settler.settle(now)
        task = region.tasks.get(task_id)
        if task is not None:  # None: its deadline is so short that it has passed
            self._placer.place(task, now, fresh=True)

    def _on_completed(self, completed: TaskCompleted, now: float) -> None:
        task = self._region.tasks.get(completed.task_id)
        if task is not None and task.submitted.device == completed.node:
            if self._options.learning:
                self._teacher.completed(task, completed, now)
            placed = task.placed if task.attempt == completed.attempt else None
            self._recorder.end(task, TaskState.COMPLETED, now, completed=completed)
            if placed is not None and self._region.circuits:
                self._breakers.count_success(placed, now)

    def _on_failed(self, failed: TaskFailed, now: float) -> None:
        task = self._region.tasks.get(failed.task_id)
        if task is None or task.attempt != failed.attempt or task.state is TaskState.WAITING:
            return
        failed_at = self._failed_at(task, failed) if failed.retryable else None
        if failed.retryable and self._recorder.may_retry(task, failed.cause, now):
            self._recorder.retry(task, failed.cause, now, failed.detail, failed_at)
        else:
            self._recorder.end(task, TaskState.FAILED, now, cause=failed.cause, detail=failed.detail)
        if failed_at is not None:
            self._breakers.count_failure(failed_at, now)

    def _failed_at(self, task: Task, failed: TaskFailed) -> str | None:
        """The node to which the failure of an attempt is attributed, or None if the attempt was not placed.

        This is the reporting node if the attempt used it. If the device reports the failure of an attempt that used an edge,
        the edge did not answer, so the failure is attributed to the edge.
        """
        if task.placed is None:
            return None
        places = self._region.places(task.placed)
        return failed.node if failed.node in places else places[0]

    def _on_heartbeat(self, heartbeat: NodeHeartbeat, now: float) -> None:
        self._region.renew(heartbeat.node, heartbeat.incarnation, now)
        if (heartbeat.links or heartbeat.speeds) and self._options.learning:
            self._teacher.heartbeat(heartbeat, now)

    def _on_progress(self, progress: TaskProgress, now: float) -> None:
        """Ignore progress: it is meant for people and affects no decision."""

    def _on_cancelled(self, cancelled: TaskCancelled, now: float) -> None:
        task = self._region.tasks.get(cancelled.task_id)
        if task is not None:
            self._recorder.end(task, TaskState.FAILED, now, cause="cancelled")

    def _on_unhandled(self, unhandled: Unhandled, now: float) -> None:
        message = unhandled.message
        if isinstance(message, TaskSubmitted):
            if message.task_id in self._region.tasks or self._region.ended.get(message.task_id) is not None:
                return
            self._recorder.do(_admitted(task=message), now)
        task = self._region.tasks.get(getattr(message, "task_id", ""))
        if task is not None:
            state = TaskState.REJECTED if isinstance(message, TaskSubmitted) else TaskState.FAILED
            self._recorder.end(task, state, now, cause="planner_error", detail=unhandled.detail)

    def _on_tick(self, tick: Tick, now: float) -> None:
        region, recorder, timers = self._region, self._recorder, self._region.timers
        while (name := timers.expired_lease(now)) is not None:
            self._membership.lose(region.nodes[name], "lease_expired", now)
        while (expired := timers.pop_expired(now)) is not None:
            recorder.end(expired, TaskState.EXPIRED, now, cause="deadline")
        self._placer.review_sessions(now)
        while region.next_impatience() <= now:
            task = next(iter(region.waiting.values()))
            device = task.submitted.device
            if device not in region.nodes and task.attempt == 1:
                detail = f"{device} has not joined for {region.patience_s:g} s"
                recorder.end(task, TaskState.REJECTED, now, cause="no_device", detail=detail)
            elif device not in region.nodes:
                detail = f"{device} has not come back for {region.patience_s:g} s"
                recorder.end(task, TaskState.FAILED, now, cause="device_lost", detail=detail)
            else:
                recorder.end(task, TaskState.FAILED, now, cause="no_node", detail=self._waited_for(task))

    def _waited_for(self, task: Task) -> str:
        return f"waited for {', or '.join(self._candidates.missing(task.submitted)) or 'a node that it may use'}"

    def _on_announced(self, announced: NodeAnnounced, now: float) -> None:
        self._membership.announced(announced, now)

    def _on_left(self, left: NodeLeft, now: float) -> None:
        self._membership.left(left, now)

    # --- recorded decisions ------------------------------------------------------------------------------------------

    def apply(self, change: Change, now: float) -> None:
        """Apply one recorded change; see `RegionState.apply`."""
        self._region.apply(change, now)

    def fold(self, decision: Decision) -> None:
        """Apply a recorded decision; see `RegionState.fold`."""
        self._region.fold(decision)

    def settled(self, now: float) -> None:
        """Mark all changes of a record as applied; see `RegionState.settled`."""
        self._region.settled(now)

    # --- questions ---------------------------------------------------------------------------------------------------

    def request(
        self, submitted: TaskSubmitted, avoid: Collection[str] = (), objective: Objective | None = None
    ) -> Request | str | None:
        """The input of Algorithm 1 for a task; see `Candidates.request`. `objective`: from now on; None: as before."""
        if objective is not None:
            self._candidates.plan_for(objective)
        return self._candidates.request(submitted, avoid)

    def missing(self, submitted: TaskSubmitted) -> tuple[str, ...]:
        """The nodes that a waiting task needs, in words; see `Candidates.missing`."""
        return self._candidates.missing(submitted)

    def decide(self, submitted: TaskSubmitted, now: float) -> Choice | None:
        """The policy's choice for a task at this moment, without booking it. None: no placement is possible."""
        return self._placer.decide(submitted, now)

    def contradicts(self, submitted: TaskSubmitted) -> bool:
        """Whether a remembered task has the same id but different content."""
        return self._region.contradicts(submitted)

    def next_wakeup(self) -> float | None:
        """Ledger time of the next lease expiry, deadline, end of patience or review, or None; a `Tick` is due then."""
        return self._region.next_wakeup()

    def restart_leases(self, now: float) -> None:
        """Start every lease again in full, after a restart."""
        self._region.restart_leases(now)

    @property
    def region(self) -> int:
        """The number of the region."""
        return self._region.region

    @property
    def options(self) -> CoreOptions:
        """The options that the core was created with."""
        return self._options

    @property
    def now_s(self) -> float:
        """The latest ledger time seen."""
        return self._region.now_s

    @property
    def ledger(self) -> Ledger:
        """The reservations."""
        return self._region.ledger

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The live tasks by id."""
        return self._region.tasks

    @property
    def nodes(self) -> Mapping[str, KnownNode]:
        """The nodes that are present, by name."""
        return self._region.nodes

    @property
    def ended(self) -> EndedTasks:
        """The most recently ended tasks."""
        return self._region.ended

    @property
    def estimates(self) -> EstimateTable:
        """What was learned of nodes, paths and links."""
        return self._region.estimates

    @property
    def circuits(self) -> Mapping[str, Circuit]:
        """The circuits of nodes at which the last attempt failed."""
        return self._region.circuits

    @property
    def live_tasks(self) -> int:
        """The number of tasks that have not ended."""
        return len(self._region.tasks)

    @property
    def timer_entries(self) -> int:
        """The number of entries in the heaps of deadlines and ends, outdated ones included."""
        return len(self._region.timers.ends) + len(self._region.timers.deadlines)

    @property
    def search_bytes(self) -> int:
        """Memory that the prepared searches hold."""
        return self._candidates.searches.held_bytes

    @property
    def state_hash(self) -> str:
        """A 128-bit hash of tasks, reservations, nodes, circuits and ended tasks, updated incrementally."""
        return self._region.state_hash

    # --- the state as a value ----------------------------------------------------------------------------------------

    def image(self) -> snapshot.Image:
        """A copy of the state, to be written in pieces."""
        return snapshot.Image(self._region)

    def to_state(self) -> dict[str, Any]:
        """All state that affects later decisions, as JSON values. Equal profiles are written once."""
        return self.image().to_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state of `to_state` into a new core. Leases: see `restart_leases`.

        Raises `ConfigError` for a state of another version or region.
        """
        snapshot.restore(self._region, state)

    @classmethod
    def from_state(
        cls,
        state: dict[str, Any],
        policy: str | Policy = "deepar",
        objective: Objective = Objective.SEQUENTIAL,
        options: CoreOptions | None = None,
    ) -> PlannerCore:
        """A core with a state of `to_state`."""
        core = cls(state["region"], policy, objective, options=options)
        core.restore(state)
        return core

    def validate(self) -> None:
        """Check the invariants that hold between events; see `snapshot.validate`. Raises `InvariantError`. For tests."""
        snapshot.validate(self._region)


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
