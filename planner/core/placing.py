"""The placing of a task: the policy's choice is checked and booked, or the task waits, or it is rejected with a cause.

The module also holds the operations that all event handlers use: apply a change and list it, end a task, retry a task.
"""

from __future__ import annotations

from enum import StrEnum
from operator import index
from typing import Final

from bus.errors import InvariantError, PolicyError
from bus.messages import (
    BandwidthGrant,
    Change,
    CircuitChanged,
    Ended,
    Placed,
    Retried,
    Start,
    TaskCompleted,
    TaskState,
    TaskSubmitted,
)
from bus.text.units import format_count, format_rate, format_seconds
from bus.unchecked_constructors import maker
from bus.values import Execution, Objective
from planner.core.candidates import Reach
from planner.core.circuits import Circuit, avoided
from planner.core.records import NEVER, Task
from planner.core.state import APPLY, DEFAULT_PATIENCE_S, DEFAULT_REMEMBER_ENDED
from planner.search.algorithm1 import Algorithm, Choice, EdgeOption, Request, placement_of
from planner.search.families import DEVICE_CLOUD, DEVICE_EDGE
from planner.search.policies import Policy, Restriction, load_policy, policy_fault

DEFAULT_MAX_WAITING: Final = 10_000
DEFAULT_MAX_WAITING_PER_DEVICE: Final = 1_000
DEFAULT_MAX_ATTEMPTS: Final = 100

# Changes are built without validation: their values come from validated messages or are computed here from them.
_placed, _granted, _start = maker(Placed), maker(BandwidthGrant), maker(Start)
_retried, _ended, _circuit = maker(Retried), maker(Ended), maker(CircuitChanged)


class WhenLate(StrEnum):
    """The treatment of a task whose every placement is predicted to end after its deadline."""

    REJECT = "reject"  # REJECTED at once, with cause `deadline`
    LEAST_LATE = "least-late"  # the policy places it as if it had no deadline; at its deadline it becomes EXPIRED


class Placing(Reach):
    """A region in which tasks can be placed, retried and ended. Each change is applied and added to `_changes`."""

    def __init__(
        self,
        region: int = 0,
        policy: str | Policy = "deepar",
        objective: Objective = Objective.SEQUENTIAL,
        execution: Execution | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
        *,
        patience_s: float = DEFAULT_PATIENCE_S,
        remember_ended: int = DEFAULT_REMEMBER_ENDED,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        when_late: WhenLate = WhenLate.REJECT,
        max_waiting_per_device: int = DEFAULT_MAX_WAITING_PER_DEVICE,
    ) -> None:
        super().__init__(region, objective, patience_s=patience_s, remember_ended=remember_ended)
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        self.execution = objective.executed_as(execution)
        self.max_waiting = max_waiting
        self.max_waiting_per_device = max_waiting_per_device
        self.max_attempts = max_attempts
        self.when_late = when_late
        self._changes: list[Change] = []  # changes of the event that is being handled
        self._replan: list[tuple[int, str]] = []  # tasks to place before handling the event ends

    # --- operations of the event handlers ----------------------------------------------------------------------------

    def _replan_later(self, task: Task) -> None:
        self._replan.append((task.seq, task.task_id))

    def _retry(self, task: Task, cause: str, now: float, detail: str = "", failed_at: str | None = None) -> None:
        if task.attempt >= self.max_attempts:
            self._end(
                task,
                TaskState.FAILED,
                now,
                cause=cause,
                detail=f"after {format_count(task.attempt, 'attempt')}; {detail}",
            )
            return
        attempt = task.attempt + 1
        self._do(_retried(task_id=task.task_id, attempt=attempt, cause=cause, detail=detail, failed_at=failed_at), now)
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

    def _do(self, change: Change, now: float) -> None:
        APPLY[type(change)](self, change, now)  # same as `apply`; inlined to save a call
        self._changes.append(change)

    # --- placing -----------------------------------------------------------------------------------------------------

    def decide(self, submitted: TaskSubmitted, now: float) -> Choice | None:
        """The policy's choice for a task at this moment, without booking it. None: no placement is possible."""
        request = self.request(submitted)
        if not isinstance(request, Request):
            return None
        deadline_s = NEVER if submitted.deadline_s is None else now + submitted.deadline_s
        _, choice, late_s = self._choose(request, submitted, now, deadline_s)
        return None if late_s > 0 and self.when_late is WhenLate.REJECT else choice

    def _choose(
        self,
        request: Request,
        submitted: TaskSubmitted,
        now: float,
        deadline_s: float,
        failed_at: tuple[str, ...] = (),
    ) -> tuple[Request, Choice | None, float]:
        """The request that was used, the policy's choice for it, and how late the choice is predicted to end.

        The lateness is above 0 only if every placement ends after the deadline. Nodes at which the task failed, and nodes
        with open circuits, are used only if no other placement is possible.
        """
        if failed_at or self.circuits:
            suspects = self._suspects(now)
            for avoid in {suspects.union(failed_at): None, suspects: None}:
                other = self.request(submitted, avoid) if avoid else None
                if isinstance(other, Request):
                    choice = self._ask_policy(Algorithm(other, now, deadline_s))
                    if choice is not None:
                        return other, choice, 0.0
        algorithm = Algorithm(request, now, deadline_s)
        choice = self._ask_policy(algorithm)
        if deadline_s == NEVER:
            return request, choice, 0.0
        if choice is None:
            choice = self._ask_policy(Algorithm(request, now))
        return request, choice, 0.0 if choice is None else algorithm.late_s(choice)

    def _suspects(self, now: float) -> frozenset[str]:
        """Nodes with open circuits. All clouds form one consumer group, so they are avoided all together or not at all."""
        found = avoided(self.circuits, now)
        return found if found.issuperset(self._cloud_names) else found.difference(self._cloud_names)

    def _count_failure(self, node: str, now: float) -> None:
        """Count a failed attempt at a node. If its circuit opens, retry the tasks that are scheduled there."""
        old = self.circuits.get(node, Circuit(0))
        new = old.after_failure(now)
        self._do(_circuit(node=node, failures=new.failures, until_s=new.until_s), now)
        if node in self.ledger.edges and new.until_s is not None and not old.avoided(now):
            for _, _, r in list(self.ledger.edges[node].queue):
                self._retry(self.tasks[r.task_id], "circuit_open", now, node)

    def _count_success(self, placed: Placed, now: float) -> None:
        """Close the circuits of all nodes that a successful attempt used."""
        for node in self._places(placed):
            if node in self.circuits:
                self._do(_circuit(node=node, failures=0), now)

    def _place(self, task: Task, now: float, *, fresh: bool = False) -> None:
        """Place a WAITING task, leave it waiting, or reject it."""
        request = self.request(task.submitted)
        if isinstance(request, str):
            detail = f"{task.submitted.device} does not run {task.submitted.model}"
            self._end(task, TaskState.REJECTED, now, cause=request, detail=detail)
            return
        choice, placed = None, None
        if request is not None:
            try:
                request, choice, late_s = self._choose(request, task.submitted, now, task.deadline_s, task.avoided)
                placed = None if choice is None else self._placement(task, request, choice, now)
            except (Exception, SystemExit) as error:
                if isinstance(self.policy, Restriction):
                    raise  # a built-in policy failed: a bug in the planner
                self._end(task, TaskState.REJECTED, now, cause="policy_error", detail=policy_fault(self.policy, error))
                return
            if late_s > 0 and self.when_late is WhenLate.REJECT:
                detail = f"the earliest predicted end is {format_seconds(late_s)} after the deadline"
                self._end(task, TaskState.REJECTED, now, cause="deadline", detail=detail)
                return
            if choice is None and (why := self._never_servable(task, request)) is not None:
                self._end(task, TaskState.REJECTED, now, cause=why[0], detail=why[1])
                return
        if fresh and (choice is None or choice.start_s > now) and (full := self._full_queue(task)) is not None:
            self._end(task, TaskState.REJECTED, now, cause=full[0], detail=full[1])
            return
        if placed is not None:
            self._book(placed, now)

    def _full_queue(self, task: Task) -> tuple[str, str] | None:
        """Cause and detail if this task exceeds a limit of queued tasks (WAITING or SCHEDULED), else None."""
        device = task.submitted.device
        if self._queued_by_device[device] > self.max_waiting_per_device:
            return "device_queue_full", f"{format_count(self.max_waiting_per_device, 'task')} of {device} wait already"
        if len(self.tasks) - self._running > self.max_waiting:
            return "queue_full", f"{format_count(self.max_waiting, 'task')} wait already"
        return None

    def _placement(self, task: Task, request: Request, choice: Choice, now: float) -> Placed:
        """The placement message for a choice. Raises an error for an invalid choice; the state does not change here."""
        submitted, row = task.submitted, request.device_row
        option = request.edge(choice.edge)
        self._check(request, option, choice, now)
        search = request.device_search if option is None else option.search
        _, _, cut1, cut2, link1_bps, link2_bps, start_s, delay_s = choice
        placed = _placed(
            task_id=task.task_id,
            attempt=task.attempt,
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
        if not isinstance(self.policy, Restriction):
            placed = Placed.model_validate(placed.model_dump())
        return placed

    def _book(self, placed: Placed, now: float) -> None:
        placement, start_s = placed.placement, placed.start_s
        edge, link1_bps, link2_bps = placement.edge, placement.link1_bps, placement.link2_bps
        task_id, attempt = placed.task_id, placed.attempt
        self._do(placed, now)
        if edge is not None:  # grants announce the reserved bandwidth; the placement has already reserved it
            if link1_bps:
                self._changes.append(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=1, bps=link1_bps, from_s=start_s)
                )
            if link2_bps:
                self._changes.append(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=2, bps=link2_bps, from_s=start_s)
                )
        if start_s <= now:
            self._do(_start(task_id=task_id, attempt=attempt, device=placed.device, at_s=start_s), now)

    def _ask_policy(self, algorithm: Algorithm) -> Choice | None:
        choice = self.policy.place(algorithm)
        return choice if choice is None or isinstance(self.policy, Restriction) else self._normalized(choice)

    def _normalized(self, choice: Choice) -> Choice:
        """The choice of a user's policy, converted to Python's int and float. Raises `PolicyError` for anything else."""
        try:
            family, edge, cut1, cut2, link1_bps, link2_bps, start_s, delay_s = choice
            whole = (index(cut1), index(cut2), index(link1_bps), index(link2_bps))
            return Choice(index(family), edge, *whole, float(start_s), float(delay_s))
        except (TypeError, ValueError) as error:
            raise PolicyError(f"it chose {choice!r:.200}, which is no Choice: {error}") from None

    def _check(self, request: Request, option: EdgeOption | None, choice: Choice, now: float) -> None:
        """Check that a choice is consistent, within the task's caps (11), and free in the ledger.

        Raises `PolicyError` for a user's policy, and `InvariantError` for a built-in one.
        """
        end, layers = choice.start_s + choice.delay_s, request.device_row.layers
        good = (
            now <= choice.start_s <= end < NEVER
            and 0 <= choice.cut1 <= choice.cut2 <= layers
            and (choice.edge is None) == (option is None) == (choice.cut1 == layers)
        )
        if good and option is not None:
            good = (
                choice.start_s >= option.account.turn_s()
                and 1 <= choice.link1_bps <= option.max_link1_bps
                and 0 <= choice.link2_bps <= option.max_link2_bps
                and option.account.timeline.fits(
                    choice.start_s, end, int(choice.cut1 != choice.cut2), choice.link1_bps, choice.link2_bps
                )
            )
        if good and request.device is not None:
            computes = int(choice.cut1 > 0)
            good = request.device.timeline.fits(choice.start_s, end, computes, choice.link1_bps, 0)
        if good and option is not None:
            costs, forbidden = option.search.costs, option.search.forbidden
            good = (
                not {choice.cut1, choice.cut2} & forbidden
                and (choice.cut1 == choice.cut2 or costs.edge is not None)
                and (choice.cut2 == layers or (costs.cloud is not None and choice.link2_bps >= 1))
            )
        if not good:
            fault = f"it chose for {request.task_id} what cannot be, or is not free: {choice!r:.300}"
            if isinstance(self.policy, Restriction):
                raise InvariantError(f"policy {self.policy.name}: {fault}")
            raise PolicyError(fault)

    def _never_servable(self, task: Task, request: Request) -> tuple[str, str] | None:
        """Cause and detail if no node that may still join can serve the task, else None."""
        device = self.nodes[task.submitted.device].announced
        if device.reachable_edges is None and task.submitted.max_link1_bps != 0:
            return None  # another edge may join
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
                    f"{name} has {format_count(account.slots, 'slot')}, and for it at most "
                    f"{format_rate(option.max_link1_bps)} on link 1 and {format_rate(option.max_link2_bps)} on link 2"
                )
        return "never_fits", "; ".join(lacks[:10])
