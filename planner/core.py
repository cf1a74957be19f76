"""The planner's core: events in, changes out. No I/O, no clock, no logging, no randomness.

`handle(event, now)` decides, and every change that it decides goes through one mutator, `apply(change, now)`; so folding
recorded changes rebuilds the same state, and with it the same `state_hash`. An event is taken in this order:

1. what it says itself: a task ends, a node joins or is lost (its tasks are taken back first), a lease or deadline is over;
2. running tasks whose predicted end has passed are given a later one (`Overran`): they hold what they hold;
3. the scheduled tasks of every edge and device that changed are walked (`planner.walk`): they start, move, or are taken back;
4. tasks that were taken back, and tasks that waited for a node, are placed, in order of admission; then the new task.

So a task starts only when no running task holds what it was promised. What the core does with the odd cases:

* A second submission of a task is ignored while it is among the live or the last `remember_ended` ended ones.
* A task whose device is not there, or that nothing which is there can serve, is WAITING; after `patience_s` it is FAILED.
  With every node there that it names and still no candidate, it is REJECTED (`never_fits`, `unreachable`); a device
  without the model: REJECTED, `unknown_model`.
* A task that cannot start at once is REJECTED (`queue_full`) when `max_waiting` tasks wait or are scheduled.
* A lost edge's (or the last cloud's) tasks are retried: attempt + 1, placed again. A lost device's tasks are FAILED
  (`input_lost`) if only it had the input, and WAITING for it under the next attempt otherwise.
* `TaskCompleted` from the task's device ends it whatever attempt it names, even one that was taken back: the device has all
  results. `TaskFailed` of another attempt than the present one is ignored; a retryable one is retried, at most
  `max_attempts` times.
* A node that announces that it drains gets no new task and keeps what runs there; what was scheduled there is placed
  elsewhere, or waits, as while a draining device's tasks do.
* Progress, heartbeats of strangers and of old incarnations, events of tasks that are not live: no change.

Heartbeats are soft state: they renew a lease, are in no record and in no hash; after a restart leases begin anew
(`restart_leases`). Leases, deadlines and patience are looked at on `Tick` only, so a planner that is still catching up
declares nobody lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop
from operator import index
from typing import Any, Final

from bus.errors import InvariantError
from bus.makers import maker
from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    Ended,
    HandleInput,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLeft,
    NodeLost,
    Overran,
    Placed,
    Retried,
    Start,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
    TaskSubmitted,
)
from bus.values import Execution, Objective, Role
from planner import snapshot
from planner.algorithm import Algorithm, Choice, EdgeOption, Request, placement_of
from planner.ledger import Reservation
from planner.policies import Policy, Restriction, load_policy
from planner.reach import Reach
from planner.region_state import APPLY, DEFAULT_PATIENCE_S, DEFAULT_REMEMBER_ENDED
from planner.search import DEVICE_CLOUD, DEVICE_EDGE
from planner.tasks import NEVER, Node, Task
from planner.walk import pull, walk

DEFAULT_MAX_WAITING: Final = 10_000
DEFAULT_MAX_ATTEMPTS: Final = 100
OVERRUN_SHARE: Final = 0.1
"""A task past its predicted end is assumed to take a tenth of its delay more, or as long as it is late, if that is longer."""
OVERRUN_LEAST_S: Final = 0.001

# Decisions carry what has been validated when it came in, or was computed here from that.
_admitted, _placed, _granted, _start = maker(Admitted), maker(Placed), maker(BandwidthGrant), maker(Start)
_moved, _overran, _retried, _ended = maker(Moved), maker(Overran), maker(Retried), maker(Ended)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: leases, deadlines and patience are looked at."""


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
)


class PlannerCore(Reach):
    """All that the planner of one region knows, and how it decides.

    Raises `InvariantError` where a bug of ours shows (a transition that is not in the table, a second release); such an
    error leaves the core unusable.
    """

    def __init__(
        self,
        region: int = 0,
        policy: str | Policy = "deepar",
        objective: Objective = Objective.SEQUENTIAL,
        execution: Execution = Execution.SEQUENTIAL,
        max_waiting: int = DEFAULT_MAX_WAITING,
        *,
        patience_s: float = DEFAULT_PATIENCE_S,
        remember_ended: int = DEFAULT_REMEMBER_ENDED,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    ) -> None:
        super().__init__(region, objective, patience_s=patience_s, remember_ended=remember_ended)
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        self.execution = execution
        self.max_waiting = max_waiting
        self.max_attempts = max_attempts
        self._changes: list[Change] = []  # of the step that is being taken
        self._replan: list[tuple[int, str]] = []  # tasks to be placed before it is over

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
            self._end(task, TaskState.COMPLETED, now, completed=completed)

    def _on_failed(self, failed: TaskFailed, now: float) -> None:
        task = self.tasks.get(failed.task_id)
        if task is None or task.attempt != failed.attempt or task.state is TaskState.WAITING:
            return
        if failed.retryable and task.attempt < self.max_attempts:
            self._retry(task, failed.cause, now, failed.detail)
        else:
            self._end(task, TaskState.FAILED, now, cause=failed.cause, detail=failed.detail)

    def _on_heartbeat(self, heartbeat: NodeHeartbeat, now: float) -> None:
        self._renew(heartbeat.node, heartbeat.incarnation, now)

    def _on_progress(self, progress: TaskProgress, now: float) -> None:
        """For people; nothing is decided by it."""

    def _on_cancelled(self, cancelled: TaskCancelled, now: float) -> None:
        task = self.tasks.get(cancelled.task_id)
        if task is not None:
            self._end(task, TaskState.FAILED, now, cause="cancelled")

    def _on_left(self, left: NodeLeft, now: float) -> None:
        node = self.nodes.get(left.node)
        if node is not None and node.announced.incarnation == left.incarnation:
            self._lose(node, "left", now)

    def _on_tick(self, tick: Tick, now: float) -> None:
        while self._next_lease() <= now:
            self._lose(self.nodes[self._lease_heap[0][1]], "lease_expired", now)
        while self._next_deadline() <= now:
            self._end(self.tasks[heappop(self._deadlines)[2]], TaskState.EXPIRED, now, cause="deadline")
        while self._next_impatience() <= now:
            task = next(iter(self._waiting.values()))
            if task.submitted.device not in self.nodes:
                self._end(task, TaskState.FAILED, now, cause="device_lost", detail=task.submitted.device)
            else:
                self._end(task, TaskState.FAILED, now, cause="no_node", detail="nothing joined that it may use")

    def _on_announced(self, announced: NodeAnnounced, now: float) -> None:
        if announced.region != self.region:
            return
        node = self.nodes.get(announced.node)
        if node is not None and node.announced.incarnation == announced.incarnation:
            self._renew(announced.node, announced.incarnation, now)
            if announced == node.announced:
                return
            if announced.role is not node.announced.role:
                self._lose(node, "replaced", now)
            elif announced.role is Role.EDGE:
                self._shrink(announced, now)
        elif node is not None:
            self._lose(node, "replaced", now)
        self._do(NodeJoined(node=announced), now)
        self._renew(announced.node, announced.incarnation, now)
        if node is not None and node.announced.role is announced.role:
            self._take_back_unserved(announced, now)
        if announced.draining:
            return  # nobody waits for it
        if announced.role is Role.DEVICE:
            found = [task for task in self._waiting.values() if task.submitted.device == announced.node]
        else:
            found = [task for task in self._waiting.values() if task.submitted.device in self.nodes]
        for task in found:
            self._replan_later(task)

    def _lose(self, node: Node, cause: str, now: float) -> None:
        """Take back what depends on a node, then drop it."""
        announced = node.announced
        name = announced.node
        if announced.role is Role.EDGE:
            touched = [self.tasks[task_id] for task_id in self.ledger.edges[name].reservations]
        elif announced.role is Role.DEVICE:
            touched = [
                task
                for task in self.tasks.values()
                if task.submitted.device == name and task.state != TaskState.WAITING
            ]
        else:
            others = [other for other in self._cloud_names if other != name]
            touched = [
                task
                for task in self.tasks.values()
                if task.placed is not None
                and task.placed.placement.uses_cloud
                and self._fastest_cloud(others, task.placed.model, task.placed.sha256) is None
            ]
        for task in sorted(touched, key=_seq):
            if announced.role is Role.DEVICE and isinstance(task.submitted.input, HandleInput):
                self._end(task, TaskState.FAILED, now, cause="input_lost", detail=f"{name}: {cause}")
            else:
                self._retry(task, "node_lost", now, f"{name}: {cause}")
        if announced.role is Role.DEVICE:
            for task in sorted(self._waiting.values(), key=_seq):
                if task.submitted.device != name:
                    continue
                if isinstance(task.submitted.input, HandleInput):
                    self._end(task, TaskState.FAILED, now, cause="input_lost", detail=f"{name}: {cause}")
        self._do(NodeLost(node=name, incarnation=announced.incarnation, cause=cause), now)

    def _shrink(self, announced: NodeAnnounced, now: float) -> None:
        """An edge announces less than runs there: take back the latest until the rest fits."""
        running = [r for r in self.ledger.edges[announced.node].reservations.values() if r.running]
        running.sort(key=lambda r: r.key)
        slots = sum(r.slots for r in running)
        link1, link2 = sum(r.link1_bps for r in running), sum(r.link2_bps for r in running)
        while running and (
            slots > announced.slots or link1 > announced.link1_capacity_bps or link2 > announced.link2_capacity_bps
        ):
            r = running.pop()
            slots, link1, link2 = slots - r.slots, link1 - r.link1_bps, link2 - r.link2_bps
            self._retry(self.tasks[r.task_id], "capacity_lowered", now, announced.node)

    def _take_back_unserved(self, announced: NodeAnnounced, now: float) -> None:
        """A node has changed under the same incarnation: what it no longer serves is planned again. Of what a node that
        drains serves, that is what does not run yet.
        """
        name = announced.node
        for task in sorted(self.tasks.values(), key=_seq):
            placed = task.placed
            if placed is None:
                continue
            placement, cause = placed.placement, ""
            if announced.role is Role.DEVICE and task.submitted.device == name:
                reach = announced.reachable_edges
                if self._row(name, placed.model, placed.sha256) is None:
                    cause = "model_gone"
                elif placement.edge is not None and reach is not None and placement.edge not in reach:
                    cause = "edge_unreachable"
            elif announced.role is Role.EDGE and placement.edge == name and placement.uses_slot:
                if self._row(name, placed.model, placed.sha256) is None:
                    cause = "model_gone"
            elif (
                announced.role is Role.CLOUD
                and placement.uses_cloud
                and self._fastest_cloud(self._cloud_names, placed.model, placed.sha256) is None
            ):
                cause = "model_gone"
            if (
                not cause
                and announced.draining
                and task.state is TaskState.SCHEDULED
                and self._waits_for(task, announced)
            ):
                cause = "draining"
            if cause:
                self._retry(task, cause, now, name)

    def _waits_for(self, task: Task, draining: NodeAnnounced) -> bool:
        """Whether a scheduled task is to run with a node that drains, and in the cloud's case with no other."""
        assert task.placed is not None
        placed, placement = task.placed, task.placed.placement
        if draining.role is Role.DEVICE:
            return task.submitted.device == draining.node
        if draining.role is Role.EDGE:
            return placement.edge == draining.node
        return placement.uses_cloud and self._cloud_row(placed.model, placed.sha256) is None

    # --- what follows from a change ----------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """Steps 2 to 4: overruns, the walk, and placing what is without a place."""
        while True:
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
        found: Iterable[tuple[Reservation, float | None]]
        promised = self.ledger.concerned(edges, devices, now)
        if promised is None:
            found = ()
        elif promised < now or NEVER in edges.values() or NEVER in devices.values():
            found = walk(self.ledger, edges, devices, now)
        else:
            found = pull(self.ledger, dict(edges), dict(devices), now)
        for r, start in found:
            task = self.tasks[r.task_id]
            if start is None:
                self._retry(task, "no_longer_fits", now)
            elif start <= now:
                self._do(_start(task_id=r.task_id, attempt=task.attempt, device=task.submitted.device, at_s=start), now)
            else:
                self._do(_moved(task_id=r.task_id, attempt=task.attempt, from_s=r.start_s, to_s=start), now)
        # what the walk did needs no other walk: it has looked at all that its moves concern
        self._changed_edges.clear()
        self._changed_devices.clear()

    def _replan_later(self, task: Task) -> None:
        self._replan.append((task.seq, task.task_id))

    def _retry(self, task: Task, cause: str, now: float, detail: str = "") -> None:
        if task.attempt >= self.max_attempts:
            self._end(task, TaskState.FAILED, now, cause=cause, detail=f"after {task.attempt} attempts; {detail}")
            return
        self._do(_retried(task_id=task.task_id, attempt=task.attempt + 1, cause=cause, detail=detail), now)
        self._replan_later(task)

    def _end(
        self,
        task: Task,
        state: TaskState,
        now: float,
        *,
        cause: str = "",
        detail: str = "",
        completed: TaskCompleted | None = None,
    ) -> None:
        r = self.ledger.reservations.get(task.task_id)
        self._do(
            _ended(
                task_id=task.task_id,
                attempt=task.attempt,
                state=state,
                cause=cause,
                detail=detail,
                edge=None if r is None else r.edge,
                released_slots=0 if r is None else r.slots,
                released_link1_bps=0 if r is None else r.link1_bps,
                released_link2_bps=0 if r is None else r.link2_bps,
                measured=None if completed is None else completed.measured,
                delay_s=None if completed is None else completed.delay_s,
            ),
            now,
        )

    # --- placing -----------------------------------------------------------------------------------------------------
    def decide(self, submitted: TaskSubmitted, now: float) -> Choice | None:
        """What the policy would choose for a task at this moment; nothing is booked. None: nothing will do."""
        request = self.request(submitted)
        return self.policy.place(Algorithm(request, now)) if isinstance(request, Request) else None

    def _place(self, task: Task, now: float, *, fresh: bool = False) -> None:
        """Place a WAITING task, leave it waiting, or reject it."""
        request = self.request(task.submitted)
        if isinstance(request, str):
            detail = f"{task.submitted.device} does not run {task.submitted.model}"
            self._end(task, TaskState.REJECTED, now, cause=request, detail=detail)
            return
        choice = None
        if request is not None:
            choice = self.policy.place(Algorithm(request, now))
            if choice is None and (why := self._hopeless(task, request)) is not None:
                self._end(task, TaskState.REJECTED, now, cause=why[0], detail=why[1])
                return
        if fresh and (choice is None or choice.start_s > now) and self._queued() > self.max_waiting:
            detail = f"{self.max_waiting} tasks wait already"
            self._end(task, TaskState.REJECTED, now, cause="queue_full", detail=detail)
            return
        if request is not None and choice is not None:
            self._book(task, request, choice, now)

    def _queued(self) -> int:
        """Tasks that wait or are scheduled."""
        return len(self.tasks) - self._running

    def _book(self, task: Task, request: Request, choice: Choice, now: float) -> None:
        submitted, row = task.submitted, request.device_row
        if not isinstance(self.policy, Restriction):
            choice = self._plain(choice)
        option = request.edge(choice.edge)
        self._check(request, option, choice, now)
        search = request.device_search if option is None else option.search
        _, edge, cut1, cut2, link1_bps, link2_bps, start_s, delay_s = choice
        task_id, attempt = task.task_id, task.attempt
        placed = _placed(
            task_id=task_id,
            attempt=attempt,
            device=submitted.device,
            model=row.model,
            sha256=row.sha256,
            samples=submitted.samples,
            policy=self.policy.name,
            objective=self.objective,
            execution=self.execution,
            placement=placement_of(request, choice),
            start_s=start_s,
            wait_s=start_s - now,
            delay_s=delay_s,
            parts=search.costs.parts(cut1, cut2, link1_bps, link2_bps, submitted.samples, submitted.input_bytes),
        )
        self._do(placed, now)
        if edge is not None:  # grants tell what has been reserved; they change nothing themselves
            if link1_bps:
                self._changes.append(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=1, bps=link1_bps, from_s=start_s)
                )
            if link2_bps:
                self._changes.append(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=2, bps=link2_bps, from_s=start_s)
                )
        if start_s <= now:
            self._do(_start(task_id=task_id, attempt=attempt, device=submitted.device, at_s=start_s), now)

    def _plain(self, choice: Choice) -> Choice:
        """What a user's policy chose, in numbers of Python's own."""
        try:
            family, edge, cut1, cut2, link1_bps, link2_bps, start_s, delay_s = choice
            whole = (index(cut1), index(cut2), index(link1_bps), index(link2_bps))
            return Choice(index(family), edge, *whole, float(start_s), float(delay_s))
        except (TypeError, ValueError) as error:
            raise InvariantError(f"policy {self.policy.name} chose {choice!r}: {error}") from None

    def _check(self, request: Request, option: EdgeOption | None, choice: Choice, now: float) -> None:
        """A policy may be a user's: what it chose must be free, within the task's caps (11), and make sense.

        No message that is made of it is validated once more.
        """
        end, layers = choice.start_s + choice.delay_s, request.device_row.layers
        good = (
            now <= choice.start_s <= end < NEVER
            and 0 <= choice.cut1 <= choice.cut2 <= layers
            and (choice.edge is None) == (option is None) == (choice.cut1 == layers)
        )
        if good and option is not None:
            good = (
                1 <= choice.link1_bps <= option.max_link1_bps
                and 0 <= choice.link2_bps <= option.max_link2_bps
                and option.account.timeline.fits(
                    choice.start_s, end, int(choice.cut1 != choice.cut2), choice.link1_bps, choice.link2_bps
                )
            )
        if good and choice.cut1 and request.device is not None:
            good = request.device.free(choice.start_s, end)
        if not good:
            raise InvariantError(f"policy {self.policy.name} chose for {request.task_id} what is not free: {choice}")

    def _hopeless(self, task: Task, request: Request) -> tuple[str, str] | None:
        """Cause and detail when no node that may still join could help, else None."""
        device = self.nodes[task.submitted.device].announced
        if device.reachable_edges == ():
            return "unreachable", f"{device.node} reaches no edge, and {self.policy.name} needs one"
        named = self._edge_names if device.reachable_edges is None else list(device.reachable_edges)
        if not named or any(name not in self.nodes or self.nodes[name].draining for name in named):
            return None
        families = self.policy.families if isinstance(self.policy, Restriction) else {DEVICE_CLOUD}
        if all(self.nodes[name].draining for name in self._cloud_names) and not families <= {DEVICE_EDGE}:
            return None
        lacks = []
        for name in named:
            option = next((option for option in request.edges if option.account.name == name), None)
            account = self.ledger.edges.get(name)
            if option is None or account is None:
                lacks.append(f"{name} does not run it")
            else:
                lacks.append(
                    f"{name} has {account.slots} slots and at most {option.max_link1_bps}/{option.max_link2_bps} bit/s for it"
                )
        return "never_fits", "; ".join(lacks[:10])

    def _do(self, change: Change, now: float) -> None:
        APPLY[type(change)](self, change, now)  # what `apply` does, with a call less
        self._changes.append(change)

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


def _seq(task: Task) -> int:
    return task.seq


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
}
