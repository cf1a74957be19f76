"""Oracle of the simulated campaign: checks the guarantees against a region's decision records.

It reads the decisions with `bus.decisions` and keeps a ledger of its own, independent of the planner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bus.decisions import DecisionLog, DecisionTopicMessage, Dropped
from bus.errors import DeeparError
from bus.messages import (
    Admitted,
    Decision,
    Ended,
    EpochOpened,
    Learned,
    NodeAnnounced,
    NodeJoined,
    NodeLost,
    Placed,
    Rerouted,
    Retried,
    Start,
    TaskState,
    TaskSubmitted,
)
from bus.port import Record
from bus.values import Codec, Role
from planner.core.core import PlannerCore

Say = Callable[[str, str], None]
"""Called for each violation with the guarantee (G1..G13) and a description."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated guarantee."""

    guarantee: str  # G1..G13
    what: str  # description

    def as_object(self, seed: int, replay: str) -> dict[str, Any]:
        """The violation as `--json` prints it, with the command that replays it."""
        return {"seed": seed, "guarantee": self.guarantee, "what": self.what, "replay": replay}


class Oracle:
    """Replays a region's decisions record by record and checks each."""

    def __init__(self, core: PlannerCore, say: Say | None = None) -> None:
        """`say` receives each violation when it is found; without it they are collected in `violations`."""
        self.core = core
        self._say = say or (lambda guarantee, what: self.violations.append(Violation(guarantee, what)))
        self.log = DecisionLog()
        self.violations: list[Violation] = []
        self.ends: dict[str, list[Ended]] = {}
        self.admitted: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.stalled: Counter[str] = Counter()  # attempts that their device gave up because results were missing
        self.lost: set[str] = set()  # nodes that were declared lost at any time
        self.decisions = 0
        self.longest_queue = 0
        self.mixed = 0  # placements of several routes
        self.encoded = 0  # placements with codecs
        self.rerouted = 0
        self.revisions: Counter[tuple[str, int]] = Counter()  # reroutes, by task and attempt
        self.learned = 0  # changes of what the planner has learned
        self._live: dict[str, TaskSubmitted] = {}
        self._deadlines: dict[str, float] = {}
        self._placed: dict[str, Placed] = {}
        self._running: set[str] = set()
        self._edges: dict[str, NodeAnnounced] = {}
        self._own_links: dict[str, int] = {}  # device -> rate of its own link in bit/s; 0: unlimited
        self._draining: set[str] = set()  # draining nodes
        self._inputs: dict[str, int] = {}
        self._openers: dict[int, str] = {}

    def read(self, records: Iterable[Record]) -> None:
        """Check the next records of a region's decisions; the first call starts at the first record."""
        for record in records:
            self.take(record)

    def take(self, record: Record) -> DecisionTopicMessage | None:
        """Check one record; returns its message if the reading rule accepts it."""
        message = self.log.read(record)
        if isinstance(message, EpochOpened):
            if message.epoch in self._openers:
                self._say("G4", f"epoch {message.epoch} was opened twice")
            self._openers[message.epoch] = message.nonce
        elif isinstance(message, Decision):
            self._judge(message)
        return None if isinstance(message, Dropped) else message

    def fenced(self, task_id: str, attempt: int) -> bool:
        """Whether the decisions so far have fenced this attempt."""
        return task_id in self.ends or attempt <= self.attempts[task_id]

    def superseded(self, task_id: str, attempt: int, revision: int) -> bool:
        """Whether this attempt is fenced, or was rerouted after this revision of its plan."""
        return self.fenced(task_id, attempt) or revision < self.revisions[task_id, attempt]

    def _judge(self, decision: Decision) -> None:
        self.decisions += 1
        if self._openers.get(decision.epoch) != decision.nonce:
            self._say("G4", f"decision {decision.seq} is not of the planner that opened epoch {decision.epoch}")
        for topic, offset in decision.inputs.items():
            if offset < self._inputs.get(topic, 0):
                self._say("G3", f"decision {decision.seq} goes back on {topic}")
        self._inputs.update(decision.inputs)
        fresh: set[str] = set()
        gone: set[str] = set()
        for change in decision.changes:
            match change:
                case NodeJoined(node=node):
                    gone.discard(node.node)  # replaced by its next process
                    self._draining.discard(node.node)
                    if node.draining:
                        self._draining.add(node.node)
                    if node.role is Role.EDGE:
                        self._edges[node.node] = node
                    elif node.role is Role.DEVICE:
                        self._own_links[node.node] = node.link1_capacity_bps
                case NodeLost(node=name):
                    self.lost.add(name)
                    self._draining.discard(name)
                    gone.add(name)
                case Admitted(task=task):
                    self.admitted[task.task_id] += 1
                    self._live[task.task_id] = task
                    fresh.add(task.task_id)
                    if task.deadline_s is not None:
                        self._deadlines[task.task_id] = decision.now_s + task.deadline_s
                case Placed():
                    if change.placement.edge in gone or change.device in gone:
                        self._say("G9", f"{change.task_id} is placed on a node that is lost")
                    if change.placement.edge in self._draining or change.device in self._draining:
                        self._say("G9", f"{change.task_id} is placed on a node that drains")
                    self._placed[change.task_id] = change
                    self.mixed += len(change.placement.cut_pairs) > 1
                    self.encoded += any({r.codec1, r.codec2} != {Codec.RAW} for r in change.placement.routes or ())
                case Rerouted():
                    self._reroute(change, gone)
                case Start():
                    if change.task_id in self._running:
                        self._say("G2", f"{change.task_id} starts while it runs")
                    self._running.add(change.task_id)
                case Retried():
                    self.attempts[change.task_id] += 1
                    self.stalled[change.task_id] += change.cause == "stalled"
                    self._free(change.task_id)
                case Learned():
                    self._learn(change)
                case Ended():
                    self._end(change, decision.now_s)
                case _:
                    pass
        for task_id, placed in self._placed.items():
            if placed.placement.edge in gone or placed.device in gone:
                self._say("G9", f"{task_id} is not taken back from a node that is lost")
        self._weigh(decision.seq)
        self._queue(fresh)
        try:
            self.core.fold(decision)
        except DeeparError as error:
            self._say("G3", f"decision {decision.seq} cannot be replayed: {error}")
            return
        if self.core.state_hash != decision.ledger_hash:
            self._say("G3", f"replaying decision {decision.seq} gives another state")

    def _reroute(self, change: Rerouted, gone: Container[str]) -> None:
        """G2: only the running attempt goes on elsewhere, and what it holds from now on counts."""
        self.rerouted += 1
        self.revisions[change.task_id, change.attempt] += 1
        placed = self._placed.get(change.task_id)
        if placed is None or change.task_id not in self._running or placed.attempt != change.attempt:
            self._say("G2", f"{change.task_id} is rerouted although attempt {change.attempt} does not run")
            return
        if change.placement.edge in gone:
            self._say("G9", f"{change.task_id} is rerouted to a node that is lost")
        self._placed[change.task_id] = placed.model_copy(update={"placement": change.placement})

    def _learn(self, learned: Learned) -> None:
        """G13: only the current attempt of a running task teaches, and only about the nodes that it used."""
        self.learned += 1
        if learned.task_id is None:
            return
        placed = self._placed.get(learned.task_id)
        if placed is None or learned.task_id not in self._running or placed.attempt != learned.attempt:
            self._say("G13", f"{learned.task_id} teaches although attempt {learned.attempt} does not run")
            return
        for path in learned.paths:
            if (path.device, path.edge) != (placed.device, placed.placement.edge):
                self._say("G13", f"{learned.task_id} teaches about a path that it does not use")
        for node in learned.nodes:
            if node.node in self._edges and node.node != placed.placement.edge:
                self._say("G13", f"{learned.task_id} teaches about {node.node}, which it does not use")

    def _end(self, end: Ended, now_s: float) -> None:
        ends = self.ends.setdefault(end.task_id, [])
        ends.append(end)
        if len(ends) > 1:
            self._say("G1", f"{end.task_id} ended {len(ends)} times")
        if end.state is TaskState.EXPIRED and now_s < self._deadlines.get(end.task_id, float("inf")):
            self._say("G1", f"{end.task_id} expires before its deadline, or has none")
        if end.cause == "queue_full" and len(self._live) - 1 - len(self._running) < self.core.options.max_waiting:
            self._say("G11", f"{end.task_id} is rejected although {self.core.options.max_waiting} may wait")
        placed = self._placed.get(end.task_id)
        if placed is not None:
            where = placed.placement
            slots = int(where.uses_slot and placed.session is None)  # a session holds a load instead
            held = (where.edge, slots, where.link1_bps, where.link2_bps)
            if held != (end.edge, end.released_slots, end.released_link1_bps, end.released_link2_bps):
                self._say("G2", f"{end.task_id} held {held} and releases something else")
        elif end.edge is not None or end.released_slots:
            self._say("G2", f"{end.task_id} releases what it does not hold")
        self._free(end.task_id)
        self._live.pop(end.task_id, None)

    def _queue(self, fresh: set[str]) -> None:
        """G11: a new task is queued only while the queue has room. Retried tasks are exempt."""
        queued = len(self._live) - len(self._running)
        self.longest_queue = max(self.longest_queue, queued)
        if queued > self.core.options.max_waiting and any(
            task in self._live and task not in self._running for task in fresh
        ):
            self._say("G11", f"{queued} tasks wait, {self.core.options.max_waiting} may")

    def _free(self, task_id: str) -> None:
        self._running.discard(task_id)
        self._placed.pop(task_id, None)

    def _weigh(self, seq: int) -> None:
        """Check that running tasks fit constraints (8) to (10) and the own link of each device."""
        used: dict[str, list[int]] = {}
        sent: Counter[str] = Counter()
        for task_id in self._running:
            placed = self._placed.get(task_id)
            if placed is not None and placed.placement.edge is not None:
                placement = placed.placement
                sent[placed.device] += placement.link1_bps
                sums = used.setdefault(placed.placement.edge, [0, 0, 0])
                sums[0] += placement.uses_slot and placed.session is None
                sums[1] += placement.link1_bps
                sums[2] += placement.link2_bps
        for edge, (slots, link1, link2) in used.items():
            node = self._edges[edge]
            if slots > node.slots or link1 > node.link1_capacity_bps or link2 > node.link2_capacity_bps:
                self._say("G2", f"after decision {seq} edge {edge} gives {slots} slots, {link1} and {link2} bit/s")
        for device, bps in sent.items():
            if 0 < self._own_links.get(device, 0) < bps:
                self._say(
                    "G2", f"after decision {seq} the tasks of device {device} are promised {bps} bit/s of its own link"
                )

    def finish(self, acknowledged: Iterable[str], excused: Mapping[str, Container[str]]) -> None:
        """Check that each acknowledged task has one end, and failed only with one of its `excused` causes."""
        for task_id in acknowledged:
            ends = self.ends.get(task_id, [])
            if self.admitted[task_id] != 1:
                self._say("G3", f"{task_id} was admitted {self.admitted[task_id]} times")
            if not ends:
                self._say("G1", f"{task_id} has no end")
            elif ends[0].state is not TaskState.COMPLETED:
                causes = excused.get(task_id, frozenset())
                if ends[0].cause not in causes and "any" not in causes:
                    self._say("G1", f"{task_id}: {ends[0].state}, {ends[0].cause} {ends[0].detail}")
        if self._running:
            self._say("G2", f"still running: {sorted(self._running)}")
