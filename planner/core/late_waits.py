"""The review of waits that last longer than planned: may the task start at once elsewhere instead of waiting on?

Algorithm 1 lets a task wait for the predicted ends of other tasks. If such an end does not come, the task would wait for as
long as the other one runs, however long that is. So the policy is asked again once a scheduled task is late: past its planned
start by `LATE_SHARE` of its predicted delay, and at least by `LATE_LEAST_S`. The policy is asked with what is known by then:
running tasks that are past their predicted end have a later one (`Overran`), and the task's own reservation counts as free.
If the policy would now start the task at once, it starts: a recorded retry with cause `AWAITED_LATE`, a placement, and a
start. Otherwise the task keeps its reservation and its place in the queue, and is reviewed again when it is twice as late.

While predictions come true and no task is put before scheduled ones, no wait is reviewed, so the paper's decisions do not
change. A reviewed task takes only what is free beside all promised starts, so it delays no other task.

Waits are reviewed on `Tick` only, when all inputs that are present have been read: an awaited end may be among them. The
times of the reviews follow from the placement and from when waits were last reviewed, which a snapshot contains. A policy of
the user's own is asked once, when the task is placed.
"""

from __future__ import annotations

from bus.text.units import format_seconds
from planner.core.candidates.candidates import Candidates
from planner.core.change_recorder import ChangeRecorder
from planner.core.placing import Placer
from planner.core.region.records import AWAITED_LATE, Task
from planner.core.region.state import RegionState
from planner.search.algorithm1 import Algorithm
from planner.search.ledger.reservation import Reservation
from planner.search.policies import Policy, Restriction
from planner.search.request import Request


class LateWaits:
    """Reviews the scheduled tasks of one region."""

    def __init__(
        self, region: RegionState, candidates: Candidates, recorder: ChangeRecorder, placer: Placer, policy: Policy
    ) -> None:
        self._region = region
        self._candidates = candidates
        self._recorder = recorder
        self._placer = placer
        self._policy = policy

    def review(self, now: float) -> None:
        """Start the tasks that are late and would now be started at once; look at the others again later."""
        region = self._region
        while (task := region.late_wait(now)) is not None:
            if not isinstance(self._policy, Restriction):
                continue  # a policy of the user's own is asked once
            r, placed = region.ledger.reservations[task.task_id], task.placed
            assert placed is not None
            if self._starts_now(task, r, now):
                detail = f"{format_seconds(now - placed.start_s)} after the planned start"
                self._recorder.retry(task, AWAITED_LATE, now, detail)
                self._placer.place(task, now)
            else:
                region.timers.add_late_start(task, placed, now)

    def _starts_now(self, task: Task, r: Reservation, now: float) -> bool:
        """Whether the policy would start a scheduled task at once, if it had no reservation."""
        request = self._candidates.request(task.submitted, self._placer.suspects(task, now))
        if not isinstance(request, Request):
            return False
        edges = [
            option._replace(account=option.account.without([r])) if option.account.name == r.edge else option
            for option in request.uncapped
        ]
        device = request.device if r.device is None or request.device is None else request.device.without([r])
        request = request.rest(request.samples).among(edges, device)
        choice = self._policy.place(Algorithm(request, now, task.deadline_s))
        return choice is not None and choice.start_s <= now
