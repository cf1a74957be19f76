"""What was learned, and from which tasks, for people: folded from the `Learned` changes of a region, and as text.

The planner computes with the estimates of `planner.learning.table`. This fold keeps the values of the last record and adds
the names of the tasks behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from bus.messages import Change, Learned, LearnedLink, LearnedNode, LearnedPath, NodeAnnounced, NodeJoined
from bus.text.units import format_rate, format_seconds, format_share
from bus.values import Kind

KEPT: Final = 5_000
"""Limit of lessons of each sort; the least recently changed one is dropped."""

Value = TypeVar("Value", LearnedNode, LearnedPath, LearnedLink)

NodeKey = tuple[str, str, bool]  # node, model, whether a device runs the whole model
PathKey = tuple[str, str, Kind]  # device, edge or "", one of the four families
LinkKey = tuple[int, str, str]  # link, device or "", edge

Key = TypeVar("Key", NodeKey, PathKey, LinkKey)


@dataclass(frozen=True, slots=True)
class Lesson(Generic[Value]):
    """The last value of one estimate."""

    value: Value
    tasks: tuple[str, ...]  # the tasks whose observations it uses, oldest first; empty: heartbeats only
    number: int  # counts all lessons; a larger one is newer


class Lessons:
    """The lessons of one region. Bounded by `limit` of each sort and by the observations that an estimate uses."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._learned = 0
        self.nodes: OrderedDict[NodeKey, Lesson[LearnedNode]] = OrderedDict()  # least recently changed first
        self.paths: OrderedDict[PathKey, Lesson[LearnedPath]] = OrderedDict()
        self.links: OrderedDict[LinkKey, Lesson[LearnedLink]] = OrderedDict()
        # node, model -> time of one sample by the announced profile; least recently announced first
        self._whole_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def fold(self, change: Change) -> None:
        """Fold a change of a decision; most teach nothing."""
        if isinstance(change, Learned):
            self.learn(change)
        elif isinstance(change, NodeJoined):
            self.join(change.node)

    def learn(self, learned: Learned) -> None:
        """Fold a recorded change."""
        taught = () if learned.task_id is None else (learned.task_id,)
        for node in learned.nodes:
            self._add(self.nodes, (node.node, node.model, node.alone), node, taught, node.kept)
        for path in learned.paths:
            self._add(self.paths, (path.device, path.edge or "", path.kind), path, taught, path.kept)
        for link in learned.links:
            self._add(self.links, (link.link, link.device or "", link.edge), link, taught, 1)

    def newest(self, count: int) -> list[AnyLesson]:
        """The lessons that changed last, newest first."""
        last = [lesson for table in (self.nodes, self.paths, self.links) for lesson in islice(_newest(table), count)]
        return sorted(last, key=lambda lesson: -lesson.number)[:count]

    def __len__(self) -> int:
        return len(self.nodes) + len(self.paths) + len(self.links)

    def join(self, node: NodeAnnounced) -> None:
        """Forget what was learned about a node with another profile than it announces now."""
        for profile in node.models:
            key, whole_s = (node.node, profile.model), sum(profile.layer_s)
            if self._whole_s.get(key, whole_s) != whole_s:
                for alone in (False, True):
                    self.nodes.pop((*key, alone), None)
            self._whole_s[key] = whole_s
            self._whole_s.move_to_end(key)
            if len(self._whole_s) > self._limit:
                self._whole_s.popitem(last=False)

    def _add(
        self, table: OrderedDict[Key, Lesson[Value]], key: Key, value: Value, taught: tuple[str, ...], kept: int
    ) -> None:
        old: Lesson[Value] | None = table.pop(key, None)
        tasks = (*(() if old is None else old.tasks), *taught)
        self._learned += 1
        table[key] = Lesson(value, tasks[-kept:], self._learned)
        if len(table) > self._limit:
            table.popitem(last=False)


AnyLesson = Lesson[LearnedNode] | Lesson[LearnedPath] | Lesson[LearnedLink]


def _newest(table: OrderedDict[Any, Any]) -> Iterator[AnyLesson]:
    return reversed(table.values())


def name_of(value: LearnedNode | LearnedPath | LearnedLink) -> str:
    """What an estimate is about."""
    match value:
        case LearnedNode():
            return node_name(value)
        case LearnedPath():
            return path_name(value)
        case LearnedLink():
            return link_name(value)


def text_of(value: LearnedNode | LearnedPath | LearnedLink) -> str:
    """The values of an estimate."""
    match value:
        case LearnedNode():
            return node_text(value)
        case LearnedPath():
            return path_text(value)
        case LearnedLink():
            return link_text(value)


def node_name(node: LearnedNode) -> str:
    """`lenet on e1`; `lenet on d1 alone` where the device runs the whole model."""
    return f"{node.model} on {node.node}" + (" alone" if node.alone else "")


def node_text(node: LearnedNode) -> str:
    """`3 x profile + 20 ms a sample`: the speed of a model on a node."""
    overhead = f" + {format_seconds(node.overhead_s)} a sample" if node.overhead_s else ""
    return f"{node.factor:.3g} x profile{overhead}"


def path_name(path: LearnedPath) -> str:
    """`d1 - e1 - cloud`; a node in parentheses only passes on."""
    if path.edge is None:
        return f"{path.device} alone"
    tiers = path.kind.value.split("+")
    edge = path.edge if "edge" in tiers else f"({path.edge})"
    return f"{path.device} - {edge}{' - cloud' if 'cloud' in tiers else ''}"


def path_text(path: LearnedPath) -> str:
    """`100 ms a task + 1 ms a sample, off by 10 %`: overheads, and the deviation of predictions."""
    costs = ((path.task_s, "a task"), (path.sample_s, "a sample"))
    shown = " + ".join(f"{format_seconds(seconds)} {each}" for seconds, each in costs if seconds) or "no overhead"
    return f"{shown}, off by {format_share(path.deviation)}"


def link_name(link: LearnedLink) -> str:
    """`d1 - e1`, `e1 - cloud`: the ends of a link."""
    return f"{link.device} - {link.edge}" if link.link == 1 else f"{link.edge} - cloud"


def link_text(link: LearnedLink) -> str:
    """`20 ms one way, carries 5 Mbps`: latency, and what the link carries if that is less than announced."""
    limit = f", carries {format_rate(link.bps)}" if link.bps else ""
    return f"{format_seconds(link.latency_s)} one way{limit}"


def error_text(error: float) -> str:
    """`took 25 % more time than predicted`: a relative error in words."""
    share = format_share(abs(error))
    if share in ("0 %", "<1 %"):
        return "took as long as predicted"
    return f"took {share} {'more' if error > 0 else 'less'} time than predicted"


def lines(learned: Learned) -> list[tuple[str, str]]:
    """What a change teaches: who (a task or a node) and the text, one line for a task and one for each link."""
    found = [error_text(path.error) for path in learned.paths[:1]]
    found += [f"{node_name(node)} {node_text(node)}" for node in learned.nodes]
    found += [f"{path_name(path)} {path_text(path)}" for path in learned.paths]
    told = [(learned.task_id or "-", ", ".join(found))] if found else []
    news = (link for link in learned.links if not link.slow)  # a slow transfer that sets no limit changes no prediction
    told += [(link.device or link.edge, f"{link_name(link)} {link_text(link)}") for link in news]
    for speed in learned.speeds:
        told.append((speed.node, f"{speed.model} on {speed.node} without work: {speed.factor:.3g} x profile"))
    for stale in learned.stale:
        what, to = f"{stale.model} on {stale.node}", "the profile"
        if stale.model is None:
            what, to = f"{stale.node} - {stale.edge}" if stale.edge else f"{stale.node} alone", "other paths"
        told.append((stale.node, f"{what} was not measured for long: its prediction moves towards that of {to}"))
    return told
