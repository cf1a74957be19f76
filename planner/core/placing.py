"""The placing of a task: the policy's choice is checked and booked, or the task waits, or it is rejected with a cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bus.messages import BandwidthGrant, Placed, PlacedInLine, PlacedOverhead, Start, TaskState, TaskSubmitted
from bus.text.units import format_count, format_rate, format_seconds
from bus.unchecked_constructors import maker
from bus.values import Execution, Objective, Parts, Placement
from planner.core.candidates.candidates import Candidates
from planner.core.change_recorder import ChangeRecorder
from planner.core.choices import ask, check_choice
from planner.core.circuit_breakers import CircuitBreakers
from planner.core.line import ahead
from planner.core.options import CoreOptions, WhenLate
from planner.core.region.records import BETTER_PLACE, NEVER, REVIEW_S, Task
from planner.core.region.state import RegionState
from planner.core.sessions import SessionPlacement, Sessions
from planner.search.algorithm1 import Algorithm
from planner.search.cost import NO_OVERHEADS, Costs, mean_stations_s
from planner.search.families import DEVICE_EDGE
from planner.search.placements import Choice, placement_of
from planner.search.policies import Policy, Restriction, policy_fault
from planner.search.request import EVERY_FAMILY, EdgeOption, Request

# Changes are built without validation: their values come from validated messages or are computed here from them.
_placed, _granted, _start, _line = maker(Placed), maker(BandwidthGrant), maker(Start), maker(PlacedInLine)

CheckChoice = Callable[[Policy, Request, EdgeOption | None, Choice, float], None]
"""See `planner.core.choices.check_choice`."""


class QueueLimits:
    """The limits of queued tasks (WAITING or SCHEDULED) in one region."""

    def __init__(self, region: RegionState, options: CoreOptions) -> None:
        self._region = region
        self._options = options

    def exceeded_by(self, task: Task) -> tuple[str, str] | None:
        """Cause and detail if this task exceeds a limit, else None."""
        region, options, device = self._region, self._options, task.submitted.device
        if region.queued_by_device[device] > options.max_waiting_per_device:
            return (
                "device_queue_full",
                f"{format_count(options.max_waiting_per_device, 'task')} of {device} wait already",
            )
        if len(region.tasks) - region.running > options.max_waiting:
            return "queue_full", f"{format_count(options.max_waiting, 'task')} wait already"
        return None


@dataclass(frozen=True, slots=True)
class PlacingRules:
    """What decides a placement beside the state."""

    policy: Policy
    execution: Execution  # how the stages execute a task
    when_late: WhenLate
    fair: bool = False  # see `CoreOptions`
    check: CheckChoice = check_choice


class Placer:
    """Places the tasks of one region."""

    def __init__(
        self,
        region: RegionState,
        candidates: Candidates,
        recorder: ChangeRecorder,
        breakers: CircuitBreakers,
        limits: QueueLimits,
        rules: PlacingRules,
    ) -> None:
        self._region = region
        self._candidates = candidates
        self._recorder = recorder
        self._breakers = breakers
        self._limits = limits
        self._rules = rules
        self._policy = rules.policy
        self._sessions = Sessions(region, candidates, rules.policy)

    def decide(self, submitted: TaskSubmitted, now: float) -> Choice | None:
        """The policy's choice for a task at this moment, without booking it. None: no placement is possible."""
        request = self._candidates.request(submitted)
        if not isinstance(request, Request):
            return None
        deadline_s = NEVER if submitted.deadline_s is None else now + submitted.deadline_s
        _, choice, late_s = self._choose(request, submitted, now, deadline_s)
        return None if late_s > 0 and self._rules.when_late is WhenLate.REJECT else choice

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
        for avoid in self._avoided(failed_at, now):
            other = self._candidates.request(submitted, avoid)
            if isinstance(other, Request):
                choice = ask(self._policy, Algorithm(other, now, deadline_s))
                if choice is not None:
                    return other, choice, 0.0
        algorithm = Algorithm(request, now, deadline_s)
        choice = ask(self._policy, algorithm)
        if deadline_s == NEVER:
            return request, choice, 0.0
        if choice is None:
            choice = ask(self._policy, Algorithm(request, now))
        return request, choice, 0.0 if choice is None else algorithm.late_s(choice)

    def place(self, task: Task, now: float, *, fresh: bool = False) -> None:
        """Place a WAITING task, leave it waiting, or reject it."""
        request = self._candidates.request(task.submitted)
        if isinstance(request, str):
            detail = f"{task.submitted.device} does not run {task.submitted.model}"
            self._recorder.end(task, TaskState.REJECTED, now, cause=request, detail=detail)
            return
        if task.submitted.session is not None:
            self._place_session(task, request, now, fresh=fresh)
            return
        choice, placed = None, None
        if request is not None:
            try:
                request, choice, late_s = self._choose(request, task.submitted, now, task.deadline_s, task.avoided)
                line = None
                if choice is not None and choice.start_s > now and (self._rules.fair or task.submitted.priority):
                    request, choice, late_s, line = self._in_line(task, request, choice, late_s, now)
                placed = None if choice is None else self.placement(task, request, choice, now, line)
            except (Exception, SystemExit) as error:
                if isinstance(self._policy, Restriction):
                    raise  # a built-in policy failed: a bug in the planner
                self._recorder.end(
                    task, TaskState.REJECTED, now, cause="policy_error", detail=policy_fault(self._policy, error)
                )
                return
            if late_s > 0 and self._rules.when_late is WhenLate.REJECT:
                detail = f"the earliest predicted end is {format_seconds(late_s)} after the deadline"
                self._recorder.end(task, TaskState.REJECTED, now, cause="deadline", detail=detail)
                return
            if choice is None and (why := self._never_servable(task, request)) is not None:
                self._recorder.end(task, TaskState.REJECTED, now, cause=why[0], detail=why[1])
                return
        if fresh and (choice is None or choice.start_s > now) and (full := self._limits.exceeded_by(task)) is not None:
            self._recorder.end(task, TaskState.REJECTED, now, cause=full[0], detail=full[1])
            return
        if placed is not None:
            self._book(placed, now)

    def _place_session(self, task: Task, request: Request | None, now: float, *, fresh: bool) -> None:
        """Place a WAITING session, leave it waiting, or reject it."""
        found = None if request is None else self._best_session(task, request, now)
        if (
            found is None
            and request is not None
            and not self._sessions.servable(request, task.submitted)
            and (why := self._never_servable(task, request)) is not None
        ):
            self._recorder.end(task, TaskState.REJECTED, now, cause=why[0], detail=why[1])
        elif fresh and (found is None or found.start_s > now) and (full := self._limits.exceeded_by(task)) is not None:
            self._recorder.end(task, TaskState.REJECTED, now, cause=full[0], detail=full[1])
        elif found is not None:
            self._book(self._sessions.message(task, found, now), now)

    def review_sessions(self, now: float) -> None:
        """Retry the running sessions that are due for a review and for which there is a better place."""
        region = self._region
        while (task := region.timers.pop_review(now)) is not None:
            region.timers.add_review(task, now + REVIEW_S)
            request = self._candidates.request(task.submitted)
            avoid = next(iter(self._avoided(task.avoided, now)), frozenset())
            offered = self._candidates.request(task.submitted, avoid) if avoid else request
            if not isinstance(request, Request) or not isinstance(offered, Request):
                continue
            if self._sessions.better(task, region.ledger.reservations[task.task_id], request, offered):
                self._recorder.retry(task, BETTER_PLACE, now)

    def _best_session(self, task: Task, request: Request, now: float) -> SessionPlacement | None:
        """The best placement of a session. Suspects are used only if no other placement is possible, as in `_choose`."""
        for avoid in self._avoided(task.avoided, now):
            other = self._candidates.request(task.submitted, avoid)
            if isinstance(other, Request) and (found := self._sessions.best(other, task.submitted, now)) is not None:
                return found
        return self._sessions.best(request, task.submitted, now)

    def suspects(self, task: Task, now: float) -> frozenset[str]:
        """The nodes that a running task does not go over to."""
        return next(iter(self._avoided(task.avoided, now)), frozenset())

    def _avoided(self, failed_at: tuple[str, ...], now: float) -> list[frozenset[str]]:
        """The sets of nodes to leave out, in the order in which placements without them are tried; never an empty set."""
        if not failed_at and not self._region.circuits:
            return []
        suspects = self._breakers.suspects(now)
        return [avoid for avoid in {suspects.union(failed_at): None, suspects: None} if avoid]

    def _in_line(
        self, task: Task, request: Request, choice: Choice, late_s: float, now: float
    ) -> tuple[Request, Choice, float, PlacedInLine]:
        """The choice for a task that has to wait, put before scheduled tasks of a worse rank if it then ends earlier."""
        line = ahead(task, request, fair=self._rules.fair)
        other = (
            ask(self._policy, Algorithm(line.request, now, task.deadline_s)) if any(line.overtaken.values()) else None
        )
        if other is not None and other.start_s + other.delay_s < choice.start_s + choice.delay_s:
            device = request.device
            uses_device = other.uses_device or (other.edge is not None and device is not None and device.limited)
            overtakes = line.counts(other.edge, uses_device)
            return line.request, other, 0.0, _line(rank_s=line.rank_s[other.edge], overtakes=overtakes)
        return request, choice, late_s, _line(rank_s=line.rank_s[choice.edge])

    def placement(
        self, task: Task, request: Request, choice: Choice, now: float, line: PlacedInLine | None = None
    ) -> Placed:
        """The placement message for a choice. Raises an error for an invalid choice; the state does not change here."""
        submitted, row = task.submitted, request.device_row
        option = request.edge(choice.edge)
        self._rules.check(self._policy, request, option, choice, now)
        search = request.device_search if option is None else option.search
        start_s, placement = choice.start_s, placement_of(request, choice, option)
        placed = _placed(
            task_id=task.task_id,
            attempt=task.attempt,
            device=submitted.device,
            model=row.model,
            sha256=row.sha256,
            samples=request.samples,
            policy=self._policy.name,
            objective=self._candidates.objective,
            execution=self._rules.execution,
            placement=placement,
            start_s=start_s,
            wait_s=start_s - now,
            delay_s=choice.delay_s,
            parts=_parts(search.costs, placement, request),
            overhead=_overhead(request, option, choice, submitted.device),
            line=line,
        )
        if not isinstance(self._policy, Restriction):
            placed = Placed.model_validate(placed.model_dump())
        return placed

    def _book(self, placed: Placed, now: float) -> None:
        placement, start_s = placed.placement, placed.start_s
        edge, link1_bps, link2_bps = placement.edge, placement.link1_bps, placement.link2_bps
        task_id, attempt = placed.task_id, placed.attempt
        self._recorder.do(placed, now)
        if edge is not None:  # grants announce the reserved bandwidth; the placement has already reserved it
            if link1_bps:
                self._recorder.announce(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=1, bps=link1_bps, from_s=start_s)
                )
            if link2_bps:
                self._recorder.announce(
                    _granted(task_id=task_id, attempt=attempt, edge=edge, link=2, bps=link2_bps, from_s=start_s)
                )
        if start_s <= now:
            self._recorder.do(_start(task_id=task_id, attempt=attempt, device=placed.device, at_s=start_s), now)

    def _never_servable(self, task: Task, request: Request) -> tuple[str, str] | None:
        """Cause and detail if no node that may still join can serve the task, else None."""
        device = self._region.nodes[task.submitted.device].announced
        policy = self._policy
        families = request.families & (policy.families if isinstance(policy, Restriction) else EVERY_FAMILY)
        if not families:
            tiers = ", ".join(task.submitted.tiers or ())
            return "never_fits", f"{policy.name} has no placement that computes only on these tiers: {tiers}"
        if device.reachable_edges is None and task.submitted.max_link1_bps != 0:
            return None  # another edge may join
        if device.reachable_edges == ():
            return "unreachable", f"{device.node} reaches no edge, and {self._policy.name} needs one"
        named = self._region.edge_names if device.reachable_edges is None else list(device.reachable_edges)
        if not named or any(name not in self._region.nodes or self._region.nodes[name].draining for name in named):
            return None
        if all(self._region.nodes[name].draining for name in self._region.cloud_names) and not families <= {
            DEVICE_EDGE
        }:
            return None
        lacks = []
        for name in named:
            option = next((option for option in request.edges if option.account.name == name), None)
            account = self._region.ledger.edges.get(name)
            if option is None or account is None:
                lacks.append(f"{name} does not run it")
            else:
                lacks.append(
                    f"{name} has {format_count(account.slots, 'slot')}, and for it at most "
                    f"{format_rate(option.max_link1_bps)} on link 1 and {format_rate(option.max_link2_bps)} on link 2"
                )
        return "never_fits", "; ".join(lacks[:10])


def _parts(costs: Costs, placement: Placement, request: Request) -> Parts:
    """The predicted busy times of a placement."""
    samples = request.samples
    if placement.routes is not None:
        shares = [route.share for route in placement.routes]
        return costs.busy_parts(mean_stations_s(shares, placement.routes), samples)
    cut1, cut2, link1_bps, link2_bps = placement.cut1, placement.cut2, placement.link1_bps, placement.link2_bps
    return costs.parts(cut1, cut2, link1_bps, link2_bps, samples, request.input_bytes)


def _overhead(request: Request, option: EdgeOption | None, choice: Choice, device: str) -> PlacedOverhead | None:
    """The share of latency and overheads in the delay of a choice, and the deviation; None: all zero."""
    overheads = request.overheads if option is None else option.overheads
    if overheads is NO_OVERHEADS or overheads == NO_OVERHEADS:
        return None
    family, samples, objective = choice.family, request.samples, request.objective
    crossings = samples if objective is Objective.SEQUENTIAL else 1
    latency_s = crossings * overheads.latency_s(family)
    task_s = overheads.task_s[family] + samples * overheads.sample_s[family]
    deviation = request.deviations.get(choice.edge or device, 0.0)
    return PlacedOverhead(latency_s=latency_s, task_s=task_s, deviation=deviation)
