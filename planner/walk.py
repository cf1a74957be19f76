"""Predictions are not reality: who may start now, and who must wait for longer, after the ledger has changed.

A delayed task starts when what it waits for is *actually* free. On every change each edge's scheduled tasks are walked in
(start, sequence) order, and each is put at the first instant at which its slot and its grants fit beside everything that runs
or stands before it; that instant is now (it starts), or later (it is moved), or does not exist (it is planned again). Edge,
cuts and grants stay.

A task that is put elsewhere in time also leaves its device to others at other times, and these may stand on other edges; so
what comes after it in the order is walked there as well. What does not change is not touched.

When resources were only given back, nobody has to be moved to later, and there is a cheaper way to the same end (`pull`);
when something ended exactly when it was predicted to, nobody's first instant has changed but that of those who are due now.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush
from typing import Final

from planner.ledger import FOREVER, LONG_AGO, DeviceAccount, EdgeAccount, Ledger, Reservation, Timeline

_FIRST: Final = (float("-inf"), -1)


def pull(
    ledger: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float
) -> Iterator[tuple[Reservation, float]]:
    """Who starts now or earlier than promised, when resources were only given back: the same as `walk`, for less work.

    `edges` and `devices` say until when something was freed (not after now: only who is due may start). Each task that is
    yielded must be moved in the ledger before the next is asked for.

    A task r promised from s on may begin at an earlier t if what it needs is free in [t, min(s, t + w)) on the ledger as it
    stands, with everybody in it. From s on it stands in the ledger itself, so there it fits; and before s nobody is in it who
    stands behind r in the order. So nothing has to be taken out of the timeline, and only instants before the end of what
    was freed need be looked at.
    """
    on_edge, on_device = dict(edges), dict(devices)
    heap: list[tuple[float, int, Reservation]] = []
    queued: set[str] = set()

    def push(account: EdgeAccount | DeviceAccount | None, key: tuple[float, int], until: float) -> None:
        if account is None:
            return
        queue = account.queue
        for item in queue[bisect_left(queue, key) :]:
            if until <= now < item[0]:
                return  # only who is due
            if item[2].task_id not in queued:
                queued.add(item[2].task_id)
                heappush(heap, item)

    for name, until in edges.items():
        push(ledger.edges.get(name), _FIRST, until)
    for name, until in devices.items():
        push(ledger.devices.get(name), _FIRST, until)
    while heap:
        start, seq, r = heappop(heap)
        if start <= now:
            yield r, start
            continue
        freed = max(on_edge.get(r.edge or "", now), on_device.get(r.device or "", now))
        earlier = _earlier(ledger, r, now, min(start, freed))
        if earlier is None:
            continue
        old_end = r.end_s
        yield r, earlier
        if r.edge is not None:
            on_edge[r.edge] = max(on_edge.get(r.edge, now), old_end)
            push(ledger.edges[r.edge], (start, seq + 1), old_end)
        if r.device is not None:
            on_device[r.device] = max(on_device.get(r.device, now), old_end)
            push(ledger.devices[r.device], (start, seq + 1), old_end)


def _earlier(ledger: Ledger, r: Reservation, now: float, limit: float) -> float | None:
    """The first instant before `limit` at which `r` could begin, or None."""
    begin, length, t = r.start_s, r.length_s, now
    busy: list[tuple[float, float]] = []
    if r.device is not None:
        others = ledger.devices[r.device].reservations.values()
        busy = sorted((LONG_AGO if o.running else o.start_s, o.end_s) for o in others if o is not r)
    timeline = None if r.edge is None else ledger.edges[r.edge].timeline
    while t < limit:
        for first, last in busy:
            if first < min(begin, t + length) and last > t:
                t = last
        if t >= limit:
            return None
        if timeline is None:
            return t
        later = _next_gap(timeline, r, t, min(begin, t + length))
        if later == t:
            return t
        t = later
    return None


def walk(
    ledger: Ledger, edges: Iterable[str], devices: Iterable[str], now: float
) -> list[tuple[Reservation, float | None]]:
    """Who starts when, of all whom the change may concern, in (start, sequence) order; None: can no longer fit.

    Only those are listed whose start is another than before, or now.
    """
    return _Walk(ledger, now).run(edges, devices)


class _Walk:
    def __init__(self, ledger: Ledger, now: float) -> None:
        self.ledger = ledger
        self.now = now
        self.trial: dict[str, tuple[Timeline, tuple[float, int]]] = {}  # edge -> without those from a key on
        self.heap: list[tuple[float, int, Reservation]] = []
        self.queued: set[str] = set()
        self.starts: dict[str, float | None] = {}

    def run(self, edges: Iterable[str], devices: Iterable[str]) -> list[tuple[Reservation, float | None]]:
        for edge in edges:
            self._open_edge(edge, _FIRST)
        for device in devices:
            self._open_device(device, _FIRST)
        changed: list[tuple[Reservation, float | None]] = []
        while self.heap:
            _, _, r = heappop(self.heap)
            start = self._first_fit(r)
            self.starts[r.task_id] = start
            if start is not None and r.edge is not None:
                self.trial[r.edge][0].change(start, start + r.length_s, -r.slots, -r.link1_bps, -r.link2_bps)
            moved = start is None or start != r.start_s
            if moved and r.device is not None:
                self._open_device(r.device, (r.start_s, r.seq + 1))
            if moved or r.start_s <= self.now:
                changed.append((r, start))
        return changed

    def _push(self, r: Reservation) -> None:
        if r.task_id not in self.queued:
            self.queued.add(r.task_id)
            heappush(self.heap, (r.start_s, r.seq, r))

    def _open_edge(self, edge: str, key: tuple[float, int]) -> None:
        """Take those from `key` on out of a copy of the edge's timeline, and put them in the heap."""
        account = self.ledger.edges.get(edge)
        if account is None:
            return
        queue = account.queue
        if edge in self.trial:
            timeline, upto = self.trial[edge]
            if upto <= key:
                return
            items = queue[bisect_left(queue, key) : bisect_left(queue, upto)]
        else:
            items = queue[bisect_left(queue, key) :]
            if not items:
                return
            timeline = account.timeline.copy()
        self.trial[edge] = timeline, key
        for _, _, r in items:
            timeline.give(r)
            self._push(r)

    def _open_device(self, device: str, key: tuple[float, int]) -> None:
        account = self.ledger.devices.get(device)
        if account is None:
            return
        for start, seq, r in account.queue:
            if (start, seq) >= key and r.task_id not in self.queued:
                self._push(r)
                if r.edge is not None:
                    self._open_edge(r.edge, (start, seq))

    def _first_fit(self, r: Reservation) -> float | None:
        length = r.length_s
        busy = self._busy(r)
        timeline = self.trial[r.edge][0] if r.edge is not None else None
        start = self.now
        while True:
            for begin, end in busy:
                if begin < start + length and end > start:
                    start = end
            if timeline is None:
                return start
            later = _next_gap(timeline, r, start, start + length)
            if later == start:
                return start
            if later == FOREVER:
                return None
            start = later

    def _busy(self, r: Reservation) -> list[tuple[float, float]]:
        """When the device is taken by what runs or stands before `r`, in order."""
        if r.device is None:
            return []
        busy = []
        for other in self.ledger.devices[r.device].reservations.values():
            if other is r:
                continue
            if other.running:
                busy.append((float("-inf"), other.end_s))
            elif other.key < r.key:
                start = self.starts.get(other.task_id, other.start_s)
                if start is not None:
                    busy.append((start, start + other.length_s))
        busy.sort()
        return busy


def _next_gap(timeline: Timeline, r: Reservation, start: float, end: float) -> float:
    """`start` if `r` fits in [start, end); else the next breakpoint at which it could begin, FOREVER if there is none."""
    times, slots, free1, free2 = timeline.times, timeline.slots, timeline.free1, timeline.free2
    need, need1, need2 = r.slots, r.link1_bps, r.link2_bps
    i, count = bisect_right(times, start) - 1, len(times)
    while i < count and (times[i] < end):
        if slots[i] < need or free1[i] < need1 or free2[i] < need2:
            i += 1
            while i < count and (slots[i] < need or free1[i] < need1 or free2[i] < need2):
                i += 1
            return times[i] if i < count else FOREVER
        i += 1
    return start
