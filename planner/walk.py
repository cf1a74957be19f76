"""Predictions are not reality: who may start now, and who must wait for longer, after the ledger has changed.

A delayed task starts when what it waits for is *actually* free. On every change each edge's scheduled tasks are walked in
(start, sequence) order, and each is put at the first instant at which its slot and its grants fit beside everything that runs
or stands before it; that instant is now (it starts), or later (it is moved), or does not exist (it is planned again). Edge,
cuts and grants stay.

A task that is put elsewhere in time also leaves its device to others at other times, and these may stand on other edges; so
what comes after it in the order is walked there as well. What does not change is not touched.

When something ended exactly when it was predicted to, nobody's first instant has changed but that of those who were to start
now; then there is nothing to walk (`due`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Final

from planner.ledger import FOREVER, DeviceAccount, EdgeAccount, Ledger, Reservation, Timeline

_FIRST: Final = (float("-inf"), -1)


def due(
    ledger: Ledger, edges: Iterable[str], devices: Iterable[str], now: float
) -> list[tuple[Reservation, float | None]]:
    """Those on these edges and devices whose start has come, when nothing ended but what was predicted to end now."""
    found: dict[str, Reservation] = {}
    accounts: list[EdgeAccount | DeviceAccount | None] = [ledger.edges.get(name) for name in edges]
    accounts += [ledger.devices.get(name) for name in devices]
    for account in accounts:
        for start, _, r in account.queue if account is not None else ():
            if start > now:
                break
            found[r.task_id] = r
    return [(r, r.start_s) for r in sorted(found.values(), key=lambda r: r.key)]


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
