"""What must hold whatever was broken: the guarantees, judged from the records and from what the processes are left with.

The oracle reads the decisions with `bus.decisions` and keeps its own ledger: it does not ask the planner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bus.decisions import DecisionLog
from bus.errors import DeeparError
from bus.messages import (
    Admitted,
    Decision,
    Ended,
    EpochOpened,
    NodeAnnounced,
    NodeJoined,
    Placed,
    Retried,
    Start,
    TaskState,
)
from bus.port import Record
from bus.values import Role
from planner.core import PlannerCore


@dataclass(frozen=True, slots=True)
class Violation:
    """A guarantee that did not hold."""

    guarantee: str  # G1..G11
    what: str  # for people


class Oracle:
    """Folds a region's decisions and judges them, record by record."""

    def __init__(self, core: PlannerCore) -> None:
        self.core = core
        self.log = DecisionLog()
        self.violations: list[Violation] = []
        self.ends: dict[str, list[Ended]] = {}
        self.admitted: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.lost_nodes = 0
        self.decisions = 0
        self._placed: dict[str, Placed] = {}
        self._running: set[str] = set()
        self._edges: dict[str, NodeAnnounced] = {}
        self._inputs: dict[str, int] = {}
        self._openers: dict[int, str] = {}

    def read(self, records: Iterable[Record]) -> None:
        """Judge the decisions of a region from the first on."""
        for record in records:
            message = self.log.read(record)
            if isinstance(message, EpochOpened):
                if message.epoch in self._openers:
                    self._say("G4", f"epoch {message.epoch} was opened twice")
                self._openers[message.epoch] = message.nonce
            elif isinstance(message, Decision):
                self._judge(message)

    def _judge(self, decision: Decision) -> None:
        self.decisions += 1
        if self._openers.get(decision.epoch) != decision.nonce:
            self._say("G4", f"decision {decision.seq} is not of the planner that opened epoch {decision.epoch}")
        for topic, offset in decision.inputs.items():
            if offset < self._inputs.get(topic, 0):
                self._say("G3", f"decision {decision.seq} goes back on {topic}")
        self._inputs.update(decision.inputs)
        for change in decision.changes:
            match change:
                case NodeJoined(node=node) if node.role is Role.EDGE:
                    self._edges[node.node] = node
                case Admitted(task=task):
                    self.admitted[task.task_id] += 1
                case Placed():
                    self._placed[change.task_id] = change
                case Start():
                    if change.task_id in self._running:
                        self._say("G2", f"{change.task_id} starts while it runs")
                    self._running.add(change.task_id)
                case Retried():
                    self.attempts[change.task_id] += 1
                    self._free(change.task_id)
                case Ended():
                    self.ends.setdefault(change.task_id, []).append(change)
                    self._free(change.task_id)
                case _:
                    self.lost_nodes += change.type == "node_lost"
        self._weigh(decision.seq)
        try:
            self.core.fold(decision)
        except DeeparError as error:
            self._say("G3", f"decision {decision.seq} cannot be replayed: {error}")
            return
        if self.core.state_hash != decision.ledger_hash:
            self._say("G3", f"replaying decision {decision.seq} gives another state")

    def _free(self, task_id: str) -> None:
        self._running.discard(task_id)
        self._placed.pop(task_id, None)

    def _weigh(self, seq: int) -> None:
        """(8) to (10): what runs fits."""
        used: dict[str, list[int]] = {}
        for task_id in self._running:
            placement = self._placed[task_id].placement if task_id in self._placed else None
            if placement is not None and placement.edge is not None:
                sums = used.setdefault(placement.edge, [0, 0, 0])
                sums[0] += placement.uses_slot
                sums[1] += placement.link1_bps
                sums[2] += placement.link2_bps
        for edge, (slots, link1, link2) in used.items():
            node = self._edges[edge]
            if slots > node.slots or link1 > node.link1_capacity_bps or link2 > node.link2_capacity_bps:
                self._say("G2", f"after decision {seq} edge {edge} gives {slots} slots, {link1} and {link2} bit/s")

    def finish(self, acknowledged: Iterable[str], poisoned: Mapping[str, str]) -> None:
        """Judge the ends: each acknowledged task has one, and only poisoned ones failed."""
        for task_id in acknowledged:
            ends = self.ends.get(task_id, [])
            if self.admitted[task_id] != 1:
                self._say("G3", f"{task_id} was admitted {self.admitted[task_id]} times")
            if len(ends) != 1:
                self._say("G1", f"{task_id} ended {len(ends)} times")
            elif ends[0].state is not TaskState.COMPLETED and task_id not in poisoned:
                self._say("G1", f"{task_id}: {ends[0].state}, {ends[0].cause} {ends[0].detail}")
        if self._running:
            self._say("G2", f"still running: {sorted(self._running)}")

    def _say(self, guarantee: str, what: str) -> None:
        self.violations.append(Violation(guarantee, what))
