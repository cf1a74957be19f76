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
* Progress, heartbeats of strangers and of old incarnations, events of tasks that are not live: no change.

Heartbeats are soft state: they renew a lease, are in no record and in no hash; after a restart leases begin anew
(`restart_leases`). Leases, deadlines and patience are looked at on `Tick` only, so a planner that is still catching up
declares nobody lost.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Final

from bus.errors import ConfigError, InvariantError
from bus.messages import (
    Admitted,
    BandwidthGrant,
    Change,
    Decision,
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
from bus.values import Execution, Kind, Objective, Placement, Role
from planner.algorithm import Algorithm, Choice, EdgeOption, Request
from planner.cost import PlatformRow, RowTable
from planner.ledger import Ledger, Reservation
from planner.policies import Policy, Restriction, load_policy
from planner.search import DEVICE_CLOUD, DEVICE_EDGE, CutSearch
from planner.states import Step, next_state
from planner.tasks import HASH_MASK, NEVER, EndedTasks, Node, Task, hash_of
from planner.walk import due, walk

DEFAULT_MAX_WAITING: Final = 10_000
DEFAULT_PATIENCE_S: Final = 600.0
DEFAULT_REMEMBER_ENDED: Final = 10_000
DEFAULT_MAX_ATTEMPTS: Final = 100
OVERRUN_SHARE: Final = 0.1
"""A task past its predicted end is assumed to take a tenth of its delay more, or as long as it is late, if that is longer."""
OVERRUN_LEAST_S: Final = 0.001
MAX_SEARCHES: Final = 20_000
"""Prepared searches kept; they are made again when needed."""
STATE_VERSION: Final = 1


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


class PlannerCore:
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
        self.region = region
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        self.objective = objective
        self.execution = execution
        self.max_waiting = max_waiting
        self.patience_s = patience_s
        self.max_attempts = max_attempts
        self.now_s = float("-inf")  # the latest `now` seen
        self.ledger = Ledger()
        self.tasks: dict[str, Task] = {}  # those that have not ended
        self.ended = EndedTasks(remember_ended)
        self.nodes: dict[str, Node] = {}
        self._edge_names: list[str] = []  # ascending
        self._cloud_names: list[str] = []
        self._waiting: dict[str, Task] = {}
        self._running = 0
        self._seq = 0  # tasks admitted so far
        self._hash = 0  # sum over everything but what is in _touched
        self._touched: dict[str, Task] = {}
        self._rows = RowTable()
        self._searches: dict[tuple[PlatformRow | None, ...], CutSearch] = {}
        self._cloud_rows: dict[tuple[str, str], PlatformRow | None] = {}
        self._ends: list[tuple[float, int, str]] = []  # heap of predicted ends of what runs
        self._deadlines: list[tuple[float, int, str]] = []  # heap
        self._leases: dict[str, float] = {}  # node -> when its lease is over
        self._lease_heap: list[tuple[float, str]] = []
        # of the step that is being taken
        self._changes: list[Change] = []
        self._changed_edges: dict[str, bool] = {}  # name -> whether more than due starts may have changed
        self._changed_devices: dict[str, bool] = {}
        self._replan: list[tuple[int, str]] = []

    # --- the one way in ----------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Change]:
        """Take an event at ledger time `now`; the changes it makes, already applied, in order."""
        if now < self.now_s:
            now = self.now_s  # ledger time does not go back
        self.now_s = now
        changes: list[Change] = []
        self._changes = changes
        if isinstance(event, TaskSubmitted):
            self._on_submitted(event, now)
        elif isinstance(event, TaskCompleted):
            self._on_completed(event, now)
        elif isinstance(event, NodeHeartbeat):
            self._renew(event.node, event.incarnation, now)
        elif isinstance(event, Tick):
            self._on_tick(now)
        elif isinstance(event, TaskFailed):
            self._on_failed(event, now)
        elif isinstance(event, NodeAnnounced):
            self._on_announced(event, now)
        elif isinstance(event, NodeLeft):
            node = self.nodes.get(event.node)
            if node is not None and node.announced.incarnation == event.incarnation:
                self._lose(node, "left", now)
        elif isinstance(event, TaskCancelled):
            task = self.tasks.get(event.task_id)
            if task is not None:
                self._end(task, TaskState.FAILED, now, cause="cancelled")
        if changes:
            self._settle(now)
        self._changes = []
        return changes

    def next_wakeup(self) -> float | None:
        """Ledger time at which a `Tick` has something to look at, or None."""
        wakeup = min(self._next_lease(), self._next_deadline(), self._next_impatience())
        return None if wakeup == NEVER else wakeup

    # --- events ------------------------------------------------------------------------------------------------------

    def _on_submitted(self, submitted: TaskSubmitted, now: float) -> None:
        task_id = submitted.task_id
        if task_id in self.tasks or self.ended.get(task_id) is not None:
            return
        self._do(Admitted(task=submitted), now)
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

    def _on_tick(self, now: float) -> None:
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
        """A node has changed under the same incarnation: what it no longer serves is planned again."""
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
                and self._cloud_row(placed.model, placed.sha256) is None
            ):
                cause = "model_gone"
            if cause:
                self._retry(task, cause, now, name)

    # --- what follows from a change ----------------------------------------------------------------------------------

    def _settle(self, now: float) -> None:
        """Steps 2 to 4: overruns, the walk, and placing what is without a place."""
        while True:
            self._prolong_overdue(now)
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
            self._do(Overran(task_id=task_id, attempt=self.tasks[task_id].attempt, from_s=end, to_s=to_s), now)

    def _walk(self, now: float) -> None:
        edges, devices = self._changed_edges, self._changed_devices
        if not edges and not devices:
            return
        if any(edges.values()) or any(devices.values()):
            found = walk(self.ledger, edges, devices, now)
        else:
            found = due(self.ledger, edges, devices, now)
        for r, start in found:
            task = self.tasks[r.task_id]
            if start is None:
                self._retry(task, "no_longer_fits", now)
            elif start <= now:
                self._do(Start(task_id=r.task_id, attempt=task.attempt, device=task.submitted.device, at_s=start), now)
            else:
                self._do(Moved(task_id=r.task_id, attempt=task.attempt, from_s=r.start_s, to_s=start), now)
        # what the walk did needs no other walk: it has looked at all that its moves concern
        self._changed_edges.clear()
        self._changed_devices.clear()

    def _replan_later(self, task: Task) -> None:
        self._replan.append((task.seq, task.task_id))

    def _retry(self, task: Task, cause: str, now: float, detail: str = "") -> None:
        if task.attempt >= self.max_attempts:
            self._end(task, TaskState.FAILED, now, cause=cause, detail=f"after {task.attempt} attempts; {detail}")
            return
        self._do(Retried(task_id=task.task_id, attempt=task.attempt + 1, cause=cause, detail=detail), now)
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
            Ended(
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

    def request(self, submitted: TaskSubmitted) -> Request | str | None:
        """A task as Algorithm 1 sees it; None while its device is not there; a cause where it never can be."""
        device = self.nodes.get(submitted.device)
        if device is None or device.announced.role is not Role.DEVICE:
            return None
        row = device.rows.get(submitted.model)
        if row is None:
            return "unknown_model"
        reach = device.reach.get(row.model)
        if reach is None:
            reach = device.reach[row.model] = self._reach(device, row)
        cap1, cap2 = submitted.max_link1_bps, submitted.max_link2_bps
        options = [
            EdgeOption(
                option.account,
                option.search,
                option.max_link1_bps if cap1 is None or option.max_link1_bps < cap1 else cap1,
                option.max_link2_bps if cap2 is None or option.max_link2_bps < cap2 else cap2,
            )
            for option in reach
        ]
        return Request(
            submitted.task_id,
            submitted.samples,
            submitted.input_bytes,
            row,
            device.alone[row.model],
            self.ledger.devices.get(submitted.device),
            options,
            self.objective,
        )

    def _reach(self, device: Node, row: PlatformRow) -> list[EdgeOption]:
        """The edges that a device can reach, for one model, in order of name; kept until a node joins or is lost."""
        device.alone[row.model] = self._search(row, None, None)
        announced = device.announced
        cloud = self._cloud_row(row.model, row.sha256)
        names = self._edge_names if announced.reachable_edges is None else sorted(set(announced.reachable_edges))
        options: list[EdgeOption] = []
        for name in names:
            node = self.nodes.get(name)
            if node is None or node.announced.role is not Role.EDGE:
                continue
            edge = node.rows.get(row.model)
            if edge is not None and (edge.sha256 != row.sha256 or edge.layers != row.layers):
                edge = None
            if edge is None and cloud is None:
                continue
            account = self.ledger.edges[name]
            limit1 = account.link1_capacity_bps
            if announced.link1_capacity_bps and announced.link1_capacity_bps < limit1:
                limit1 = announced.link1_capacity_bps
            options.append(EdgeOption(account, self._search(row, edge, cloud), limit1, account.link2_capacity_bps))
        return options

    def _forget_reach(self, changed: NodeAnnounced) -> None:
        """A node has joined, changed or gone: what was kept about it is looked up anew."""
        if changed.role is Role.DEVICE:
            return  # a device's own node is made anew
        for node in self.nodes.values():
            reachable = node.announced.reachable_edges
            if changed.role is Role.CLOUD or reachable is None or changed.node in reachable:
                node.reach.clear()

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
        option = next((option for option in request.edges if option.account.name == choice.edge), None)
        self._check(request, option, choice, now)
        search = request.device_search if option is None else option.search
        placement = Placement(
            kind=Kind.of(choice.cut1, choice.cut2, row.layers),
            edge=choice.edge,
            cut1=choice.cut1,
            cut2=choice.cut2,
            cut1_name=row.names[choice.cut1 - 1] if choice.cut1 else "input",
            cut2_name=row.names[choice.cut2 - 1] if choice.cut2 else "input",
            link1_bps=choice.link1_bps,
            link2_bps=choice.link2_bps,
        )
        parts = search.costs.parts(
            choice.cut1, choice.cut2, choice.link1_bps, choice.link2_bps, submitted.samples, submitted.input_bytes
        )
        self._do(
            Placed(
                task_id=task.task_id,
                attempt=task.attempt,
                device=submitted.device,
                model=row.model,
                sha256=row.sha256,
                samples=submitted.samples,
                policy=self.policy.name,
                objective=self.objective,
                execution=self.execution,
                placement=placement,
                start_s=choice.start_s,
                wait_s=choice.start_s - now,
                delay_s=choice.delay_s,
                parts=parts,
            ),
            now,
        )
        if choice.edge is not None:
            for link, bps in ((1, choice.link1_bps), (2, choice.link2_bps)):
                if bps:
                    self._do(
                        BandwidthGrant(
                            task_id=task.task_id,
                            attempt=task.attempt,
                            edge=choice.edge,
                            link=1 if link == 1 else 2,
                            bps=bps,
                            from_s=choice.start_s,
                        ),
                        now,
                    )
        if choice.start_s <= now:
            self._do(
                Start(task_id=task.task_id, attempt=task.attempt, device=submitted.device, at_s=choice.start_s), now
            )

    def _check(self, request: Request, option: EdgeOption | None, choice: Choice, now: float) -> None:
        """A policy may be a user's: what it chose must be free, and within the task's caps (11)."""
        end = choice.start_s + choice.delay_s
        good = choice.start_s >= now and (choice.edge is None) == (option is None)
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
        if not named or any(name not in self.nodes for name in named):
            return None
        families = self.policy.families if isinstance(self.policy, Restriction) else {DEVICE_CLOUD}
        if not self._cloud_names and not families <= {DEVICE_EDGE}:
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

    def _row(self, node: str, model: str, sha256: str) -> PlatformRow | None:
        row = self.nodes[node].rows.get(model)
        return row if row is not None and row.sha256 == sha256 else None

    def _cloud_row(self, model: str, sha256: str) -> PlatformRow | None:
        """How the cloud runs a model: the profile of its fastest node, of equals the first by name."""
        key = model, sha256
        if key not in self._cloud_rows:
            self._cloud_rows[key] = self._fastest_cloud(self._cloud_names, model, sha256)
        return self._cloud_rows[key]

    def _fastest_cloud(self, names: Iterable[str], model: str, sha256: str) -> PlatformRow | None:
        rows = [row for name in names if (row := self._row(name, model, sha256)) is not None]
        return min(rows, key=lambda row: row.compute_s[-1], default=None)

    def _search(self, device: PlatformRow, edge: PlatformRow | None, cloud: PlatformRow | None) -> CutSearch:
        if cloud is not None and cloud.layers != device.layers:
            cloud = None
        key = device, edge, cloud
        search = self._searches.get(key)
        if search is None:
            if len(self._searches) >= MAX_SEARCHES:
                self._searches.clear()
            search = self._searches[key] = CutSearch(device, edge, cloud)
        return search

    # --- the one mutator ---------------------------------------------------------------------------------------------

    def _do(self, change: Change, now: float) -> None:
        self.apply(change, now)
        self._changes.append(change)

    def fold(self, decision: Decision) -> None:
        """Apply a recorded decision. Whoever folds compares `state_hash` with the record's."""
        for change in decision.changes:
            self.apply(change, decision.now_s)
        self.settled(decision.now_s)

    def settled(self, now: float) -> None:
        """All changes of a record have been applied: nothing of them is left to be walked."""
        self.now_s = max(self.now_s, now)
        self._changed_edges.clear()
        self._changed_devices.clear()

    def apply(self, change: Change, now: float) -> None:
        """Make one change, decided here or recorded earlier. Raises `InvariantError` for one that cannot be."""
        if isinstance(change, Admitted):
            self._apply_admitted(change, now)
        elif isinstance(change, NodeJoined):
            self._apply_joined(change)
        elif isinstance(change, NodeLost):
            self._apply_lost(change)
        else:
            task = self.tasks.get(change.task_id)
            if task is None:
                raise InvariantError(f"{change!r} is about a task that is not live")
            self._touched[change.task_id] = task
            if isinstance(change, Placed):
                self._apply_placed(task, change, now)
            elif isinstance(change, BandwidthGrant):
                self._apply_grant(change)
            elif isinstance(change, Start):
                self._apply_start(task, change)
            elif isinstance(change, Ended):
                self._apply_ended(task, change, now)
            elif isinstance(change, Moved):
                self._step(task, Step.MOVED, change.to_s)
                self._note(self.ledger.reservations[task.task_id], whole=True)
                self.ledger.move(task.task_id, change.to_s)
            elif isinstance(change, Overran):
                self._step(task, Step.OVERRAN, change.to_s)
                r = self.ledger.reservations[task.task_id]
                self.ledger.prolong(task.task_id, change.to_s)
                heappush(self._ends, (change.to_s, task.seq, task.task_id))
                self._note(r, whole=True)
            else:
                self._apply_retried(task, change, now)

    def _apply_admitted(self, change: Admitted, now: float) -> None:
        submitted = change.task
        task_id = submitted.task_id
        if task_id in self.tasks:
            raise InvariantError(f"{task_id} is admitted twice")
        self._seq += 1
        task = Task(submitted, self._seq, now)
        task.history.append(f"{Step.ADMITTED} at {now:.6f}")
        self.tasks[task_id] = self._touched[task_id] = self._waiting[task_id] = task
        if task.deadline_s != NEVER:
            heappush(self._deadlines, (task.deadline_s, task.seq, task_id))

    def _apply_placed(self, task: Task, change: Placed, now: float) -> None:
        self._step(task, Step.PLACED, change.start_s)
        if change.attempt != task.attempt:
            raise InvariantError(f"{task!r} is placed as attempt {change.attempt}")
        task.placed = change
        del self._waiting[task.task_id]
        self.ledger.reserve(_reservation(task, change), now)

    def _apply_grant(self, change: BandwidthGrant) -> None:
        r = self.ledger.reservations.get(change.task_id)
        if r is None or r.edge != change.edge or change.bps != (r.link1_bps if change.link == 1 else r.link2_bps):
            raise InvariantError(f"{change!r} is not what is reserved: {r}")

    def _apply_start(self, task: Task, change: Start) -> None:
        self._step(task, Step.START, change.at_s)
        r = self.ledger.reservations[task.task_id]
        if r.start_s != change.at_s:
            self._note(r, whole=True)
            self.ledger.move(task.task_id, change.at_s)
        self.ledger.start(task.task_id)
        self._running += 1
        heappush(self._ends, (r.end_s, task.seq, task.task_id))

    def _apply_retried(self, task: Task, change: Retried, now: float) -> None:
        self._step(task, Step.RETRIED, now)
        if change.attempt <= task.attempt:
            raise InvariantError(f"{task!r} is retried as attempt {change.attempt}")
        if task.task_id in self.ledger.reservations:
            self._release(task, now)
        task.attempt = change.attempt
        task.placed = None
        task.waiting_since_s = now
        self._waiting[task.task_id] = task

    def _apply_ended(self, task: Task, change: Ended, now: float) -> None:
        task_id = task.task_id
        self._step(task, Step(change.state.value), now)
        if task_id in self.ledger.reservations:
            r = self._release(task, now)
            released = (r.edge, r.slots, r.link1_bps, r.link2_bps)
            recorded = (change.edge, change.released_slots, change.released_link1_bps, change.released_link2_bps)
            if released != recorded:
                raise InvariantError(f"{task_id} releases {released}, recorded is {recorded}")
        self._waiting.pop(task_id, None)
        del self.tasks[task_id]
        del self._touched[task_id]
        self._hash += self.ended.add(task_id, change.state) - task.digest

    def _apply_joined(self, change: NodeJoined) -> None:
        announced = change.node
        name = announced.node
        old = self.nodes.get(name)
        if old is not None and old.announced.role is not announced.role:
            raise InvariantError(f"{name} joins as {announced.role} while it is {old.announced.role}")
        node = self.nodes[name] = Node(announced, self._rows)
        self._hash += node.digest - (old.digest if old is not None else 0)
        self._forget_reach(announced)
        if announced.role is Role.EDGE:
            if old is None:
                insort(self._edge_names, name)
            self.ledger.open_edge(name, announced.slots, announced.link1_capacity_bps, announced.link2_capacity_bps)
            self._changed_edges[name] = True
        elif announced.role is Role.CLOUD:
            if old is None:
                insort(self._cloud_names, name)
            self._cloud_rows.clear()

    def _apply_lost(self, change: NodeLost) -> None:
        node = self.nodes.pop(change.node, None)
        if node is None:
            raise InvariantError(f"{change!r}: it is not there")
        self._hash -= node.digest
        self._forget_reach(node.announced)
        self._leases.pop(change.node, None)
        if node.announced.role is Role.EDGE:
            self._edge_names.remove(change.node)
            self.ledger.close_edge(change.node)
            self._changed_edges.pop(change.node, None)
        elif node.announced.role is Role.CLOUD:
            self._cloud_names.remove(change.node)
            self._cloud_rows.clear()

    def _release(self, task: Task, now: float) -> Reservation:
        r = self.ledger.release(task.task_id)
        self._running -= r.running
        # what ends exactly when it was predicted to changes nothing for anybody but those who are due
        self._note(r, whole=not (r.running and r.end_s == now))
        return r

    def _note(self, r: Reservation, *, whole: bool) -> None:
        if r.edge is not None:
            self._changed_edges[r.edge] = whole or self._changed_edges.get(r.edge, False)
        if r.device is not None:
            self._changed_devices[r.device] = whole or self._changed_devices.get(r.device, False)

    def _step(self, task: Task, step: Step, at_s: float) -> None:
        before = task.state
        task.state = next_state(task.task_id, before, step, task.history)
        task.history.append(f"{before} -> {task.state} by {step} at {at_s:.6f}")

    # --- leases and timers -------------------------------------------------------------------------------------------

    def _renew(self, name: str, incarnation: str, now: float) -> None:
        node = self.nodes.get(name)
        if node is None or node.announced.incarnation != incarnation:
            return
        until = now + node.announced.lease_s
        if name not in self._leases or until < self._leases[name]:
            heappush(self._lease_heap, (until, name))
        self._leases[name] = until

    def _next_lease(self) -> float:
        heap, leases = self._lease_heap, self._leases
        while heap:
            until, name = heap[0]
            real = leases.get(name)
            if real == until:
                return until
            heappop(heap)
            if real is not None and real > until:
                heappush(heap, (real, name))
        return NEVER

    def _next_deadline(self) -> float:
        heap = self._deadlines
        while heap:
            at_s, seq, task_id = heap[0]
            task = self.tasks.get(task_id)
            if task is not None and task.seq == seq:
                return at_s
            heappop(heap)
        return NEVER

    def _next_impatience(self) -> float:
        """When the task that has been WAITING for longest has waited for too long."""
        for task in self._waiting.values():  # in the order in which they began to wait
            return task.waiting_since_s + self.patience_s
        return NEVER

    def restart_leases(self, now: float) -> None:
        """After a restart every lease begins anew, in full."""
        self.now_s = max(self.now_s, now)
        self._leases = {name: now + node.announced.lease_s for name, node in self.nodes.items()}
        self._lease_heap = [(until, name) for name, until in self._leases.items()]
        heapify(self._lease_heap)

    # --- the state as a value ----------------------------------------------------------------------------------------

    @property
    def state_hash(self) -> str:
        """128 bits over tasks, reservations, nodes and what is remembered; kept up to date, not computed anew."""
        if self._touched:
            reservations = self.ledger.reservations
            for task_id, task in self._touched.items():
                digest = hash_of(task.text(reservations.get(task_id)))
                self._hash += digest - task.digest
                task.digest = digest
            self._touched.clear()
        self._hash &= HASH_MASK
        return f"{(self._hash + self._seq) & HASH_MASK:032x}"

    @property
    def live_tasks(self) -> int:
        """Tasks that have not ended."""
        return len(self.tasks)

    def to_state(self) -> dict[str, Any]:
        """Everything that decides what will happen, as JSON can carry it. Equal profiles are written once."""
        profiles: dict[str, int] = {}
        nodes = []
        for node in self.nodes.values():
            models = [[profiles.setdefault(text, len(profiles)), platform] for text, platform in node.profile_texts()]
            announced = node.announced.model_dump(mode="json", exclude={"models"})
            nodes.append({"announced": announced, "models": models})
        tasks = []
        for task in self.tasks.values():
            r = self.ledger.reservations.get(task.task_id)
            tasks.append(
                {
                    "submitted": task.submitted.model_dump(mode="json"),
                    "seq": task.seq,
                    "state": task.state.value,
                    "attempt": task.attempt,
                    "deadline_s": None if task.deadline_s == NEVER else task.deadline_s,
                    "waiting_since_s": task.waiting_since_s,
                    "placed": None if task.placed is None else task.placed.model_dump(mode="json"),
                    "start_s": None if r is None else r.start_s,
                    "end_s": None if r is None else r.end_s,
                }
            )
        return {
            "version": STATE_VERSION,
            "region": self.region,
            "now_s": None if self.now_s == float("-inf") else self.now_s,
            "admitted": self._seq,
            "profiles": [json.loads(text) for text in profiles],
            "nodes": nodes,
            "tasks": tasks,
            "ended": self.ended.to_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take on a state of `to_state`; the core must be new. Leases: see `restart_leases`.

        Raises `ConfigError` for a state of another version or region.
        """
        if state.get("version") != STATE_VERSION or state.get("region") != self.region:
            raise ConfigError(
                f"a state of version {state.get('version')}, region {state.get('region')}; "
                f"wanted {STATE_VERSION}, {self.region}"
            )
        if self.tasks or self.nodes:
            raise InvariantError("only a new core can be restored")
        self.now_s = float("-inf") if state["now_s"] is None else state["now_s"]
        for entry in state["nodes"]:
            models = [{**state["profiles"][index], "platform": platform} for index, platform in entry["models"]]
            self._apply_joined(NodeJoined(node=NodeAnnounced.model_validate({**entry["announced"], "models": models})))
        for entry in sorted(state["tasks"], key=lambda entry: (entry["waiting_since_s"], entry["seq"])):
            self._restore_task(entry)
        self._seq = state["admitted"]
        self._hash += self.ended.restore(state["ended"])
        self._changed_edges.clear()
        self._changed_devices.clear()

    @classmethod
    def from_state(cls, state: dict[str, Any], **settings: Any) -> PlannerCore:
        """A core with a state of `to_state` and the settings of `__init__`."""
        core = cls(state["region"], **settings)
        core.restore(state)
        return core

    def _restore_task(self, entry: dict[str, Any]) -> None:
        submitted = TaskSubmitted.model_validate(entry["submitted"])
        task = Task(submitted, entry["seq"], entry["waiting_since_s"])
        task.state = TaskState(entry["state"])
        task.attempt = entry["attempt"]
        task.deadline_s = NEVER if entry["deadline_s"] is None else entry["deadline_s"]
        task.history.append("restored")
        self.tasks[task.task_id] = self._touched[task.task_id] = task
        if task.deadline_s != NEVER:
            heappush(self._deadlines, (task.deadline_s, task.seq, task.task_id))
        if entry["placed"] is None:
            self._waiting[task.task_id] = task
            return
        task.placed = Placed.model_validate(entry["placed"])
        r = _reservation(task, task.placed)
        r.start_s, r.end_s, r.running = entry["start_s"], entry["end_s"], task.state is TaskState.RUNNING
        self.ledger.reserve(r, self.now_s)
        if r.running:
            self._running += 1
            heappush(self._ends, (r.end_s, task.seq, task.task_id))

    def validate(self) -> None:
        """All that must hold between events: (8)-(11), one task a device, every reservation a live task's, the hash.

        Raises `InvariantError`. It looks at everything and takes its time; it is for tests.
        """
        self.ledger.audit(self.now_s)
        for task in self.tasks.values():
            r = self.ledger.reservations.get(task.task_id)
            placed = task.placed
            if task.state.ended or (task.state is TaskState.WAITING) != (r is None) or (placed is None) != (r is None):
                raise InvariantError(f"{task!r} holds {r}")
            if (task.state is TaskState.WAITING) != (task.task_id in self._waiting):
                raise InvariantError(f"{task!r} is among the waiting, or is not, against its state")
            if r is None or placed is None:
                continue
            if r.running != (task.state is TaskState.RUNNING):
                raise InvariantError(f"{task!r} holds {r}")
            submitted, placement = task.submitted, placed.placement
            for bps, cap in (
                (placement.link1_bps, submitted.max_link1_bps),
                (placement.link2_bps, submitted.max_link2_bps),
            ):
                if cap is not None and bps > cap:
                    raise InvariantError(f"(11) is broken: {task!r} is granted {bps} of {cap}")
            device = self.nodes.get(submitted.device)
            reach = None if device is None else device.announced.reachable_edges
            if device is None or (placement.edge is not None and reach is not None and placement.edge not in reach):
                raise InvariantError(f"(13) is broken: {task!r} on {placement.edge}, reachable {reach}")
        strangers = self.ledger.reservations.keys() - self.tasks.keys()
        if strangers or len(self._waiting) + len(self.ledger.reservations) != len(self.tasks):
            raise InvariantError(f"reservations of nobody: {sorted(strangers)}")
        if self._running != sum(task.state is TaskState.RUNNING for task in self.tasks.values()):
            raise InvariantError("the count of running tasks is wrong")
        reservations = self.ledger.reservations
        expected = self._seq + self.ended.digest() + sum(node.digest for node in self.nodes.values())
        expected += sum(hash_of(task.text(reservations.get(task.task_id))) for task in self.tasks.values())
        if self.state_hash != f"{expected & HASH_MASK:032x}":
            raise InvariantError("the hash that was kept up to date is not that of the state")


def _reservation(task: Task, placed: Placed) -> Reservation:
    placement = placed.placement
    return Reservation(
        task.task_id,
        task.seq,
        placement.edge,
        placed.device if placement.cut1 else None,
        placed.start_s,
        placed.delay_s,
        int(placement.uses_slot),
        placement.link1_bps,
        placement.link2_bps,
    )


def _seq(task: Task) -> int:
    return task.seq
