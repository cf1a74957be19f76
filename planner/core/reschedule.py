"""Predictions are not reality: which scheduled tasks start now, and which move, after the ledger has changed.

A delayed task starts when what it waits for is *actually* free. On every change each edge's scheduled tasks are walked in
(start, sequence) order, and each is put at the first instant at which its slot and its grants fit beside everything that runs
or stands before it; that instant is now (it starts), or later (it is moved), or does not exist (it is planned again). Edge,
cuts and grants stay.

A task that is put elsewhere in time also leaves its device to others at other times, and these may stand on other edges; so
what comes after it in the order is walked there as well. What does not change is not touched.

Usually a task that needs little may slip in before one that needs much. Where overruns let this happen again and again, the
one that needs much would never start; so after `MOVES_BORNE` moves to a later start no task is put before it on its edge.

When resources were only given back, no task moves to a later start, and `pull` finds the same result for less work. When
something ended exactly when it was predicted to, only the tasks that are due now are looked at.

Both look at each task once, and no task searches again where one that needs no more has found nothing (`_Floors`), so a queue
of n tasks costs about n searches over a few steps of a timeline each. Neither changes the ledger.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Final

from planner.search.ledger import FOREVER, LONG_AGO, DeviceAccount, EdgeAccount, Ledger, Queued, Reservation, Timeline

_FIRST: Final = (LONG_AGO, -1)
_MOST_FLOORS: Final = 24

Needs = tuple[int, int, int, float]
"""Slots, bandwidth on link 1 and on link 2, and for how long."""


def pull(
    ledger: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float
) -> list[tuple[Reservation, float]]:
    """Which tasks start now or earlier than promised, when resources were only given back: what `walk` finds, for less work.

    `edges` and `devices` say until when something was freed (not after now: only tasks that are due may start).

    A task r promised from s on may begin at an earlier t if what it needs is free in [t, min(s, t + w)) on the ledger as it
    stands, with everybody in it. From s on it stands in the ledger itself, so there it fits; and before s nobody is in it who
    stands behind r in the order. So nothing has to be taken out of the timeline, and only instants before the end of what
    was freed need be looked at.
    """
    on_edge, on_device = dict(edges), dict(devices)
    room, agenda = _Room(ledger, now), _Agenda()
    changed: list[tuple[Reservation, float]] = []
    for name, until in edges.items():
        agenda.add_queue(ledger.edges.get(name), _FIRST, now if until <= now else FOREVER)
    for name, until in devices.items():
        agenda.add_queue(ledger.devices.get(name), _FIRST, now if until <= now else FOREVER)
    while agenda.heap:
        start, seq, r = heappop(agenda.heap)
        if start <= now:
            changed.append((r, start))
            continue
        freed = max(on_edge.get(r.edge or "", now), on_device.get(r.device or "", now))
        limit = min(start, freed)
        earlier = room.first_fit(r, start, limit) if now < limit else limit
        if earlier >= limit:
            continue
        changed.append((r, earlier))
        room.move(r, earlier)
        if r.edge is not None:
            on_edge[r.edge] = max(on_edge.get(r.edge, now), r.end_s)
            agenda.add_queue(ledger.edges[r.edge], (start, seq + 1), FOREVER)
        if r.device is not None:
            on_device[r.device] = max(on_device.get(r.device, now), r.end_s)
            agenda.add_queue(ledger.devices[r.device], (start, seq + 1), FOREVER)
    return changed


def walk(
    ledger: Ledger, edges: Iterable[str], devices: Iterable[str], now: float
) -> list[tuple[Reservation, float | None]]:
    """Which tasks start when, of all that the change may concern, in (start, sequence) order; None: can no longer fit.

    Only those are listed whose start is another than before, or now.
    """
    room, agenda = _Room(ledger, now), _Agenda()
    changed: list[tuple[Reservation, float | None]] = []

    def open_edge(name: str, key: tuple[float, int]) -> None:
        """Take the tasks from `key` on out of the edge's room, to be put back one by one."""
        for r in agenda.add_queue(ledger.edges.get(name), key, FOREVER):
            room.take_out(r)

    def open_device(name: str, key: tuple[float, int]) -> None:
        for r in agenda.add_queue(ledger.devices.get(name), key, FOREVER):
            if r.edge is not None:
                room.take_out(r)
                open_edge(r.edge, r.key)

    for edge in edges:
        open_edge(edge, _FIRST)
    for device in devices:
        open_device(device, _FIRST)
    while agenda.heap:
        _, _, r = heappop(agenda.heap)
        found = room.first_fit(r, FOREVER, FOREVER)
        start = None if found == FOREVER else found
        room.put(r, start)
        moved = start != r.start_s
        if moved and r.device is not None:
            open_device(r.device, (r.start_s, r.seq + 1))
        if moved or r.start_s <= now:
            changed.append((r, start))
    return changed


class _Agenda:
    """The scheduled tasks that are still to be looked at, by (start, sequence); each comes once."""

    def __init__(self) -> None:
        self.heap: list[Queued] = []
        self._known: set[str] = set()
        self._edges: dict[str, tuple[float, int]] = {}  # whose queue is in it, and from which key on
        self._devices: dict[str, tuple[float, int]] = {}

    def add_queue(
        self, account: EdgeAccount | DeviceAccount | None, key: tuple[float, int], last_s: float
    ) -> list[Reservation]:
        """Add an account's tasks from `key` to `last_s`; those that are new."""
        if account is None or not account.queue:
            return []
        opened = self._edges if isinstance(account, EdgeAccount) else self._devices
        before = opened.get(account.name)
        queue = account.queue
        first = bisect_left(queue, key)
        last = len(queue) if before is None else bisect_left(queue, before)
        if last_s < FOREVER:
            last = min(last, bisect_right(queue, (last_s, FOREVER)))
        elif before is None or key < before:
            opened[account.name] = key
        added = []
        for item in queue[first:last]:
            r = item[2]
            if r.task_id not in self._known:
                self._known.add(r.task_id)
                heappush(self.heap, item)
                added.append(r)
        return added


class _Floors:
    """Before which instant nothing fits that needs at least so much: what earlier searches of one edge or device proved.

    A proof holds while the room only fills up; `freed` says where it does not.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self._floors: list[tuple[Needs, float]] = []

    def of(self, needs: Needs) -> float:
        """No instant before this one need be tried."""
        slots, link1, link2, length = needs
        floor = self.now
        for (slots_, link1_, link2_, length_), proven in self._floors:
            if proven > floor and slots_ <= slots and link1_ <= link1 and link2_ <= link2 and length_ <= length:
                floor = proven
        return floor

    def learn(self, needs: Needs, first_s: float) -> None:
        """Nothing that needs at least so much fits before `first_s`."""
        if first_s <= self.now:
            return
        kept = [(n, s) for n, s in self._floors if s > first_s or not _at_least(n, needs)]
        if len(kept) >= _MOST_FLOORS:
            kept.remove(min(kept, key=lambda entry: entry[1]))
        kept.append((needs, first_s))
        self._floors = kept

    def freed(self, from_s: float) -> None:
        """Something was given back from `from_s` on."""
        if self._floors:
            self._floors = [(needs, min(floor, from_s - needs[3])) for needs, floor in self._floors]


def _at_least(one: Needs, other: Needs) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] >= other[2] and one[3] >= other[3]


class _EdgeRoom:
    """What is free on an edge; the ledger's own timeline until something is tried."""

    def __init__(self, account: EdgeAccount, now: float) -> None:
        self._timeline = account.timeline
        self._own = False
        self._floors = _Floors(now)
        self._first_served = account.first_served
        self._passed = 0  # so many of them are before the task that is looked at
        self._turn_s = LONG_AGO  # the latest start of those

    def pass_to(self, r: Reservation, starts: Mapping[str, float | None]) -> None:
        """`r` is put behind those before it that no other task is put before."""
        queue, key = self._first_served, r.key
        while self._passed < len(queue) and queue[self._passed][:2] < key:
            other = queue[self._passed][2]
            start = starts.get(other.task_id, other.start_s)
            if start is not None:
                self._turn_s = max(self._turn_s, start)
            self._passed += 1

    def earliest(self, r: Reservation, begin: float, limit: float) -> float:
        """The first instant at which `r` fits until `begin`, where it may stand already; FOREVER: never.

        Nothing is tried from `limit` on.
        """
        needs = _of_edge(r)
        floor = self._floors.of(needs)
        if self._turn_s > floor:
            return self.first(r, self._turn_s, begin, limit)  # proves nothing of the instants before
        found = self.first(r, floor, begin, limit)
        if found > floor:
            self._floors.learn(needs, found)
        return found

    def first(self, r: Reservation, start: float, begin: float, limit: float) -> float:
        """The same, not before `start`."""
        needs = _of_edge(r)
        while start < limit:
            later = _next_gap(self._timeline, needs, start, min(begin, start + r.length_s))
            if later == start:
                break
            start = later
        return start

    def give(self, r: Reservation, unless_before_s: float = LONG_AGO) -> None:
        """Give back what `r` holds; what lies before `unless_before_s` it takes again at once."""
        self._changing().give(r)
        self._floors.freed(max(r.start_s, unless_before_s))

    def take(self, r: Reservation, start: float) -> None:
        """Let `r` hold what it needs from `start` on."""
        self._changing().change(start, start + r.length_s, -r.slots, -r.link1_bps, -r.link2_bps)

    def _changing(self) -> Timeline:
        if not self._own:
            self._timeline, self._own = self._timeline.copy(), True
        return self._timeline


class _DeviceRoom:
    """What is left of a device, its processor and its own link, by what runs and by what stands before the task looked at."""

    def __init__(self, account: DeviceAccount, now: float) -> None:
        self._queue = account.queue
        self._passed = 0  # so many of the queue are in the timeline
        self._timeline = Timeline(1, account.link1_capacity_bps, 0)
        self._floors = _Floors(now)
        for r in account.reservations.values():
            if r.running:
                self._take(r, LONG_AGO, r.end_s)

    def pass_to(self, r: Reservation, starts: Mapping[str, float | None]) -> None:
        """Take in what stands before `r`, where it has been put meanwhile."""
        queue, key = self._queue, r.key
        while self._passed < len(queue) and queue[self._passed][:2] < key:
            other = queue[self._passed][2]
            start = starts.get(other.task_id, other.start_s)
            if start is not None:
                self._take(other, start, start + other.length_s)
            self._passed += 1

    def earliest(self, r: Reservation) -> float:
        """The first instant from which it has what `r` needs for so long; FOREVER: never."""
        needs = _of_device(r)
        floor = self._floors.of(needs)
        found = self.first(r, floor)
        if found > floor:
            self._floors.learn(needs, found)
        return found

    def first(self, r: Reservation, start: float) -> float:
        """The same, not before `start`."""
        needs, length = _of_device(r), r.length_s
        while (later := _next_gap(self._timeline, needs, start, start + length)) != start:
            start = later
        return start

    def _take(self, r: Reservation, begin: float, end: float) -> None:
        self._timeline.change(begin, end, -r.computes, -r.link1_bps, 0)


class _Room:
    """What is free on every edge and device that is looked at, beside what stands before the task that is looked at."""

    def __init__(self, ledger: Ledger, now: float) -> None:
        self._ledger = ledger
        self._now = now
        self._edges: dict[str, _EdgeRoom] = {}
        self._devices: dict[str, _DeviceRoom] = {}
        self._starts: dict[str, float | None] = {}  # of those that were put elsewhere; None: nowhere

    def first_fit(self, r: Reservation, begin: float, limit: float) -> float:
        """The first instant at which `r` fits until `begin`; what is not before `limit` need not be exact."""
        edge = None if r.edge is None else self._edge(r.edge)
        device = None if r.device is None else self._device(r.device)
        if device is not None:
            device.pass_to(r, self._starts)
        if edge is not None:
            edge.pass_to(r, self._starts)
        start = self._now if edge is None else edge.earliest(r, begin, limit)
        if device is None or start >= limit:
            return start
        start = max(start, device.earliest(r))
        while edge is not None and start < limit:
            later = edge.first(r, device.first(r, start), begin, limit)
            if later == start:
                break
            start = later
        return start

    def move(self, r: Reservation, start: float) -> None:
        """Put `r` at an earlier start than the one at which it stands."""
        self._starts[r.task_id] = start
        if r.edge is not None:
            room = self._edge(r.edge)
            room.give(r, start + r.length_s)
            room.take(r, start)

    def take_out(self, r: Reservation) -> None:
        """Give back what `r` holds on its edge."""
        assert r.edge is not None
        self._edge(r.edge).give(r)

    def put(self, r: Reservation, start: float | None) -> None:
        """Put back what was taken out, at `start` or nowhere."""
        self._starts[r.task_id] = start
        if r.edge is not None and start is not None:
            self._edge(r.edge).take(r, start)

    def _edge(self, name: str) -> _EdgeRoom:
        room = self._edges.get(name)
        if room is None:
            room = self._edges[name] = _EdgeRoom(self._ledger.edges[name], self._now)
        return room

    def _device(self, name: str) -> _DeviceRoom:
        room = self._devices.get(name)
        if room is None:
            room = self._devices[name] = _DeviceRoom(self._ledger.devices[name], self._now)
        return room


def _of_edge(r: Reservation) -> Needs:
    return r.slots, r.link1_bps, r.link2_bps, r.length_s


def _of_device(r: Reservation) -> Needs:
    return int(r.computes), r.link1_bps, 0, r.length_s


def _next_gap(timeline: Timeline, needs: Needs, start: float, end: float) -> float:
    """`start` if so much is free in [start, end); else the next breakpoint at which it could begin; FOREVER: none."""
    times, slots, free1, free2 = timeline.times, timeline.slots, timeline.free1, timeline.free2
    need, need1, need2, _ = needs
    i, count = bisect_right(times, start) - 1, len(times)
    while i < count and (times[i] < end):
        if slots[i] < need or free1[i] < need1 or free2[i] < need2:
            i += 1
            while i < count and (slots[i] < need or free1[i] < need1 or free2[i] < need2):
                i += 1
            return times[i] if i < count else FOREVER
        i += 1
    return start
