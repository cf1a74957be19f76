"""The state of a region, folded from its topics: nodes, reservations, placements, and the reasons why tasks wait.

The view takes records (`read`) and has no clock and no I/O, so it serves `deepar top`, `deepar ui`, the replay of a
finished run, and tests. `bus.decisions` selects the valid decisions, and `bus.region_tasks` folds them. Node announcements
and events add what decisions lack: announced nodes that have not joined, the last heartbeat of each node, and failures.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from bus import messages, topics
from bus.decisions import DecisionLog, Dropped
from bus.errors import ProtocolError
from bus.messages import (
    Admitted,
    Change,
    Decision,
    Ended,
    EpochOpened,
    Learned,
    Moved,
    NodeAnnounced,
    NodeHeartbeat,
    NodeJoined,
    NodeLost,
    Overran,
    Placed,
    PlannerHeartbeat,
    PlannerLeft,
    Rerouted,
    Retried,
    Start,
    TaskCompleted,
    TaskFailed,
    TaskProgress,
    TaskState,
)
from bus.port import Record
from bus.region_tasks import KnownTask, RegionTasks
from bus.text.units import format_moment, format_rate, format_seconds
from bus.values import STATIONS, Placement, Role
from deploy.monitor.decision_lines import lines_of
from deploy.monitor.task_view import TaskView
from planner.learning.lessons import Lessons
from planner.service.prediction_errors import PredictionErrors

_COLUMNS = re.compile(r"\s{2,}")  # column gaps of `tail`; elsewhere a line has commas

TOPICS: Final = (topics.NODES, topics.DECISIONS, topics.EVENTS)
"""The topics that a view reads."""

KEEP_ENDED: Final = 500
"""Maximum number of ended tasks that are shown; counts and the mean cover all ended tasks."""

KEEP_LINES: Final = 500
NAMED: Final = 4
"""Maximum number of task names in a list of holders."""

RECENT: Final = 1000
"""Number of recent tasks that percentiles cover."""


@dataclass(slots=True)
class NodeView:
    """One node, as the topics last described it."""

    announced: NodeAnnounced
    standing: Literal["announced", "joined", "draining", "lost"] = "announced"
    heard_ms: int = 0  # send time of its last heartbeat, by its clock


@dataclass(frozen=True, slots=True)
class Line:
    """One event in the list of recent events."""

    number: int  # counts from 1
    at_s: float  # ledger time
    style: str
    who: str
    what: str
    details: str


@dataclass(frozen=True, slots=True)
class LinkUse:
    """The bandwidth of a link that running tasks hold."""

    number: Literal[1, 2]
    capacity_bps: int
    granted: dict[str, int] = field(default_factory=dict)  # task -> bits/s

    @property
    def granted_bps(self) -> int:
        """The sum of the grants."""
        return sum(self.granted.values())

    @property
    def share(self) -> float:
        """Granted share of the capacity, 0..1."""
        return self.granted_bps / self.capacity_bps if self.capacity_bps else 0.0


class RegionView:
    """The state of one region. Its memory is bounded by the live nodes and tasks, `keep_ended` and `KEEP_LINES`."""

    def __init__(self, region: int = 0, *, keep_ended: int = KEEP_ENDED) -> None:
        self.region = region
        self._keep_ended = keep_ended
        self.version = 0  # grows with every record that changes something
        self.records = 0
        self.unreadable = 0
        self.seq = 0
        self.standing = "no planner yet"  # later: led, left
        self.nodes: dict[str, NodeView] = {}
        self.tasks: OrderedDict[str, TaskView] = OrderedDict()  # in order of their latest change
        self.lines: deque[Line] = deque(maxlen=KEEP_LINES)
        self.ended: Counter[TaskState] = Counter()
        self.delay_sum_s = 0.0
        self.errors = PredictionErrors()
        self.lessons = Lessons()
        self.lessons_version = 0  # version of the view at the latest lesson
        self.recent_delays_s: deque[float] = deque(maxlen=RECENT)  # admission to end, completed tasks
        self.log = DecisionLog(joins=True)
        self._now_s = 0.0  # ledger time of the last decision
        self._since_ms: int | None = (
            None  # send time of that decision or of the epoch's opening, by the planner's clock
        )
        self._heard_ms = 0  # send time of the planner's last record
        self.heard = 0  # records of the planner that were read
        self.silent_s: int | None = None  # time since the last of them, if longer than its lease (`note_silence`)
        self._running: dict[str, TaskView] = {}
        self._ended: deque[TaskView] = deque()
        self._lines = 0
        self._region = RegionTasks()

    # --- folding -----------------------------------------------------------------------------------------------------

    def read(self, record: Record) -> None:
        """Fold one record of `TOPICS`; unreadable and invalid records are counted and skipped."""
        self.records += 1
        if record.topic == topics.DECISIONS:
            self._decision(self.log.read(record), record.timestamp_ms)
            return
        if record.value is None:
            return
        try:
            message = messages.decode(record.topic, record.value)
        except ProtocolError:
            self.unreadable += 1
            return
        match message:
            case NodeAnnounced():
                known = self.nodes.get(message.node)
                # The decision that answers an announcement may be read before it.
                if known is None or (known.standing == "lost" and known.announced.incarnation != message.incarnation):
                    self.nodes[message.node] = NodeView(message, "announced", record.timestamp_ms)
                    self._changed()
            case NodeHeartbeat() if message.node in self.nodes:
                self.nodes[message.node].heard_ms = record.timestamp_ms
            case TaskProgress() if (task := self._live(message.task_id, message.attempt)) is not None:
                task.done = message.done
                self._touch(task)
            case TaskCompleted() if (task := self._live(message.task_id, message.attempt)) is not None:
                task.measured, task.delay_s = message.measured, message.delay_s
                self._touch(task)
            case TaskFailed():
                self._say(lines_of(message))
            case _:
                pass

    def _decision(self, message: Any, timestamp_ms: int) -> None:
        if isinstance(message, Dropped):
            return
        self._heard_ms = max(self._heard_ms, timestamp_ms)
        self.heard += 1
        match message:
            case Decision():
                self._now_s, self._since_ms, self.seq = message.now_s, timestamp_ms, message.seq
                self._say(lines_of(message, self._region, self._change))
            case EpochOpened():
                self.standing, self._since_ms, self._heard_ms = "led", timestamp_ms, timestamp_ms
                self._say(lines_of(message))
            case PlannerLeft():
                self.standing = "left"
                self._say(lines_of(message))
            case PlannerHeartbeat():
                self._changed()

    def note_silence(self, silent_s: float) -> None:
        """Take over the time since the planner's last record. The view has no clock, so the feed measures it."""
        silent = self.standing == "led" and silent_s > self.log.lease_s
        shown_s = int(silent_s) if silent else None
        if shown_s != self.silent_s:
            self.silent_s = shown_s
            self._changed()

    def _change(self, change: Change, task: KnownTask | None) -> None:
        match change:
            case Admitted(task=submitted):
                admitted_s = self._now_s
                view = TaskView(submitted.task_id, submitted.device, submitted.model, submitted.samples, admitted_s)
                self.tasks[submitted.task_id] = view
                self._touch(view)
            case NodeJoined(node=node):
                heard_ms = self.nodes[node.node].heard_ms if node.node in self.nodes else 0
                self.nodes[node.node] = NodeView(node, "draining" if node.draining else "joined", heard_ms)
                self.lessons.join(node)
            case Learned():
                self.lessons.learn(change)
                self._changed()
                self.lessons_version = self.version
            case NodeLost():
                if (gone := self.nodes.get(change.node)) is not None:
                    gone.standing = "lost"
            case Moved():
                for task_id in change.task_ids:
                    self._follow(self._region.tasks[task_id], change)
            case Placed() | Start() | Overran() | Rerouted() | Retried() | Ended() if task is not None:
                self._follow(task, change)
            case _:
                pass

    def _follow(self, task: KnownTask, change: Change) -> None:
        """Update a task's view after a change; tasks whose admission was not read are not shown."""
        view = self.tasks.get(task.task_id)
        if view is None:
            return
        view.follow(task)
        if isinstance(change, Start):
            self._running[view.task_id] = view
        elif isinstance(change, Retried):
            self._running.pop(view.task_id, None)
            view.measured = view.delay_s = view.done = None
        elif isinstance(change, Ended):
            self._end(view, change)
        self._touch(view)

    def _end(self, task: TaskView, ended: Ended) -> None:
        self._running.pop(task.task_id, None)
        if ended.measured is not None:
            task.measured, task.delay_s = ended.measured, ended.delay_s
        self.ended[ended.state] += 1
        if ended.state is TaskState.COMPLETED and task.session is None:
            delay_s = self._now_s - task.admitted_s
            self.delay_sum_s += delay_s
            self.recent_delays_s.append(delay_s)
            if task.delay_s is not None and task.predicted_delay_s is not None:
                self.errors.observe(task.delay_s, task.predicted_delay_s)
        self._ended.append(task)
        while len(self._ended) > self._keep_ended:
            oldest = self._ended.popleft()
            if self.tasks.get(oldest.task_id) is oldest:
                del self.tasks[oldest.task_id]

    def _live(self, task_id: str, attempt: int) -> TaskView | None:
        task = self.tasks.get(task_id)
        return task if task is not None and task.attempt == attempt and not task.state.ended else None

    def _touch(self, task: TaskView) -> None:
        self._changed()
        task.version = self.version
        self.tasks.move_to_end(task.task_id)

    def _changed(self) -> None:
        self.version += 1

    def _say(self, lines: Iterable[tuple[str, str, str, str]]) -> None:
        for style, who, what, details in lines:
            self._lines += 1
            self.lines.append(Line(self._lines, self.now_s, style, who, what, _COLUMNS.sub(", ", details.strip())))
        self._changed()

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def heard_s(self) -> float:
        """Send time of the planner's last record, by its clock; seconds since 1970."""
        return self._heard_ms / 1000

    def planner_text(self) -> str:
        """`region 0, led by p1, epoch 3`: the leading planner, and since when it is silent."""
        if self.standing == "led":
            text = f"region {self.region}, led by {self.log.planner}, epoch {self.log.epoch}"
            if self.silent_s is None:
                return text
            return f"{text}; silent since {format_moment(self.now_s, 1)}, for {format_seconds(self.silent_s)}"
        return f"region {self.region}, {'the planner has left' if self.standing == 'left' else self.standing}"

    @property
    def now_s(self) -> float:
        """Ledger time of the planner's last record: that of its last decision, plus the time since then by its clock."""
        passed_ms = self._heard_ms - self._since_ms if self._since_ms is not None else 0
        return self._now_s + max(0, passed_ms) / 1000

    def live(self, *states: TaskState) -> list[TaskView]:
        """Tasks that have not ended, in order of admission; only those in `states`, if given."""
        found = [t for t in self.tasks.values() if not t.state.ended and (not states or t.state in states)]
        return sorted(found, key=lambda task: task.admitted_s)

    def role(self, role: Role) -> list[NodeView]:
        """The nodes of a role, by name."""
        return sorted((n for n in self.nodes.values() if n.announced.role is role), key=lambda n: n.announced.node)

    def slot_holders(self, edge: str) -> list[str]:
        """The tasks that hold a slot of an edge. Sessions hold none."""
        return sorted(
            t.task_id
            for t in self._running.values()
            if (p := t.placement) and p.edge == edge and p.uses_slot and t.session is None
        )

    def link(self, edge: str, number: Literal[1, 2]) -> LinkUse:
        """The grants on an edge's link 1 or 2. Raises KeyError for an unknown node."""
        node = self.nodes[edge].announced
        granted = {}
        for task in self._running.values():
            if (placement := task.placement) is not None and placement.edge == edge:
                granted[task.task_id] = placement.link1_bps if number == 1 else placement.link2_bps
        capacity_bps = node.link1_capacity_bps if number == 1 else node.link2_capacity_bps
        return LinkUse(number, capacity_bps, {task: bps for task, bps in sorted(granted.items()) if bps})

    def tasks_on(self, node: NodeView) -> list[str]:
        """The running tasks that use a node."""
        name, role = node.announced.node, node.announced.role
        return sorted(
            t.task_id
            for t in self._running.values()
            if (role is Role.DEVICE and t.device == name)
            or ((p := t.placement) is not None and (p.uses_cloud if role is Role.CLOUD else p.edge == name))
        )

    def flow(self) -> dict[str, int]:
        """The number of running tasks that use each station."""
        counts = dict.fromkeys(STATIONS, 0)
        for task in self._running.values():
            for station in STATIONS:
                counts[station] += bool(task.predicted and getattr(task.predicted, f"{station}_s") > 0)
        return counts

    def waits_for(self, task: TaskView) -> str:
        """The reason why a task has not started; "" for any other task."""
        if task.state is TaskState.WAITING:
            known = self.nodes.get(task.device)
            return (
                f"{task.device} to join" if known is None or known.standing != "joined" else "a place that can run it"
            )
        if task.state is not TaskState.SCHEDULED or (place := task.placement) is None:
            return ""
        lacking = []
        if place.uses_device and (busy := self._computing(task.device)):
            lacking.append(f"{task.device} to finish {_names(busy)}")
        if place.edge is not None:
            lacking += self._lacking_at(place, place.edge)
        return (
            " and ".join(lacking)
            or f"its turn{f' on {place.edge}' if place.edge else ''}, after tasks placed before it"
        )

    def _computing(self, device: str) -> list[str]:
        """The running tasks that compute on a device, which computes one at a time."""
        return sorted(
            t.task_id
            for t in self._running.values()
            if t.device == device and (p := t.placement) and p.uses_device and t.session is None
        )

    def _lacking_at(self, place: Placement, edge: str) -> list[str]:
        if edge not in self.nodes:
            return [f"{edge} to join"]
        lacking = []
        holders = self.slot_holders(edge)
        if place.uses_slot and len(holders) >= self.nodes[edge].announced.slots:
            lacking.append(f"a slot of {edge} (held by {_names(holders)})")
        for link, wanted_bps in ((self.link(edge, 1), place.link1_bps), (self.link(edge, 2), place.link2_bps)):
            free_bps = max(0, link.capacity_bps - link.granted_bps)
            if wanted_bps > free_bps:
                free = format_rate(free_bps) if free_bps else "none"
                lacking.append(f"{format_rate(wanted_bps)} of link {link.number} of {edge} ({free} free)")
        return lacking


def _names(tasks: list[str]) -> str:
    more = f" and {len(tasks) - NAMED} more" if len(tasks) > NAMED else ""
    return ", ".join(tasks[:NAMED]) + more
