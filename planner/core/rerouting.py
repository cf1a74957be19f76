"""The rerouting of running tasks: where something becomes free on an edge, they take other cuts, routes and bandwidth.

A policy that is `elastic` starts a task on what is free where it can, and this module improves the placement later. After an
event it looks at the edges on which something changed, and at their running tasks, those that run on their device alone
included. The tasks are asked in order of their *saving*: (best delay without a slot - best delay) / best delay, both for the
whole task at its full bandwidth. So a slot goes to the task that it saves the most time in each second for which it is held.
A task is rerouted if the policy, asked for the samples that are left, finds a placement in what is free and what the task
holds that shortens the rest of its delay by at least `LEAST_GAIN`. Promised starts keep what they reserved, and a running
task never ends later than it was promised, so none starves.

What is left of a task follows from the ledger's clock and the prediction alone: the share of the predicted delay that has not
passed. A task that is past its predicted end is not rerouted. `MOST_REROUTES` limits the changes of one task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from bus.messages import Placed, Rerouted
from bus.unchecked_constructors import maker
from planner.core.candidates.candidates import Candidates
from planner.core.change_recorder import ChangeRecorder
from planner.core.placing import Placer
from planner.core.region.records import Task
from planner.core.region.state import RegionState
from planner.search.algorithm1 import Algorithm
from planner.search.ledger.accounts import EdgeAccount
from planner.search.ledger.reservation import Reservation
from planner.search.policies import Restriction
from planner.search.request import EdgeOption, Request

LEAST_GAIN: Final = 0.05
"""The least share of the rest of its delay that a task must gain."""
MOST_REROUTES: Final = 8
"""Most reroutes of one attempt."""
MOST_SAVINGS: Final = 10_000
"""Most savings that are remembered."""

_rerouted = maker(Rerouted)  # built without validation, from values computed here


def samples_left(samples: int, from_s: float, end_s: float, now: float) -> int:
    """How many of the samples that a task had at `from_s` are left now, if it ends at `end_s`; at least one."""
    share = (end_s - now) / (end_s - from_s) if end_s > from_s else 0.0
    return min(samples, max(1, math.ceil(samples * share - 1e-9)))


class Rerouter:
    """Reroutes the running tasks of one region."""

    def __init__(
        self, region: RegionState, candidates: Candidates, recorder: ChangeRecorder, placer: Placer, policy: Restriction
    ) -> None:
        self._region = region
        self._candidates = candidates
        self._recorder = recorder
        self._placer = placer
        self._policy = policy
        self._savings: dict[tuple[str, int, str], float] = {}  # a cache: see `_saving`

    def reroute(self, edges: Iterable[str], now: float) -> bool:
        """Reroute the tasks that gain by what is free on these edges. Return whether there were any."""
        found = False
        for task, r, edge in self._concerned(edges, now):
            better = self._better(task, r, edge, now) if r.edge in (None, edge) else None
            if better is not None:
                self._recorder.do(better, now)
                found = True
        return found

    def _concerned(self, edges: Iterable[str], now: float) -> list[tuple[Task, Reservation, str]]:
        """The running tasks that may use what is free on these edges, by falling saving."""
        region, ledger = self._region, self._region.ledger
        ranked = []
        for name in edges:
            account = ledger.edges.get(name)
            if account is None or not any(account.timeline.at(now)):
                continue
            alone = [r for r in ledger.alone.values() if account.timeline.at(now)[0] and self._reaches(r, name)]
            for r in [*account.reservations.values(), *alone]:
                task = region.tasks[r.task_id]
                if _changeable(task, r, now) and (saving := self._saving(task, name, account)) > 0:
                    ranked.append((-saving, task.seq, name, task, r))
        ranked.sort(key=lambda entry: entry[:3])
        return [(task, r, name) for _, _, name, task, r in ranked]

    def _reaches(self, r: Reservation, edge: str) -> bool:
        node = self._region.nodes.get(r.sender or "")
        reach = None if node is None else node.announced.reachable_edges
        return node is not None and (reach is None or edge in reach)

    def _better(self, task: Task, r: Reservation, edge: str, now: float) -> Rerouted | None:
        """The change to a placement on this edge that is enough shorter for the rest of a task, or None."""
        placed = task.placed
        assert placed is not None
        request = self._candidates.request(task.submitted, self._placer.suspects(task, now))
        if not isinstance(request, Request) or not _room(request.edge(edge), r, now):
            return None
        left = samples_left(*_span(placed, r), now)
        device = request.device if r.device is None or request.device is None else request.device.without([r])
        view = _option(request, edge)
        if r.edge is not None:
            view = view._replace(account=view.account.without([r]))
        request = request.rest(left).among([view], device)
        choice = self._policy.at_once(Algorithm(request, now, task.deadline_s))
        if choice is None or choice.edge is None or choice.delay_s > (1.0 - LEAST_GAIN) * (r.end_s - now):
            return None
        new = self._placer.placement(task, request, choice, now)
        return _rerouted(
            task_id=task.task_id,
            attempt=task.attempt,
            device=placed.device,
            placement=new.placement,
            from_s=now,
            samples=left,
            delay_s=new.delay_s,
            parts=new.parts,
            overhead=new.overhead,
        )

    def _saving(self, task: Task, edge: str, account: EdgeAccount) -> float:
        """How much shorter a slot of this edge makes a task at its full bandwidth, relative to its delay with the slot."""
        key = task.task_id, task.attempt, edge
        saving = self._savings.get(key)
        if saving is None:
            if len(self._savings) > MOST_SAVINGS:
                self._savings.clear()
            saving = self._savings[key] = self._computed_saving(task, edge, account)
        return saving

    def _computed_saving(self, task: Task, edge: str, account: EdgeAccount) -> float:
        request = self._candidates.request(task.submitted)
        if not isinstance(request, Request) or request.edge(edge) is None:
            return 0.0
        option, delays = _option(request, edge), []
        for slots in (0, min(1, account.slots)):
            empty = EdgeAccount(edge, slots, account.link1_capacity_bps, account.link2_capacity_bps)
            alone = request.rest(request.samples).among([option._replace(account=empty)], None)
            choice = self._policy.at_once(Algorithm(alone, 0.0))
            delays.append(math.inf if choice is None else choice.delay_s)
        without, best = delays
        return math.inf if without == math.inf else (without - best) / best


def _option(request: Request, edge: str) -> EdgeOption:
    """An edge that a task may use, without the task's caps."""
    return next(option for option in request.uncapped if option.account.name == edge)


def _span(placed: Placed, r: Reservation) -> tuple[int, float, float]:
    """The samples that the present placement of a running task was made for, its beginning, and its predicted end."""
    rest = placed.rest
    if rest is None:
        return placed.samples, r.start_s, r.start_s + placed.delay_s
    return rest.samples, rest.from_s, rest.from_s + rest.delay_s


def _changeable(task: Task, r: Reservation, now: float) -> bool:
    placed = task.placed
    if placed is None or not r.running or r.load is not None or r.end_s <= now:
        return False
    return (placed.rest is None or placed.rest.reroutes < MOST_REROUTES) and _span(placed, r)[2] >= r.end_s


def _room(option: EdgeOption | None, r: Reservation, now: float) -> bool:
    """Whether something is free on an edge that a task could use: a slot, or bandwidth up to its limits."""
    if option is None:
        return False
    slots, free1, free2 = option.account.timeline.at(now)
    if r.edge is None:
        return slots > 0
    more1, more2 = min(free1, option.max_link1_bps - r.link1_bps), min(free2, option.max_link2_bps - r.link2_bps)
    return (slots > 0 and not r.slots) or more1 > 0 or more2 > 0
