"""Region checks of `deepar doctor`: planners and their leadership, nodes, clocks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bus import messages, snapshots, topics
from bus.decisions import DecisionLog, DecisionsLostError, Dropped
from bus.errors import ProtocolError
from bus.messages import CircuitChanged, Decision, EventMessage, NodeAnnounced, NodeHeartbeat, NodeLeft, NodeLost
from bus.port import Bus, Record
from bus.text.units import format_seconds
from bus.topic_settings import REPAIR
from bus.values import Role
from deploy.doctor.identity_checks import demanded_by_region
from deploy.doctor.latency_checks import latency_checks
from deploy.doctor.machine_checks import Check
from planner.learning.lessons import Lessons
from planner.service.region_context import LEASE_S

SKEW_S = 2.0
"""Maximum clock skew: a larger difference between a new record's timestamp and our clock is reported."""
SIGNS_PER_LEASE = 5
"""Number of heartbeats that nodes and planners send per lease."""
LONGEST_LISTENING_S = 15.0


@dataclass(slots=True)
class Leader:
    """The leader of a region, according to its decision log."""

    region: int
    log: DecisionLog
    newest_s: float = 0.0  # send time of the last valid record, seconds since 1970, planner's clock
    heard: bool = False  # whether it sent a record while we listened
    lost: str = ""  # why a new planner could not recover the decisions; empty if it could
    failing: dict[str, CircuitChanged] = field(default_factory=dict)  # avoided nodes and the change that caused it
    lessons: Lessons = field(default_factory=Lessons)  # what it has learned

    def note(self, decision: Decision) -> None:
        """Record which nodes the planner avoids after repeated failed attempts, and what it has learned."""
        for change in decision.changes:
            self.lessons.fold(change)
            if isinstance(change, CircuitChanged | NodeLost):
                self.failing.pop(change.node, None)
            if isinstance(change, CircuitChanged) and change.until_s is not None:
                self.failing[change.node] = change


@dataclass(slots=True)
class Seen:
    """All leaders and announced nodes, with the heartbeats heard from them."""

    leaders: list[Leader] = field(default_factory=list)
    nodes: dict[str, tuple[NodeAnnounced, float]] = field(
        default_factory=dict
    )  # announcement and its send time, by the node's clock
    clock_off_s: dict[str, float] = field(default_factory=dict)  # of nodes heard: their clock minus ours

    def listening_s(self) -> float:
        """Listening time that covers one heartbeat of each, limited by `LONGEST_LISTENING_S`."""
        leases = [leader.log.lease_s or LEASE_S for leader in self.leaders if leader.log.epoch and not leader.log.left]
        leases += [announced.lease_s for announced, _ in self.nodes.values()]
        return min(LONGEST_LISTENING_S, max(leases) / SIGNS_PER_LEASE + 1.0) if leases else 0.0


async def regions(bus: Bus) -> list[Check]:
    """Check leaders, nodes and clocks: read the topics, then listen for some seconds.

    Raises `UnknownTopicError` if the topics do not exist.
    """
    seen = Seen()
    for region in range(await bus.partitions(topics.DECISIONS)):
        seen.leaders.append(await leader_of(bus, region))
    for region in range(await bus.partitions(topics.NODES)):
        await _announced(bus, region, seen)
    await _listen(bus, seen)
    now_s = time.time()
    proofs = [check for leader in seen.leaders for check in demanded_by_region(leader.region, leader.log.demanded)]
    planners = [planner_check(leader, now_s) for leader in seen.leaders]
    lost = [
        Check(
            "decisions", False, leader.lost, f"keep its planner running, it writes a snapshot within a minute; {REPAIR}"
        )
        for leader in seen.leaders
        if leader.lost
    ]
    announced = {name: node for name, (node, _) in seen.nodes.items()}
    latencies = latency_checks((leader.lessons for leader in seen.leaders), announced)
    nodes = [nodes_check(seen), *failing_checks(seen), *latencies]
    return [*planners, *lost, *proofs, *nodes, *clock_checks(seen, now_s)]


async def leader_of(bus: Bus, region: int) -> Leader:
    """Read the leader of a region from its decision log, which need not begin at offset 0."""
    leader = Leader(region, DecisionLog(joins=True))
    reader = await bus.reader([(topics.DECISIONS, region)], start="start")
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=0.5):
                message = leader.log.read(record)
                if isinstance(message, Dropped):
                    continue
                leader.newest_s = record.timestamp_ms / 1000
                if isinstance(message, Decision):
                    leader.note(message)
    finally:
        await reader.close()
    if leader.log.epoch and not leader.log.lease_s:  # the record that opened the epoch was deleted
        await _ask_snapshot(bus, leader)
    return leader


async def _ask_snapshot(bus: Bus, leader: Leader) -> None:
    """Take the leader and its lease from a snapshot, if the log no longer has them."""
    try:
        snapshot, reader = await snapshots.open_decisions(bus, leader.region)
    except DecisionsLostError as error:
        leader.lost = f"{error}, and no snapshot covers them"
        return
    await reader.close()
    if snapshot is not None and snapshot.epoch == leader.log.epoch:
        known = snapshots.log_behind(snapshot)
        leader.log.planner, leader.log.lease_s, leader.log.identity = known.planner, known.lease_s, known.identity


async def _announced(bus: Bus, region: int, seen: Seen) -> None:
    reader = await bus.reader([(topics.NODES, region)], start="start")
    try:
        while await reader.lag():
            for record in await reader.fetch(timeout_s=0.5):
                try:
                    message = messages.decode(topics.NODES, record.value)
                except ProtocolError:
                    continue
                if isinstance(message, NodeAnnounced):
                    seen.nodes[message.node] = (message, record.timestamp_ms / 1000)
                elif isinstance(message, NodeLeft):
                    seen.nodes.pop(message.node, None)
    finally:
        await reader.close()


async def _listen(bus: Bus, seen: Seen) -> None:
    """Listen for heartbeats and measure how much each sender's clock differs from ours."""
    until_s = time.monotonic() + seen.listening_s()
    places = [(topics.EVENTS, region) for region in range(await bus.partitions(topics.EVENTS))]
    places += [(topics.DECISIONS, leader.region) for leader in seen.leaders]
    reader = await bus.reader(places, start="end")
    try:
        while time.monotonic() < until_s:
            for record in await reader.fetch(timeout_s=0.1):
                for name in _who(record, seen):
                    off_s = record.timestamp_ms / 1000 - time.time()
                    # A delayed record looks like a slow clock, so the smallest difference is kept.
                    seen.clock_off_s[name] = min(off_s, seen.clock_off_s.get(name, off_s), key=abs)
    finally:
        await reader.close()


def _who(record: Record, seen: Seen) -> list[str]:
    """The names of the nodes or planners that this record shows to be alive."""
    if record.topic == topics.DECISIONS:
        leader = next(leader for leader in seen.leaders if leader.region == record.partition)
        if isinstance(leader.log.read(record), Dropped):
            return []
        leader.heard = not leader.log.left
        return [leader.log.planner or "the planner"]
    try:
        message: EventMessage = messages.decode(record.topic, record.value)
    except ProtocolError:
        return []
    return [message.node] if isinstance(message, NodeHeartbeat) else []


def planner_check(leader: Leader, now_s: float) -> Check:
    """Check that a live planner leads the region; an open epoch alone may belong to a planner that has crashed."""
    log, where = leader.log, f"region {leader.region}"
    if log.epoch == 0:
        return Check("planner", False, f"{where}: no planner has ever run", "start one: deepar planner")
    if log.left:
        return Check("planner", False, f"{where}: the planner has left", "start one: deepar planner")
    who = f"{log.planner or 'a planner'}"
    silent_s, lease_s = now_s - leader.newest_s, log.lease_s or LEASE_S
    if leader.heard or 0.0 <= silent_s <= lease_s:
        return Check("planner", True, f"{where}: {who} leads epoch {log.epoch}")
    since = datetime.fromtimestamp(leader.newest_s, UTC).isoformat(timespec="seconds")
    return Check(
        "planner",
        False,
        f"{where}: stale planner lock: {who} holds epoch {log.epoch} and has been silent since {since}"
        f" ({_ago(silent_s)}), its lease is {format_seconds(lease_s)}, and no planner has taken over: no task is placed",
        f"deepar planner --region {leader.region} --take-over"
        f" (without --take-over it leads after {format_seconds(lease_s)})",
    )


def _ago(seconds: float) -> str:
    return f"{_span(-seconds)} ahead of this machine's clock" if seconds < 0 else f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    """Format a duration in hours, minutes or seconds, whichever is readable."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else format_seconds(seconds)


def nodes_check(seen: Seen) -> Check:
    """Check announced nodes and report the silent ones."""
    roles = [announced.role for announced, _ in seen.nodes.values()]
    detail = ", ".join(f"{roles.count(role)} {role.value}(s)" for role in (Role.DEVICE, Role.EDGE, Role.CLOUD))
    awaited = {name for name, (node, _) in seen.nodes.items() if node.lease_s / SIGNS_PER_LEASE < LONGEST_LISTENING_S}
    silent = sorted(awaited - seen.clock_off_s.keys())
    alive = bool(seen.nodes.keys() & seen.clock_off_s.keys()) or len(seen.nodes) > len(awaited)
    if not silent:
        return Check("nodes", alive, detail, "start some: deepar stage device|edge|cloud")
    detail += f"; announced and silent now: {', '.join(silent)}"
    remedy = "start them again: deepar stage device|edge|cloud; ignore nodes that were removed permanently"
    return Check("nodes", alive, detail, remedy, warning=True)


def failing_checks(seen: Seen) -> list[Check]:
    """Report nodes that planners avoid after repeated failed attempts."""
    told = [
        f"{name} (region {leader.region}): {change.failures} attempts in a row failed there"
        for leader in seen.leaders
        for name, change in sorted(leader.failing.items())
    ]
    if not told:
        return []
    remedy = "check the node's log and links, and restart it; tasks use other nodes, one at a time retries it"
    return [Check("failing", True, "; ".join(told), remedy, warning=True)]


def clock_checks(seen: Seen, now_s: float) -> list[Check]:
    """Compare clocks with this machine's. For a silent node, only a timestamp in the future proves a wrong clock."""
    off_s = dict(seen.clock_off_s)
    for name, (_, sent_s) in seen.nodes.items():
        if name not in off_s and sent_s - now_s > SKEW_S:
            off_s[name] = sent_s - now_s
    if not off_s:
        return []
    wrong = {name: amount_s for name, amount_s in sorted(off_s.items()) if abs(amount_s) > SKEW_S}
    if not wrong:
        most_s = max(map(abs, off_s.values()))
        return [Check("clocks", True, f"{len(off_s)} agree with this machine's within {format_seconds(most_s)}")]
    told = ", ".join(
        f"{name} {_span(abs(amount_s))} {'ahead' if amount_s > 0 else 'behind'}" for name, amount_s in wrong.items()
    )
    remedy = "set them by NTP (chronyc makestep)"
    if len(off_s) > 1 and len(wrong) == len(off_s) and max(wrong.values()) - min(wrong.values()) < SKEW_S:
        remedy = "all differ by the same amount, so this machine's clock is wrong: set it by NTP (chronyc makestep)"
    detail = f"clocks disagree: {told}; decisions are not affected, but times in tables and traces are wrong"
    return [Check("clocks", False, detail, remedy)]
