"""The explanation of a task's placement, from the decision records alone.

`explain` folds all records before the placement into a core. Then it asks Algorithm 1 for the best start of *every* pair of
edge and family, not only the winner. The records hold everything the planner knew, what it had learned included, so the
explanation is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bus.errors import UnknownNameError
from bus.messages import (
    Admitted,
    Change,
    Decision,
    Ended,
    Learned,
    Moved,
    Overran,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.region_tasks import KnownTask, RegionTasks
from bus.text.units import format_moment, format_rate, format_seconds, format_share
from bus.values import Placement, Role
from planner.core.core import PlannerCore
from planner.core.line import ahead
from planner.core.options import CoreOptions
from planner.learning.lessons import AnyLesson, Lessons
from planner.learning.lessons import lines as lessons_of
from planner.search.algorithm1 import Algorithm
from planner.search.families import ALL_THREE, DEVICE, DEVICE_CLOUD, DEVICE_EDGE
from planner.search.placements import Choice, placement_of
from planner.search.policies import BUILT_IN, DEVICE_WORTH, Restriction
from planner.search.request import EdgeOption, Request


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair of edge and family, at its best start."""

    placement: Placement | None  # None if no start is possible
    edge: str | None
    family: str  # in the paper's terms
    start_in_s: float | None  # delta_t
    delay_s: float | None  # w
    lacked: str  # the resources missing now, or why it is impossible; empty if it can start now at full bandwidth
    chosen: bool
    latency_s: float = 0.0  # share of latency in the delay
    overhead_s: float = 0.0  # share of overheads at no particular station in the delay
    margin_s: float = (
        0.0  # one deviation of the predicted ends that its start waits for; counts when candidates are compared
    )
    suspected: bool = False  # avoided if other candidates exist, because attempts failed there


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of one task."""

    task_id: str
    state: str  # the last state that the records show
    decided: Placed | None  # the last placement; None: never placed
    decided_at_s: float | None  # ledger time of the last placement
    ended: Ended | None  # the end, with what was measured; None: it has not ended
    candidates: tuple[
        Candidate, ...
    ]  # the chosen one first, then best first; empty without a placement, or of a session
    waited_for: tuple[str, ...]  # the task ends that its start waited for, in words
    waits_for: tuple[str, ...]  # the nodes it needed when it was last WAITING, in words; any of them may be enough
    waiting_since_s: float | None  # ledger time at which it became WAITING; None: it is not WAITING
    waiting_s: float | None  # time from then until the last record; None: it is not WAITING
    story: tuple[str, ...]  # the events since its submission, in order
    lessons: tuple[AnyLesson, ...]  # what had been learned about the candidates at the last placement, newest first

    @property
    def error(self) -> float | None:
        """Measured over predicted delay, minus 1; None unless it completed."""
        if self.decided is None or self.ended is None or self.ended.delay_s is None or not self.decided.delay_s:
            return None
        return self.ended.delay_s / self.decided.delay_s - 1.0


_FAMILIES = {
    DEVICE: "device",
    DEVICE_EDGE: "device+edge",
    DEVICE_CLOUD: "device+cloud",
    ALL_THREE: "device+edge+cloud",
}


def explain(decisions: Iterable[Decision], task_id: str) -> Explanation:
    """Fold all decisions of one region, from its first one, and explain a task.

    Raises `UnknownNameError` if the decisions do not mention the task.
    """
    core = PlannerCore(options=CoreOptions(learning=True))  # uses what the records say that the planner had learned
    region, lessons = RegionTasks(), Lessons()
    known: KnownTask | None = None
    placed: Placed | None = None
    ended: Ended | None = None
    placed_at_s: float | None = None
    candidates: tuple[Candidate, ...] = ()
    learned: tuple[AnyLesson, ...] = ()
    waited_for: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    since_s: float | None = None
    waiting_s: float | None = None
    story: list[str] = []
    for decision in decisions:
        for change, task in region.apply(decision):
            if task is not None and task.task_id == task_id:
                known = task
                if isinstance(change, Placed) and task.submitted is not None:
                    candidates = _candidates(core, task.submitted, change, decision.now_s)
                    learned = _lessons(core, lessons, change, candidates)
                    waited_for = _waited_for(core, change)
                    placed, placed_at_s = change, decision.now_s
                elif isinstance(change, Rerouted) and task.placed is not None:
                    placed = task.placed  # with the delay of the whole task
                ended = change if isinstance(change, Ended) else None
            lessons.fold(change)
            core.apply(change, decision.now_s)
            if known is not None and _concerns(change, task, known):
                story += [f"{format_moment(decision.now_s, 3)}: {line}" for line in _lines(change, known)]
        core.settled(decision.now_s)
        since_s, waiting_s = None, None
        waiting = core.tasks.get(task_id)
        if waiting is not None and waiting.state is TaskState.WAITING:
            waits_for = core.missing(waiting.submitted)
            since_s, waiting_s = waiting.waiting_since_s, decision.now_s - waiting.waiting_since_s
    if known is None or known.submitted is None:
        raise UnknownNameError(f"no decision is about a task called {task_id}")
    return Explanation(
        task_id=task_id,
        state=known.state.value,
        decided=placed,
        decided_at_s=placed_at_s,
        ended=ended,
        candidates=candidates,
        waited_for=waited_for,
        waits_for=waits_for,
        waiting_since_s=since_s,
        waiting_s=waiting_s,
        story=tuple(story),
        lessons=learned,
    )


def _concerns(change: Change, task: KnownTask | None, explained: KnownTask) -> bool:
    """Whether a change belongs to the story of the explained task."""
    match change:
        case Moved():
            return explained.task_id in change.task_ids
        case Learned():
            return explained.task_id == change.task_id
        case _:
            return task is explained


def _lessons(
    core: PlannerCore, lessons: Lessons, placed: Placed, candidates: tuple[Candidate, ...]
) -> tuple[AnyLesson, ...]:
    """What has been learned about the nodes, paths and links of the candidates, newest first."""
    edges = {candidate.edge for candidate in candidates if candidate.edge is not None}
    clouds = {name for name, node in core.nodes.items() if node.announced.role is Role.CLOUD}
    nodes = {placed.device, *edges, *clouds}
    found: list[AnyLesson] = [
        lesson for (node, model, _), lesson in lessons.nodes.items() if model == placed.model and node in nodes
    ]
    found += [
        lesson
        for (device, edge, _), lesson in lessons.paths.items()
        if device == placed.device and (not edge or edge in edges)
    ]
    found += [
        lesson
        for (link, device, edge), lesson in lessons.links.items()
        if edge in edges and (link == 2 or device == placed.device)
    ]
    return tuple(sorted(found, key=lambda lesson: -lesson.number))


def _candidates(core: PlannerCore, submitted: TaskSubmitted, placed: Placed, now: float) -> tuple[Candidate, ...]:
    task = core.tasks.get(submitted.task_id)
    deadline_s = float("inf") if task is None else task.deadline_s
    request = core.request(submitted, objective=placed.objective)  # the records do not say which one the core has
    if not isinstance(request, Request) or placed.session is not None:
        return ()  # a session is not placed by Algorithm 1
    if placed.line is not None and placed.line.overtakes and task is not None:
        request = ahead(task, request, fair=True).request
    policy = BUILT_IN.get(placed.policy)
    rules = policy if isinstance(policy, Restriction) else Restriction(placed.policy)
    found = [_candidate(request, None, DEVICE, rules, placed, now)]
    found += [
        _candidate(request, option, family, rules, placed, now)
        for option in request.edges
        for family in (DEVICE_EDGE, DEVICE_CLOUD, ALL_THREE)
    ]
    failed = task.avoided if task is not None else ()
    found = [_suspected(_judged(candidate, deadline_s - now), core, placed, failed, now) for candidate in found]
    far = float("inf")
    found.sort(
        key=lambda c: (
            not c.chosen,
            c.suspected,
            far if c.delay_s is None else (c.start_in_s or 0.0) + c.margin_s + c.delay_s,
        )
    )
    return tuple(found)


def _judged(candidate: Candidate, left_s: float) -> Candidate:
    """The candidate, with a note in `lacked` if it is predicted to end after the deadline."""
    if candidate.start_in_s is None or candidate.delay_s is None:
        return candidate
    late_s = candidate.start_in_s + candidate.delay_s - left_s
    if late_s <= 0:
        return candidate
    late = f"time (it is predicted to end {format_seconds(late_s)} after the deadline)"
    return replace(candidate, lacked="; ".join(word for word in (candidate.lacked, late) if word))


def _suspected(
    candidate: Candidate, core: PlannerCore, placed: Placed, failed: tuple[str, ...], now: float
) -> Candidate:
    """The candidate, with notes in `lacked` about attempts that failed on its nodes."""
    nodes = [candidate.edge or placed.device]
    if candidate.family in (_FAMILIES[DEVICE_CLOUD], _FAMILIES[ALL_THREE]):
        nodes += [node for node in sorted({*failed, *core.circuits}) if node in core.nodes and node not in nodes]
        nodes = [node for node in nodes if node == candidate.edge or core.nodes[node].announced.role is Role.CLOUD]
    notes = [f"an attempt of this task failed at {node}" for node in nodes if node in failed]
    for node in nodes:
        circuit = core.circuits.get(node)
        if circuit is not None and circuit.avoided(now):
            notes.append(f"{circuit.failures} attempts in a row failed at {node}, which is avoided until one succeeds")
    if not notes:
        return candidate
    lacks = "; ".join(word for word in (candidate.lacked, *notes) if word)
    return replace(candidate, lacked=lacks, suspected=True)


def _candidate(
    request: Request, option: EdgeOption | None, family: int, rules: Restriction, placed: Placed, now: float
) -> Candidate:
    edge = None if option is None else option.account.name
    alone = request.through(option)
    algorithm = Algorithm(alone, now)
    if rules.elastic and placed.start_s <= now:
        rules = replace(rules, delayed=False)
    choice = rules.best(algorithm, {family})
    if rules.mixes:
        algorithm = algorithm.with_routes()
    allowed = family in rules.families
    lacked = _lacked(algorithm, option, family, rules, choice) if allowed else f"{rules.name} does not use it"
    if choice is None:
        return Candidate(None, edge, _FAMILIES[family], None, None, lacked, chosen=False)
    placement = placement_of(request, choice, option)
    overheads = request.overheads if option is None else option.overheads
    latency_s, overhead_s = overheads.shares_s(family, request.samples, request.objective)
    counts_s = algorithm.delta_s(None if option is None else option.account, choice.start_s)
    return Candidate(
        placement=placement,
        edge=edge,
        family=_FAMILIES[family],
        start_in_s=choice.start_s - now,
        delay_s=choice.delay_s,
        lacked=lacked,
        chosen=allowed and placement == placed.placement,
        latency_s=latency_s,
        overhead_s=overhead_s,
        margin_s=counts_s - (choice.start_s - now),
    )


def _lacked(
    algorithm: Algorithm, option: EdgeOption | None, family: int, rules: Restriction, choice: Choice | None
) -> str:
    """The resources that this pair lacked at `now` (a slot, bandwidth, the device), or why it is impossible."""
    request, now = algorithm.request, algorithm.now
    device_busy = request.device is not None and not request.device.free(now, now)
    lacks: list[str] = []
    if option is None:
        if not rules.device_computes:
            return f"{rules.name} does not use it"
        return "the device computes another task" if device_busy else ""
    account, timeline = option.account, option.account.timeline
    if family != DEVICE_CLOUD and option.search.costs.edge is None:
        return "the edge does not run the model"
    if family != DEVICE_EDGE and option.search.costs.cloud is None:
        return "no cloud runs the model"
    slots, free1, free2 = timeline.at(now)
    if account.turn_s() > now:
        first = account.first_served[-1][2]
        lacks.append(f"its turn ({first.task_id} was moved to a later start {first.moves} times, and goes first)")
    if family != DEVICE_CLOUD and slots < 1:
        lacks.append(f"a slot ({account.slots} taken)" if account.slots else "a slot (it has none)")
    if free1 < option.max_link1_bps:
        lacks.append(f"bandwidth on link 1 ({_free(free1)} free of {format_rate(option.max_link1_bps)} wanted)")
    if request.device is not None and request.device.limited:
        own_bps = request.device.timeline.at(now)[1]
        if own_bps < option.max_link1_bps:
            lacks.append(f"the device's own link ({_free(own_bps)} free of {format_rate(option.max_link1_bps)} wanted)")
    if family != DEVICE_EDGE and free2 < option.max_link2_bps:
        lacks.append(f"bandwidth on link 2 ({_free(free2)} free of {format_rate(option.max_link2_bps)} wanted)")
    if choice is not None and not choice.uses_device and rules.device_computes:
        if device_busy:
            lacks.append("the device, which computes another task")
        elif rules.mixes and request.others:
            lacks.append(f"a gain of {format_share(DEVICE_WORTH)} on the device, which has other tasks")
    if choice is None and not lacks:
        lacks.append("allowed cuts" if option.max_link1_bps else "any bandwidth on link 1")
    if not lacks and choice is not None:
        free = algorithm.at(option, family, now, device_computes=rules.device_computes)
        if free is None:
            lacks.append("free resources for its whole duration")
        elif (free.link1_bps, free.link2_bps) < (
            option.max_link1_bps,
            0 if family == DEVICE_EDGE else option.max_link2_bps,
        ):
            lacks.append("full bandwidth for its whole duration")
    return "; ".join(lacks)


def _free(bps: int) -> str:
    return format_rate(bps) if bps else "none"


def _waited_for(core: PlannerCore, placed: Placed) -> tuple[str, ...]:
    """The tasks, in words, whose predicted ends the start waits for."""
    if placed.wait_s <= 0:
        return ()
    found = []
    for task_id, r in sorted(core.ledger.reservations.items()):
        if r.end_s != placed.start_s:
            continue
        if r.edge is not None and r.edge == placed.placement.edge:
            found.append(f"{task_id} to end on {r.edge}")
        elif r.device is not None and r.device == placed.device:
            found.append(f"{task_id} to end on {r.device}")
    return tuple(found)


def _lines(change: Change, task: KnownTask) -> list[str]:
    """A change as lines of the task's story."""
    if isinstance(change, Learned):
        return [f"learned: {text}" for _, text in lessons_of(change)]
    line = _line(change, task)
    return [line] if line else []


def _line(change: Change, task: KnownTask) -> str:
    """A change as a line of the task's story; empty for a change that the story omits."""
    if isinstance(change, Admitted):
        return "admitted"
    if isinstance(change, Moved) and task.start_s is not None and task.moved_from_s is not None:
        by_s = task.start_s - task.moved_from_s
        return f"start moved {format_seconds(abs(by_s))} {'later' if by_s > 0 else 'earlier'}"
    if isinstance(change, Placed):
        where = change.placement
        through = f" through {where.edge}" if where.edge else ""
        wait = f", to start in {format_seconds(change.wait_s)}" if change.wait_s else ""
        session = change.session
        rate = "" if session is None else f" for a sample at {session.rate_hz:g} a second"
        predicted = f"{format_seconds(change.delay_s)} predicted{rate}"
        return f"attempt {change.attempt} placed on {where.kind}{through}{wait}, {predicted}"
    if isinstance(change, Start):
        return f"attempt {change.attempt} starts"
    if isinstance(change, Overran):
        return "overruns its predicted end"
    if isinstance(change, Rerouted):
        where = change.placement
        through = f" through {where.edge}" if where.edge else ""
        return f"rerouted to {where.kind}{through}, {format_seconds(change.delay_s)} more predicted"
    if isinstance(change, Retried):
        at = f" at {change.failed_at}, which is avoided while other nodes exist" if change.failed_at else ""
        why = f"{change.cause}{at}{': ' + change.detail if change.detail else ''}"
        return f"resources released ({why}); attempt {change.attempt} follows"
    if isinstance(change, Ended):
        took = "" if change.delay_s is None else f"in {format_seconds(change.delay_s)}"
        why = ": ".join(filter(None, (change.cause, change.detail)))
        return " ".join(filter(None, (change.state.value, took, why)))
    return ""
