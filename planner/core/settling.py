"""The settling of a region after its state has changed: expiry, overruns, rescheduling, and placing of retried tasks.

These are steps 2 to 4 of handling an event (`planner.core.core`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bus.messages import Moved, Overran, Start, TaskState
from bus.unchecked_constructors import maker
from planner.core import reschedule
from planner.core.change_recorder import ChangeRecorder
from planner.core.placing import Placer
from planner.core.region.records import BESIDE_SESSION, NEVER
from planner.core.region.state import RegionState
from planner.core.rerouting import Rerouter
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import Reservation

OVERRUN_SHARE: Final = 0.1
"""Share of its delay by which an overrunning task is prolonged, unless it is already later than that."""
OVERRUN_LEAST_S: Final = 0.001
"""Shortest time by which an overrunning task is prolonged."""
MOVES_A_CHANGE: Final = 1_000
"""Limit of moves in one `Moved` change, so that the change fits one record of the decisions topic."""

# Changes are built without validation: their values come from validated messages or are computed here from them.
_start, _moved, _overran = maker(Start), maker(Moved), maker(Overran)

Search = Callable[[Ledger, Mapping[str, float], Mapping[str, float], float], Sequence[tuple[Reservation, float | None]]]
"""Finds the tasks that start or move: the ledger, the changed edges and devices, and ledger time."""


def prolonged_end(r: Reservation, now: float) -> float | None:
    """The new predicted end of a running task that is past its predicted end. None: its reservation ends."""
    late = now - (r.start_s + r.length_s)
    return now + max(OVERRUN_SHARE * r.length_s, late, OVERRUN_LEAST_S)


@dataclass(frozen=True, slots=True)
class SettlingRules:
    """The computations of settling. Tests replace one to compare it with an oracle, or to plant a bug."""

    pull: Search = reschedule.pull  # after resources were only freed
    walk: Search = reschedule.walk  # after any change
    prolonged_end: Callable[[Reservation, float], float | None] = prolonged_end


class Settler:
    """Settles one region."""

    def __init__(
        self,
        region: RegionState,
        recorder: ChangeRecorder,
        placer: Placer,
        rules: SettlingRules,
        rerouter: Rerouter | None = None,
    ) -> None:
        self._region = region
        self._recorder = recorder
        self._placer = placer
        self._rules = rules
        self._rerouter = rerouter  # None: running tasks keep their placement

    def settle_if_changed(self, now: float) -> None:
        """Settle if an edge or device changed, a task must be placed again, or a running task is overdue."""
        region = self._region
        ends = region.timers.ends
        if region.changed_edges or region.changed_devices or self._recorder.replans or (ends and ends[0][0] <= now):
            self.settle(now)

    def settle(self, now: float) -> None:
        """Run steps 2 to 4 until nothing changes: expiry and overruns, the walk, and placing of retried or waiting tasks."""
        region, recorder = self._region, self._recorder
        ends, deadlines = region.timers.ends, region.timers.deadlines
        edges: dict[str, float] = {}  # that changed since running tasks were last rerouted
        while True:
            if deadlines:
                self._expire_unstarted(now)
            if ends and ends[0][0] <= now:
                self._prolong_overdue(now)
            if region.changed_edges or region.changed_devices:
                edges.update(region.changed_edges)
                self._reschedule(now)
            if region.session_ended:
                self._replan_sessions()
            if not recorder.replans:
                if not edges or self._rerouter is None or not self._rerouter.reroute(edges, now):
                    return
                edges.clear()
            for *_, task_id in recorder.take_replans():
                task = region.tasks.get(task_id)
                if task is not None and task.state is TaskState.WAITING:
                    if self._overbooked():
                        edges.update(region.changed_edges)
                        self._reschedule(now)
                    self._placer.place(task, now)

    def _overbooked(self) -> bool:
        """Whether a task was put before scheduled ones that have not moved yet."""
        region = self._region
        return NEVER in region.changed_edges.values() or NEVER in region.changed_devices.values()

    def _replan_sessions(self) -> None:
        """Place the sessions again that wait until others end."""
        self._region.session_ended = False
        for task in self._region.waiting.values():
            if task.submitted.session is not None:
                self._recorder.replan_later(task)

    def _expire_unstarted(self, now: float) -> None:
        """Expire tasks that have not started by their deadline.

        Running tasks expire on `Tick` only, because their completion may already be on its way.
        """
        timers, running = self._region.timers, []
        while (task := timers.pop_expired(now)) is not None:
            if task.state is TaskState.RUNNING:
                running.append(task)
            else:
                self._recorder.end(task, TaskState.EXPIRED, now, cause="deadline")
        for task in running:
            timers.add_deadline(task)

    def _prolong_overdue(self, now: float) -> None:
        region = self._region
        while (r := region.timers.pop_overdue(now)) is not None:
            to_s = self._rules.prolonged_end(r, now)
            if to_s is not None:
                attempt = region.tasks[r.task_id].attempt
                self._recorder.do(_overran(task_id=r.task_id, attempt=attempt, from_s=r.end_s, to_s=to_s), now)

    def _reschedule(self, now: float) -> None:
        """Start or move the scheduled tasks of every edge and device that changed, or retry those that no longer fit."""
        region, recorder = self._region, self._recorder
        ledger, tasks = region.ledger, region.tasks
        edges, devices = region.changed_edges, region.changed_devices
        found: Sequence[tuple[Reservation, float | None]]
        promised = ledger.concerned(edges, devices, now)
        if promised is None:
            found = ()
        elif promised < now or NEVER in edges.values() or NEVER in devices.values():
            found = self._rules.walk(ledger, edges, devices, now)
        else:
            found = self._rules.pull(ledger, dict(edges), dict(devices), now)
        moves: list[tuple[str, float]] = []
        for r, start in found:
            task = tasks[r.task_id]
            if start is None:
                beside = r.edge is not None and ledger.edges[r.edge].sessions.link1_bps
                recorder.retry(task, BESIDE_SESSION if beside else "no_longer_fits", now)
            elif start <= now:
                change = _start(task_id=r.task_id, attempt=task.attempt, device=task.submitted.device, at_s=start)
                recorder.do(change, now)
            else:
                moves.append((r.task_id, start))
        for first in range(0, len(moves), MOVES_A_CHANGE):
            task_ids, starts_s = zip(*moves[first : first + MOVES_A_CHANGE], strict=True)
            overtaken = True if region.overtaken else None
            recorder.do(_moved(task_ids=task_ids, starts_s=starts_s, overtaken=overtaken), now)
        region.walked()  # the walk has already covered every task that its own moves affect
