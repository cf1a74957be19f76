"""Probes: small frames that a peer sends back at once, so that a node measures the latency of its link on its own clock.

A device probes edges, an edge probes the cloud. Each new peer gets a few probes at once; later ones are rare, and skipped
while the node works unless the last answer is old. The one-way latency is half the median of the last round trips. A lost
or late answer is dropped. Several answers on the same side, far from the median, replace the older ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from bus.errors import BusError
from bus.frames import Frame
from stages.measuring.clock import exact_clock

FIRST_PROBES = 5
"""Probes of a new peer; their median is trusted although the first ones also open connections."""
CHECK_PROBES = 3
"""Probes that check an answer far from the median; if they agree with it, older answers are forgotten."""
BURST_S = 0.1
"""Interval between those."""
REFRESH_S = 5.0
"""Interval between all later probes of a node."""
STALE_S = 30.0
"""A busy node probes a peer only if its last answer is older than this."""
LATE_S = 10.0
"""Answers that take longer are dropped."""
SETTLED_S = 1.0
"""A peer that has not answered for this long no longer delays the report on the others."""
BACK_OFF = 6
"""A peer that does not answer is probed up to 2**6 times more rarely: every five minutes."""
KEPT = 9
"""Round trips in the median of each peer."""
ENOUGH = 3
"""Round trips from which a latency is reported."""
NEAR_S = 0.002
"""Round trips that differ from the median by less are never far from it; the bus varies by as much."""
NEAR_SHARE = 0.25
NEAR_DEVIATIONS = 4.0


@dataclass(frozen=True, slots=True)
class Latency:
    """What the probes of one peer say."""

    latency_s: float  # one way: half the median of the round trips
    deviation_s: float  # median distance from it


class ProbedLink(Protocol):
    """The way to the probed peers."""

    @property
    def idle(self) -> bool:
        """Whether no task uses the node, so that a probe neither waits for data nor delays it."""

    async def open(self, peer: str) -> None:
        """Prepare for answers of a peer; may wait, which is not measured. Raises `BusError`."""

    async def send(self, peer: str, probe: Frame) -> None:
        """Send a probe. Raises `BusError`."""


@dataclass(slots=True)
class _Peer:
    """One probed peer."""

    due_s: float  # when to send the next probe
    burst: int = FIRST_PROBES  # probes that follow each other quickly
    sent_s: float = float("-inf")  # when the last probe was sent
    answered_s: float = float("-inf")  # when the last answer came
    unanswered: int = 0  # probes since then
    round_trips: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def add(self, round_trip_s: float) -> bool:
        """Add a round trip; returns whether it needs a check because it is far from the others."""
        self.round_trips.append(round_trip_s)
        recent = list(self.round_trips)[-CHECK_PROBES:]
        before = list(self.round_trips)[:-CHECK_PROBES]
        if len(before) >= ENOUGH and (_all_far(recent, before, 1) or _all_far(recent, before, -1)):
            self.round_trips = deque(recent, maxlen=KEPT)
            return False
        others = list(self.round_trips)[:-1]
        return len(others) >= ENOUGH and (_all_far([round_trip_s], others, 1) or _all_far([round_trip_s], others, -1))


def _all_far(found: list[float], others: list[float], side: int) -> bool:
    """Whether all of `found` are far from the median of the others, above it (1) or below it (-1)."""
    middle = median(others)
    deviation = median(abs(other - middle) for other in others)
    near = max(NEAR_S, NEAR_SHARE * middle, NEAR_DEVIATIONS * deviation)
    return all(side * (one - middle) > near for one in found)


class Prober:
    """Sends probes to the peers of one node and keeps their round trips. `run` must be running."""

    def __init__(self, name: str, link: ProbedLink, on_settled: Callable[[], None]) -> None:
        """`on_settled` is called when new peers have been measured."""
        self._name = name
        self._link = link
        self._on_settled = on_settled
        self._peers: dict[str, _Peer] = {}
        self._probing = ""  # identifies this prober's probes
        self._sent: dict[int, tuple[str, float]] = {}  # probes without an answer: peer and send time
        self._number = 0
        self._changed = asyncio.Event()
        self._answered = asyncio.Event()

    def aim(self, peers: Iterable[str]) -> None:
        """Probe these peers from now on, new ones at once."""
        wanted = tuple(dict.fromkeys(peers))
        now = asyncio.get_running_loop().time()
        self._peers = {peer: self._peers.get(peer) or _Peer(now) for peer in wanted}
        self._changed.set()

    def again(self, peer: str) -> None:
        """Probe a peer again at once: it may have moved."""
        if (known := self._peers.get(peer)) is not None:
            known.burst, known.unanswered = max(known.burst, FIRST_PROBES), 0
            known.due_s = asyncio.get_running_loop().time()
            self._changed.set()

    async def measured(self, limit_s: float) -> None:
        """Wait until every peer has a latency, at most `limit_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while len(self.latencies()) < len(self._peers):
                    self._answered.clear()
                    await self._answered.wait()

    def latencies(self) -> dict[str, Latency]:
        """The latency of every peer with enough round trips."""
        found = {}
        for name, peer in self._peers.items():
            if len(peer.round_trips) >= ENOUGH:
                middle = median(peer.round_trips)
                deviation = median(abs(one - middle) for one in peer.round_trips)
                found[name] = Latency(middle / 2, deviation / 2)
        return found

    async def run(self, probing: str) -> None:
        """Send probes until cancelled. `probing` identifies them: a name that no other process uses."""
        self._probing = probing
        clock = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                now = clock()
                for name, peer in self._peers.items():
                    if peer.due_s <= now and self._plan_next(peer, now):
                        group.create_task(self._probe(name, peer))
                due_s = min((peer.due_s for peer in self._peers.values()), default=None)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due_s is None else max(0.0, due_s - now)):
                        await self._changed.wait()

    def _plan_next(self, peer: _Peer, now: float) -> bool:
        """Set when the peer is due again; returns whether to probe it now."""
        if peer.burst:
            peer.burst -= 1
            peer.due_s = now + (BURST_S if peer.burst else self._refresh_s(peer))
            return True
        peer.due_s = now + self._refresh_s(peer)
        return self._link.idle or now - peer.answered_s > STALE_S

    def _refresh_s(self, peer: _Peer) -> float:
        silence = min(max(0, peer.unanswered - FIRST_PROBES), BACK_OFF)
        return REFRESH_S * len(self._peers) * (1 << silence)

    async def _probe(self, name: str, peer: _Peer) -> None:
        clock = exact_clock()
        try:
            await self._link.open(name)
            self._number += 1
            number = self._number
            peer.sent_s = clock()
            self._drop_late(peer.sent_s)
            self._sent[number] = (name, peer.sent_s)
            peer.unanswered += 1
            await self._link.send(name, Frame("probe", self._probing, number, self._name))
        except BusError:
            peer.unanswered += 1  # the next probe tries again

    def _drop_late(self, now: float) -> None:
        """Forget the probes whose answers would come too late; the oldest is first."""
        for number, (_, sent_s) in list(self._sent.items()):
            if now - sent_s <= LATE_S:
                return
            del self._sent[number]

    def take(self, answer: Frame, peer_name: str) -> None:
        """Take an answer; ignored if it is late, doubled, or answers a probe of another process or to another peer."""
        now = exact_clock()()
        self._drop_late(now)
        if answer.task_id != self._probing or self._sent.get(answer.attempt, ("",))[0] != peer_name:
            return
        _, sent_s = self._sent.pop(answer.attempt)
        if (peer := self._peers.get(peer_name)) is None:
            return
        peer.answered_s, peer.unanswered = now, 0
        self._answered.set()
        if peer.add(now - sent_s) and not peer.burst:
            peer.burst, peer.due_s = CHECK_PROBES, now
            self._changed.set()
        if len(peer.round_trips) == min(FIRST_PROBES, KEPT) and not self._unsettled(now):
            self._on_settled()

    def _unsettled(self, now: float) -> bool:
        """Whether a new peer is still being measured."""
        return any(
            peer.burst or (len(peer.round_trips) < FIRST_PROBES and now - peer.sent_s < SETTLED_S)
            for peer in self._peers.values()
        )
