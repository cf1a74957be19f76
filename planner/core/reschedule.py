"""The rescheduling of scheduled tasks after the ledger has changed: which of them start now, and which move.

A scheduled task starts when the resources that it waits for are *actually* free. After a change, `walk` visits the scheduled
tasks of each affected edge in (start, sequence) order. It gives each task the first instant at which its slot and its grants
fit beside all running tasks and all tasks earlier in the order. If that instant is now, the task starts; if it is later, the
task moves; if there is none, the task is placed again. Edge, cuts and grants stay the same.

A task that moves also frees and occupies its device at other times, which can affect tasks of that device on other edges. So
`walk` continues there with the tasks that come later in the order. It leaves unaffected tasks alone.

A task that needs little may overtake one that needs much. With frequent overruns this could delay the larger task without
end, so after `MOVES_BORNE` moves to a later start, no task is put before it on its edge.

When resources were only freed, no task moves to a later start, and `pull` finds the same result with less work. When a task
ended exactly at its predicted end, `pull` visits only the tasks that are due now.

Both functions visit each task once. A search skips the instants at which a task with smaller or equal needs has already
failed to fit (`_Floors`), so a queue of n tasks costs about n short searches. Neither function changes the ledger.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Final

from planner.search.ledger.accounts import DeviceAccount, EdgeAccount, Queued
from planner.search.ledger.ledger import Ledger
from planner.search.ledger.reservation import FOREVER, Reservation
from planner.search.ledger.timeline import LONG_AGO, Timeline

_FIRST: Final = (LONG_AGO, -1)
_MOST_FLOORS: Final = 24
"""Maximum number of bounds that `_Floors` keeps; it drops the lowest one first."""

Needs = tuple[int, int, int, float]
"""Slots, bandwidth on link 1, bandwidth on link 2 (bit/s), and length (s)."""


def pull(
    ledger: Ledger, edges: Mapping[str, float], devices: Mapping[str, float], now: float
) -> list[tuple[Reservation, float]]:
    """Tasks that start now or earlier than scheduled after resources were only freed: the result of `walk`, with less work.

    `edges` and `devices` give the time until which resources were freed. If that is not after `now`, only tasks that are due
    can start.

    A task r scheduled at s can start at an earlier t if its needs are free in [t, min(s, t + w)) on the current ledger, with
    all tasks in it. From s on r holds its own reservation, so it fits there; before s the ledger holds no task that comes
    after r in the order. So no reservation has to be removed from the timeline, and only instants before the end of the
    freed interval have to be tried.
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
    """The tasks that start now or move after a change, with their new starts, in (start, sequence) order.

    A start of None means that the task no longer fits. Tasks that keep a later start are not listed.
    """
    room, agenda = _Room(ledger, now), _Agenda()
    changed: list[tuple[Reservation, float | None]] = []

    def open_edge(name: str, key: tuple[float, int]) -> None:
        """Remove the edge's tasks from `key` on from its room; `walk` puts them back one by one."""
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
    """A heap of the scheduled tasks that are still to be visited, ordered by (start, sequence). Each task is added once."""

    def __init__(self) -> None:
        self.heap: list[Queued] = []
        self._known: set[str] = set()
        self._edges: dict[str, tuple[float, int]] = {}  # edges whose queues were added, and the first key added
        self._devices: dict[str, tuple[float, int]] = {}

    def add_queue(
        self, account: EdgeAccount | DeviceAccount | None, key: tuple[float, int], last_s: float
    ) -> list[Reservation]:
        """Add an account's tasks from `key` to `last_s`. Return those that were not on the agenda before."""
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
    """Lower bounds of the start for given needs, proven by earlier searches on the same edge or device.

    A bound holds for all needs that are at least as large. It stays valid while resources are only taken; `freed` lowers it
    when resources are given back.
    """

    def __init__(self, now: float) -> None:
        self.now = now
        self._floors: list[tuple[Needs, float]] = []

    def of(self, needs: Needs) -> float:
        """The first instant worth trying for these needs."""
        slots, link1, link2, length = needs
        floor = self.now
        for (slots_, link1_, link2_, length_), proven in self._floors:
            if proven > floor and slots_ <= slots and link1_ <= link1 and link2_ <= link2 and length_ <= length:
                floor = proven
        return floor

    def learn(self, needs: Needs, first_s: float) -> None:
        """Record that needs at least as large as these do not fit before `first_s`."""
        if first_s <= self.now:
            return
        kept = [(n, s) for n, s in self._floors if s > first_s or not _at_least(n, needs)]
        if len(kept) >= _MOST_FLOORS:
            kept.remove(min(kept, key=lambda entry: entry[1]))
        kept.append((needs, first_s))
        self._floors = kept

    def freed(self, from_s: float) -> None:
        """Lower the bounds after resources were given back from `from_s` on."""
        if self._floors:
            self._floors = [(needs, min(floor, from_s - needs[3])) for needs, floor in self._floors]


def _at_least(one: Needs, other: Needs) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] >= other[2] and one[3] >= other[3]


class _EdgeRoom:
    """The free resources of one edge during rescheduling, in a copy of the ledger's timeline."""

    def __init__(self, account: EdgeAccount, now: float) -> None:
        self._timeline = account.timeline
        self._own = False  # whether the timeline is a copy; it is copied before the first change
        self._floors = _Floors(now)
        self._first_served = account.first_served
        self._passed = 0  # number of first-served tasks that come before the visited task
        self._turn_s = LONG_AGO  # their latest start

    def pass_to(self, r: Reservation, starts: Mapping[str, float | None]) -> None:
        """Advance to `r`: it may not start before the first-served tasks that come before it in the order."""
        queue, key = self._first_served, r.key
        while self._passed < len(queue) and queue[self._passed][:2] < key:
            other = queue[self._passed][2]
            start = starts.get(other.task_id, other.start_s)
            if start is not None:
                self._turn_s = max(self._turn_s, start)
            self._passed += 1

    def earliest(self, r: Reservation, begin: float, limit: float) -> float:
        """The first instant before `limit` at which `r` fits, else a value not before `limit`; FOREVER: it never fits.

        Resources are checked only until `begin`, because from there on `r` may hold them itself.
        """
        needs = _edge_needs(r)
        floor = self._floors.of(needs)
        if self._turn_s > floor:
            return self.first(r, self._turn_s, begin, limit)  # earlier instants are not tried, so no bound is learned
        found = self.first(r, floor, begin, limit)
        if found > floor:
            self._floors.learn(needs, found)
        return found

    def first(self, r: Reservation, start: float, begin: float, limit: float) -> float:
        """As `earliest`, but not before `start`."""
        needs = _edge_needs(r)
        while start < limit:
            later = _next_gap(self._timeline, needs, start, min(begin, start + r.length_s))
            if later == start:
                break
            start = later
        return start

    def give(self, r: Reservation, unless_before_s: float = LONG_AGO) -> None:
        """Give back the resources of `r`. The caller takes those before `unless_before_s` again at once."""
        self._changing().give(r)
        self._floors.freed(max(r.start_s, unless_before_s))

    def take(self, r: Reservation, start: float) -> None:
        """Reserve the needs of `r` from `start` on."""
        self._changing().change(start, start + r.length_s, -r.slots, -r.link1_bps, -r.link2_bps)

    def _changing(self) -> Timeline:
        if not self._own:
            self._timeline, self._own = self._timeline.copy(), True
        return self._timeline


class _DeviceRoom:
    """The free resources of a device (processor and own link) beside running tasks and tasks before the visited one."""

    def __init__(self, account: DeviceAccount, now: float) -> None:
        self._queue = account.queue
        self._passed = 0  # number of queued tasks that are in the timeline
        self._timeline = Timeline(1, account.link1_capacity_bps, 0)
        self._floors = _Floors(now)
        for r in account.reservations.values():
            if r.running:
                self._take(r, LONG_AGO, r.end_s)

    def pass_to(self, r: Reservation, starts: Mapping[str, float | None]) -> None:
        """Add the tasks before `r` to the timeline, each at its new start."""
        queue, key = self._queue, r.key
        while self._passed < len(queue) and queue[self._passed][:2] < key:
            other = queue[self._passed][2]
            start = starts.get(other.task_id, other.start_s)
            if start is not None:
                self._take(other, start, start + other.length_s)
            self._passed += 1

    def earliest(self, r: Reservation) -> float:
        """The first instant at which the needs of `r` are free for its whole length; FOREVER: never."""
        needs = _device_needs(r)
        floor = self._floors.of(needs)
        found = self.first(r, floor)
        if found > floor:
            self._floors.learn(needs, found)
        return found

    def first(self, r: Reservation, start: float) -> float:
        """As `earliest`, but not before `start`."""
        needs, length = _device_needs(r), r.length_s
        while (later := _next_gap(self._timeline, needs, start, start + length)) != start:
            start = later
        return start

    def _take(self, r: Reservation, begin: float, end: float) -> None:
        self._timeline.change(begin, end, -r.computes, -r.link1_bps, 0)


class _Room:
    """The free resources of all visited edges and devices, beside the tasks before the visited one."""

    def __init__(self, ledger: Ledger, now: float) -> None:
        self._ledger = ledger
        self._now = now
        self._edges: dict[str, _EdgeRoom] = {}
        self._devices: dict[str, _DeviceRoom] = {}
        self._starts: dict[str, float | None] = {}  # new starts by task; None: the task no longer fits

    def first_fit(self, r: Reservation, begin: float, limit: float) -> float:
        """The first instant at which `r` fits on its edge and device, checked until `begin`; exact only before `limit`."""
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
        """Move `r` to an earlier start."""
        self._starts[r.task_id] = start
        if r.edge is not None:
            room = self._edge(r.edge)
            room.give(r, start + r.length_s)
            room.take(r, start)

    def take_out(self, r: Reservation) -> None:
        """Remove `r` from its edge."""
        assert r.edge is not None
        self._edge(r.edge).give(r)

    def put(self, r: Reservation, start: float | None) -> None:
        """Put `r`, which was taken out, back at `start`; None: leave it out."""
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


def _edge_needs(r: Reservation) -> Needs:
    return r.slots, r.link1_bps, r.link2_bps, r.length_s


def _device_needs(r: Reservation) -> Needs:
    return int(r.computes), r.link1_bps, 0, r.length_s


def _next_gap(timeline: Timeline, needs: Needs, start: float, end: float) -> float:
    """`start` if the needs are free in [start, end), otherwise the next breakpoint at which they are; FOREVER: none."""
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
