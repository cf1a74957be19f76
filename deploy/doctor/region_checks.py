"""What `deepar doctor` looks at in the regions: topics, planners and their locks, nodes, clocks."""

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
from deploy.doctor.machine_checks import Check
from planner.service.service import LEASE_S

SKEW_S = 2.0
"""A record that has just come and says that it was sent so far from now was sent by a clock that is wrong."""
SIGNS_PER_LEASE = 5
"""Nodes and planners give so many signs of life a lease."""
LONGEST_LISTENING_S = 15.0


@dataclass(slots=True)
class Leader:
    """Who leads a region, by its log."""

    region: int
    log: DecisionLog
    newest_s: float = 0.0  # seconds since 1970, the clock of who wrote the last record that counts
    heard: bool = False  # while we listened
    lost: str = ""  # why a planner that starts now would not know what was decided
    failing: dict[str, CircuitChanged] = field(default_factory=dict)  # nodes that are avoided, and since which failure

    def note(self, decision: Decision) -> None:
        """Remember which nodes the planner avoids because attempts keep failing there."""
        for change in decision.changes:
            if isinstance(change, CircuitChanged | NodeLost):
                self.failing.pop(change.node, None)
            if isinstance(change, CircuitChanged) and change.until_s is not None:
                self.failing[change.node] = change


@dataclass(slots=True)
class Seen:
    """Everybody who has announced himself or leads, and what was heard of them."""

    leaders: list[Leader] = field(default_factory=list)
    nodes: dict[str, tuple[NodeAnnounced, float]] = field(default_factory=dict)  # and when, by its clock
    clock_off_s: dict[str, float] = field(default_factory=dict)  # of who was heard: its clock minus ours

    def listening_s(self) -> float:
        """Long enough for a sign of life of each, as far as that is bearable."""
        leases = [leader.log.lease_s or LEASE_S for leader in self.leaders if leader.log.epoch and not leader.log.left]
        leases += [announced.lease_s for announced, _ in self.nodes.values()]
        return min(LONGEST_LISTENING_S, max(leases) / SIGNS_PER_LEASE + 1.0) if leases else 0.0


async def regions(bus: Bus) -> list[Check]:
    """Who leads, who is there, and whose clock is wrong: read from the topics, then listened for some seconds.

    Raises `UnknownTopicError` where there are no topics.
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
    return [*planners, *lost, *proofs, nodes_check(seen), *failing_checks(seen), *clock_checks(seen, now_s)]


async def leader_of(bus: Bus, region: int) -> Leader:
    """Who leads a region, as far as its log tells: also where the log does not begin at offset 0."""
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
    if leader.log.epoch and not leader.log.lease_s:  # the record that opened the epoch is gone
        await _ask_snapshot(bus, leader)
    return leader


async def _ask_snapshot(bus: Bus, leader: Leader) -> None:
    """Who leads, and by which lease, where only a snapshot tells it."""
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
    """Hear who is alive now, and by how much each one's clock differs from ours."""
    until_s = time.monotonic() + seen.listening_s()
    places = [(topics.EVENTS, region) for region in range(await bus.partitions(topics.EVENTS))]
    places += [(topics.DECISIONS, leader.region) for leader in seen.leaders]
    reader = await bus.reader(places, start="end")
    try:
        while time.monotonic() < until_s:
            for record in await reader.fetch(timeout_s=0.1):
                for name in _who(record, seen):
                    off_s = record.timestamp_ms / 1000 - time.time()
                    # What waited somewhere looks late; the quickest of its records tells the most.
                    seen.clock_off_s[name] = min(off_s, seen.clock_off_s.get(name, off_s), key=abs)
    finally:
        await reader.close()


def _who(record: Record, seen: Seen) -> list[str]:
    """Who gives a sign of life by this record."""
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
    """Whether somebody leads a region, or only seems to: its lock is its epoch, and who opened it may be long gone."""
    log, where = leader.log, f"region {leader.region}"
    if log.epoch == 0:
        return Check("planner", False, f"{where}: no planner was ever there", "start one: deepar planner")
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
        f" ({_ago(silent_s)}), its lease is {format_seconds(lease_s)}, and nobody took over: no task is decided",
        f"deepar planner --region {leader.region} --take-over"
        f" (without --take-over it leads after {format_seconds(lease_s)})",
    )


def _ago(seconds: float) -> str:
    return f"{_span(-seconds)} ahead of this machine's clock" if seconds < 0 else f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    """Hours and minutes where seconds are no help to people."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else format_seconds(seconds)


def nodes_check(seen: Seen) -> Check:
    """Who has announced itself, and who of them is silent."""
    roles = [announced.role for announced, _ in seen.nodes.values()]
    detail = ", ".join(f"{roles.count(role)} {role.value}(s)" for role in (Role.DEVICE, Role.EDGE, Role.CLOUD))
    awaited = {name for name, (node, _) in seen.nodes.items() if node.lease_s / SIGNS_PER_LEASE < LONGEST_LISTENING_S}
    silent = sorted(awaited - seen.clock_off_s.keys())
    alive = bool(seen.nodes.keys() & seen.clock_off_s.keys()) or len(seen.nodes) > len(awaited)
    if not silent:
        return Check("nodes", alive, detail, "start some: deepar stage device|edge|cloud")
    detail += f"; announced and silent now: {', '.join(silent)}"
    remedy = "start them again: deepar stage device|edge|cloud; one that was taken away for good can be ignored"
    return Check("nodes", alive, detail, remedy, warning=True)


def failing_checks(seen: Seen) -> list[Check]:
    """Which nodes the planners avoid, because attempts keep failing there."""
    told = [
        f"{name} (region {leader.region}): {change.failures} attempts in a row failed there"
        for leader in seen.leaders
        for name, change in sorted(leader.failing.items())
    ]
    if not told:
        return []
    remedy = (
        "look at its log and its links, and restart it; tasks go elsewhere while they can, and one at a time tries it"
    )
    return [Check("failing", True, "; ".join(told), remedy, warning=True)]


def clock_checks(seen: Seen, now_s: float) -> list[Check]:
    """Whose clock differs from this machine's: of those heard now either way, of the silent only what lies in the future."""
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
        remedy = "all differ alike, so it is this machine's clock that is wrong: set it by NTP (chronyc makestep)"
    detail = f"clocks disagree: {told}; no decision minds, but times in tables and traces will be wrong"
    return [Check("clocks", False, detail, remedy)]
