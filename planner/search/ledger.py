"""The ledger of reservations on edges and devices: constraints (8)-(10) over time.

Bandwidth is in integer bits per second, so a release gives back exactly the reserved amount and sums do not drift.

An edge's `Timeline` is a step function. Parallel lists hold the breakpoints and the *free* amounts (slots, link 1, link 2)
from each breakpoint to the next. `bisect` finds an instant, and `min(slice)` gives the amount that is free during a whole
interval. Breakpoints without a change and breakpoints in the past are dropped, so a list has about two entries per
reservation. Queries must not reach into the past.

A device has a timeline too. It computes one task at a time. If it announced a limit of its own link, the sum of its tasks'
grants on link 1, over all edges, stays within that limit.

A session (an open-ended task) holds its grants without an end, and a `Load` instead of a slot or its device's processor. All
sessions together hold at most 80 % of an edge, a device or a link (`bookable`), so that every other task still fits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from bus.errors import InvariantError

FOREVER: Final = float("inf")
LONG_AGO: Final = float("-inf")
UNLIMITED_BPS: Final = 1 << 62
"""The link capacity of a device that announced no limit of its own link."""
MOVES_BORNE: Final = 10
"""Number of moves to a later start after which no other task is put before a scheduled task on its edge."""
SHORTEST_S: Final = 1e-6
"""Minimum length of a reservation, so that every running task occupies a visible interval."""
LOAD_UNITS: Final = 1024
"""Units of load in one slot, or in one device. Loads are whole units, so that their sums are exact."""


def bookable(capacity: int) -> int:
    """The part of a capacity (an edge's or a device's load, or a link) that sessions may hold: 80 %."""
    return capacity * 4 // 5


class Load(NamedTuple):
    """What a session books of the computing time of its nodes, in units."""

    device: int
    edge: int


class Rank(NamedTuple):
    """The place of a scheduled task in the line of waiting tasks."""

    admitted_s: float  # ledger time, less the head start
    head_start_s: float  # of its priority
    waits_as_s: float  # as if admitted at this ledger time: smaller goes first


class Reservation:
    """The resources that one placement holds in [start_s, end_s): a slot or none, bandwidth on both links, and its device.

    That of a session has a load instead of slot and device, and no end.
    """

    __slots__ = (
        "computes",
        "device",
        "edge",
        "end_s",
        "length_s",
        "link1_bps",
        "link2_bps",
        "load",
        "moves",
        "rank",
        "running",
        "sender",
        "seq",
        "slots",
        "start_s",
        "task_id",
    )

    def __init__(
        self,
        task_id: str,
        seq: int,
        edge: str | None,
        device: str | None,
        start_s: float,
        delay_s: float,
        slots: int,
        link1_bps: int,
        link2_bps: int,
        computes: bool = True,
        load: Load | None = None,
    ) -> None:
        # Created once per placement on the hot path, so the values come one by one instead of as an options value.
        self.task_id = task_id
        self.seq = seq  # order of admission; breaks ties between equal starts
        self.edge = edge  # None: the device alone
        self.sender = device  # the device that submitted the task
        self.computes = computes  # whether the device runs layers; False: it only sends its input
        self.device = device  # the device on which the ledger books it; None: it holds nothing on its device
        self.start_s = start_s  # ledger time
        self.length_s = length_s = delay_s if delay_s > SHORTEST_S else SHORTEST_S  # w; FOREVER: a session
        self.end_s = start_s + length_s  # predicted end; an overrun moves it to a later time
        self.slots = slots  # 0 or 1
        self.link1_bps = link1_bps
        self.link2_bps = link2_bps
        self.running = False
        self.moves = 0  # number of moves to a later start
        self.load = load  # of a session
        self.rank: Rank | None = None  # None: it is never overtaken

    @property
    def first_served(self) -> bool:
        """Whether no other task may be put before it on its edge."""
        return self.moves >= MOVES_BORNE and not self.running

    @property
    def key(self) -> tuple[float, int]:
        """The sort key of scheduled tasks."""
        return self.start_s, self.seq

    def __repr__(self) -> str:
        state = "running" if self.running else "scheduled"
        return (
            f"<{self.task_id} {state} [{self.start_s:.6f}, {self.end_s:.6f}) edge={self.edge} device={self.device} "
            f"{self.slots} slot {self.link1_bps}/{self.link2_bps} bps>"
        )


Queued = tuple[float, int, Reservation]
"""Start, sequence and reservation; the sequence is unique, so reservations are never compared."""


class Timeline:
    """Free slots and bandwidth of one edge, as step functions of time."""

    __slots__ = ("free1", "free2", "slots", "times")

    def __init__(self, slots: int, link1_bps: int, link2_bps: int) -> None:
        self.times: list[float] = [LONG_AGO]  # breakpoints, ascending
        self.slots: list[int] = [slots]  # free from times[i] until times[i + 1]
        self.free1: list[int] = [link1_bps]
        self.free2: list[int] = [link2_bps]

    def copy(self) -> Timeline:
        """An independent copy, for trial changes."""
        other = Timeline.__new__(Timeline)
        other.times, other.slots = self.times.copy(), self.slots.copy()
        other.free1, other.free2 = self.free1.copy(), self.free2.copy()
        return other

    def change(self, start_s: float, end_s: float, slots: int, link1_bps: int, link2_bps: int) -> None:
        """Add to the free amounts in [start_s, end_s); negative amounts reserve."""
        if start_s >= end_s:
            return
        times, free, free1, free2 = self.times, self.slots, self.free1, self.free2
        # insert breakpoints at both ends, if missing
        first = bisect_left(times, start_s)
        if first == len(times) or times[first] != start_s:
            times.insert(first, start_s)
            free.insert(first, free[first - 1])
            free1.insert(first, free1[first - 1])
            free2.insert(first, free2[first - 1])
        last = len(times)
        if end_s != FOREVER:
            last = bisect_left(times, end_s, first)
            if last == len(times) or times[last] != end_s:
                times.insert(last, end_s)
                free.insert(last, free[last - 1])
                free1.insert(last, free1[last - 1])
                free2.insert(last, free2[last - 1])
        if slots:
            for i in range(first, last):
                free[i] += slots
        if link1_bps:
            for i in range(first, last):
                free1[i] += link1_bps
        if link2_bps:
            for i in range(first, last):
                free2[i] += link2_bps
        # drop breakpoints at which nothing changes any more, the later one first
        for i in (last, first):
            before = i - 1
            if (
                0 < i < len(times)
                and free[i] == free[before]
                and free1[i] == free1[before]
                and free2[i] == free2[before]
            ):
                del times[i], free[i], free1[i], free2[i]

    def take(self, r: Reservation, now: float = LONG_AGO) -> None:
        """Reserve the edge resources of `r`. A reservation that starts by `now` gets no breakpoint at its start."""
        start_s = r.start_s
        self.change(start_s if start_s > now else LONG_AGO, r.end_s, -r.slots, -r.link1_bps, -r.link2_bps)

    def give(self, r: Reservation) -> None:
        """Undo `take`. A running task started in the past, which is never queried, so its start gets no breakpoint."""
        self.change(LONG_AGO if r.running else r.start_s, r.end_s, r.slots, r.link1_bps, r.link2_bps)

    def forget_before(self, now: float) -> None:
        """Drop breakpoints before `now`. The free amounts at `now` and later stay the same."""
        gone = bisect_right(self.times, now) - 1
        if gone > 0:
            del self.times[:gone], self.slots[:gone], self.free1[:gone], self.free2[:gone]
            self.times[0] = LONG_AGO

    def fits(self, start_s: float, end_s: float, slots: int, link1_bps: int, link2_bps: int) -> bool:
        """Whether these amounts are free during the whole of [start_s, end_s)."""
        first = bisect_right(self.times, start_s) - 1
        last = bisect_left(self.times, end_s, first + 1)
        return (
            min(self.slots[first:last]) >= slots
            and min(self.free1[first:last]) >= link1_bps
            and min(self.free2[first:last]) >= link2_bps
        )

    def at(self, at_s: float) -> tuple[int, int, int]:
        """The free amounts at an instant: slots, link 1, link 2."""
        i = bisect_right(self.times, at_s) - 1
        return self.slots[i], self.free1[i], self.free2[i]


class SessionSums:
    """What the sessions of one edge or device hold together."""

    __slots__ = ("link1_bps", "link2_bps", "units")

    def __init__(self) -> None:
        self.units = 0  # load
        self.link1_bps = 0
        self.link2_bps = 0

    def add(self, sign: int, units: int, link1_bps: int, link2_bps: int) -> None:
        """Add (1) or remove (-1) what one session holds."""
        self.units += sign * units
        self.link1_bps += sign * link1_bps
        self.link2_bps += sign * link2_bps


class EdgeAccount:
    """One edge: its capacities (8)-(10), its reservations, and its timeline."""

    __slots__ = (
        "first_served",
        "link1_capacity_bps",
        "link2_capacity_bps",
        "name",
        "queue",
        "reservations",
        "sessions",
        "slots",
        "timeline",
    )

    def __init__(
        self,
        name: str,
        slots: int,
        link1_capacity_bps: int,
        link2_capacity_bps: int,
        make_timeline: Callable[[int, int, int], Timeline] = Timeline,
    ) -> None:
        self.name = name
        self.slots = slots
        self.link1_capacity_bps = link1_capacity_bps
        self.link2_capacity_bps = link2_capacity_bps
        self.reservations: dict[str, Reservation] = {}  # by task
        self.queue: list[Queued] = []  # scheduled tasks, by (start, sequence)
        self.first_served: list[Queued] = []  # the tasks of the queue before which no other task may be put
        self.sessions = SessionSums()
        self.timeline = make_timeline(slots, link1_capacity_bps, link2_capacity_bps)

    def turn_s(self) -> float:
        """The earliest start for a task that is placed now: the start of the last first-served task."""
        return self.first_served[-1][0] if self.first_served else LONG_AGO

    def without(self, gone: Sequence[Reservation]) -> EdgeAccount:
        """The edge without some scheduled tasks, as a copy to look at."""
        other = EdgeAccount(self.name, self.slots, self.link1_capacity_bps, self.link2_capacity_bps)
        other.first_served, other.sessions = self.first_served, self.sessions
        left_out = {r.task_id for r in gone}
        other.queue = [item for item in self.queue if item[2].task_id not in left_out]
        other.reservations = {name: r for name, r in self.reservations.items() if name not in left_out}
        other.timeline = self.timeline.copy()
        for r in gone:
            other.timeline.give(r)
        return other

    def resize(self, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        """Change the capacities, at every instant."""
        self.timeline.change(
            LONG_AGO,
            FOREVER,
            slots - self.slots,
            link1_capacity_bps - self.link1_capacity_bps,
            link2_capacity_bps - self.link2_capacity_bps,
        )
        self.slots, self.link1_capacity_bps, self.link2_capacity_bps = slots, link1_capacity_bps, link2_capacity_bps


class DeviceAccount:
    """One device: the tasks that compute on it, one at a time; if its link is limited, also all tasks that send over it."""

    __slots__ = ("limited", "link1_capacity_bps", "name", "queue", "reservations", "sessions", "timeline")

    def __init__(
        self, name: str, link1_capacity_bps: int = 0, make_timeline: Callable[[int, int, int], Timeline] = Timeline
    ) -> None:
        self.name = name
        self.limited = link1_capacity_bps > 0
        self.link1_capacity_bps = link1_capacity_bps or UNLIMITED_BPS
        self.reservations: dict[str, Reservation] = {}
        self.queue: list[Queued] = []  # scheduled tasks, by (start, sequence)
        self.sessions = SessionSums()
        self.timeline = make_timeline(1, self.link1_capacity_bps, 0)  # its slot is the device's processor

    def without(self, gone: Sequence[Reservation]) -> DeviceAccount:
        """The device without some scheduled tasks, as a copy to look at."""
        other = DeviceAccount(self.name, self.link1_capacity_bps if self.limited else 0)
        other.sessions = self.sessions
        left_out = {r.task_id for r in gone}
        other.queue = [item for item in self.queue if item[2].task_id not in left_out]
        other.reservations = {name: r for name, r in self.reservations.items() if name not in left_out}
        other.timeline = self.timeline.copy()
        for r in gone:
            other.give(r)
        return other

    def take(self, r: Reservation, now: float = LONG_AGO) -> None:
        """Reserve the device's processor, its link, or both."""
        start_s = r.start_s
        self.timeline.change(start_s if start_s > now else LONG_AGO, r.end_s, -r.computes, -r.link1_bps, 0)

    def give(self, r: Reservation) -> None:
        """Undo `take`."""
        self.timeline.change(LONG_AGO if r.running else r.start_s, r.end_s, r.computes, r.link1_bps, 0)

    def free(self, start_s: float, end_s: float) -> bool:
        """Whether the processor is free during the whole of [start_s, end_s)."""
        times = self.timeline.times
        first = bisect_right(times, start_s) - 1
        return min(self.timeline.slots[first : bisect_left(times, end_s, first + 1)]) > 0

    def first_free(self, start_s: float, length_s: float) -> float:
        """The first instant from `start_s` on from which the processor is free for `length_s`."""
        times, slots = self.timeline.times, self.timeline.slots
        for i in range(bisect_right(times, start_s) - 1, len(times)):
            if times[i] >= start_s + length_s:
                break
            if slots[i] < 1:
                start_s = times[i + 1] if i + 1 < len(times) else FOREVER
        return start_s

    def freed(self, now: float) -> list[float]:
        """Instants after `now` at which the processor or a part of the link becomes free, ascending."""
        line = self.timeline
        times, slots, free1 = line.times, line.slots, line.free1
        first = max(1, bisect_right(times, now))
        return [times[i] for i in range(first, len(times)) if slots[i] > slots[i - 1] or free1[i] > free1[i - 1]]


class Ledger:
    """All reservations of a region. Mutated only by `RegionState.apply`."""

    def __init__(
        self,
        make_timeline: Callable[[int, int, int], Timeline] = Timeline,
        make_device: Callable[[str, int, Callable[[int, int, int], Timeline]], DeviceAccount] = DeviceAccount,
    ) -> None:
        """`make_timeline` has the parameters of `Timeline`, and `make_device` those of `DeviceAccount`."""
        self._make_timeline = make_timeline
        self._make_device = make_device
        self.edges: dict[str, EdgeAccount] = {}
        self.devices: dict[str, DeviceAccount] = {}  # devices with reservations
        self.own_links: dict[str, int] = {}  # limits that devices announced of their own link, bit/s
        self.reservations: dict[str, Reservation] = {}
        self.held_by: dict[str, int] = {}  # number of reservations of the tasks of each device that has any
        self.alone: dict[str, Reservation] = {}  # those that use no edge

    def open_edge(self, name: str, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        """Add an edge, or change its capacities."""
        account = self.edges.get(name)
        if account is None:
            self.edges[name] = EdgeAccount(name, slots, link1_capacity_bps, link2_capacity_bps, self._make_timeline)
        else:
            account.resize(slots, link1_capacity_bps, link2_capacity_bps)

    def close_edge(self, name: str) -> None:
        """Remove an edge. Raises `InvariantError` if it still has reservations."""
        account = self.edges.pop(name)
        if account.reservations:
            raise InvariantError(f"edge {name} is removed but still has reservations {sorted(account.reservations)}")

    def limit_device(self, name: str, link1_capacity_bps: int) -> list[Reservation]:
        """Set the limit of a device's own link; 0: no limit. Return the reservations that this affects."""
        if self.own_links.get(name, 0) == link1_capacity_bps:
            return []
        if link1_capacity_bps:
            self.own_links[name] = link1_capacity_bps
        else:
            del self.own_links[name]
        self.devices.pop(name, None)
        concerned = [r for r in self.reservations.values() if r.sender == name]
        for r in concerned:
            self._book_device(r, LONG_AGO)
        return concerned

    def load_steps(self, name: str, steps: int) -> int:
        """The share of an edge's or device's computing time that sessions hold, in steps, rounded up."""
        account = self.edges.get(name)
        capacity = LOAD_UNITS if account is None else LOAD_UNITS * account.slots
        holder = self.devices.get(name) if account is None else account
        units = 0 if holder is None else holder.sessions.units
        return -(-steps * units // capacity) if units and capacity else 0

    def reserve(self, r: Reservation, now: float) -> None:
        """Book a reservation. Raises `InvariantError` if its task has one already or its edge is unknown."""
        if r.task_id in self.reservations:
            raise InvariantError(f"task {r.task_id} reserves twice: {self.reservations[r.task_id]} and {r}")
        account = self._edge(r)
        self.reservations[r.task_id] = r
        if r.sender is not None:
            self.held_by[r.sender] = self.held_by.get(r.sender, 0) + 1
        if account is None:
            self.alone[r.task_id] = r
        else:
            account.timeline.forget_before(now)
            account.reservations[r.task_id] = r
            account.timeline.take(r, now)
            if r.load is not None:
                account.sessions.add(1, r.load.edge, r.link1_bps, r.link2_bps)
            if not r.running:
                insort(account.queue, (r.start_s, r.seq, r))
                if r.first_served:
                    insort(account.first_served, (r.start_s, r.seq, r))
        self._book_device(r, now)

    def _book_device(self, r: Reservation, now: float) -> None:
        """Book a reservation on its device: the processor or a load, or bandwidth on a limited own link, or both."""
        name = r.sender
        loads = r.load is not None and r.load.device > 0
        if name is None or not (r.computes or loads or (r.link1_bps and name in self.own_links)):
            r.device = None
            return
        r.device = name
        device = self.devices.get(name)
        if device is None:
            device = self.devices[name] = self._make_device(name, self.own_links.get(name, 0), self._make_timeline)
        else:
            device.timeline.forget_before(now)
        device.reservations[r.task_id] = r
        device.take(r, now)
        if r.load is not None:
            device.sessions.add(1, r.load.device, r.link1_bps, 0)
        if not r.running:
            insort(device.queue, (r.start_s, r.seq, r))

    def release(self, task_id: str, now: float = LONG_AGO) -> Reservation:
        """Give back a task's reservation. Raises `InvariantError` if the task has none, e.g. on a second release."""
        r = self.reservations.pop(task_id, None)
        if r is None:
            raise InvariantError(f"task {task_id} has no reservation to release")
        if r.sender is not None:
            self.held_by[r.sender] -= 1
            if not self.held_by[r.sender]:
                del self.held_by[r.sender]
        if not r.running:
            self._unqueue(r)
        account = self._edge(r)
        if account is not None:
            del account.reservations[task_id]
            if r.load is not None:
                account.sessions.add(-1, r.load.edge, r.link1_bps, r.link2_bps)
            if r.end_s > now:
                account.timeline.give(r)
            else:  # it ended on time, so nothing of it lies in the future
                account.timeline.forget_before(now)
        else:
            del self.alone[task_id]
        if r.device is not None:
            device = self.devices[r.device]
            del device.reservations[task_id]
            if r.load is not None:
                device.sessions.add(-1, r.load.device, r.link1_bps, 0)
            if not device.reservations:
                del self.devices[r.device]
            elif r.end_s > now:
                device.give(r)
            else:
                device.timeline.forget_before(now)
        return r

    def move(self, task_id: str, start_s: float, *, counts: bool = True) -> None:
        """Move a scheduled task to another start, with the same resources and the same length.

        `counts`: whether a move to a later start counts towards `MOVES_BORNE`.
        """
        r = self.reservations[task_id]
        if r.running:
            raise InvariantError(f"{r} cannot be moved because it is running")
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.give(r)
        if device is not None:
            device.give(r)
        self._unqueue(r)
        r.moves += counts and account is not None and start_s > r.start_s
        r.start_s, r.end_s = start_s, start_s + r.length_s
        self._queue(r)
        if account is not None:
            account.timeline.take(r)
        if device is not None:
            device.take(r)

    def rebook(self, r: Reservation, wanted: Reservation, now: float) -> None:
        """Exchange what a running task holds for what another reservation of it names, from now until that one's end."""
        if not r.running:
            raise InvariantError(f"{r} cannot be exchanged because it is not running")
        self.release(r.task_id, now)
        r.edge, r.computes, r.slots = wanted.edge, wanted.computes, wanted.slots
        r.link1_bps, r.link2_bps = wanted.link1_bps, wanted.link2_bps
        r.length_s, r.end_s = wanted.length_s, wanted.end_s
        self.reserve(r, now)

    def prolong(self, task_id: str, end_s: float) -> None:
        """Extend the reservation of a running task until `end_s`."""
        r = self.reservations[task_id]
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.change(r.end_s, end_s, -r.slots, -r.link1_bps, -r.link2_bps)
        if device is not None:
            device.timeline.change(r.end_s, end_s, -r.computes, -r.link1_bps, 0)
        r.end_s = end_s

    def concerned(self, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> float | None:
        """The earliest start among the scheduled tasks that a change may affect, or None if it affects none.

        `edges` and `devices` give the time until which resources were freed. If that is not after `now`, only tasks that are
        due are affected. A start before `now` means that another task ended late.
        """
        earliest: float | None = None
        accounts: Mapping[str, EdgeAccount] | Mapping[str, DeviceAccount]
        for accounts, changed in ((self.edges, edges), (self.devices, devices)):
            for name, until in changed.items():
                account = accounts.get(name)
                if account is None or not account.queue:
                    continue
                start = account.queue[0][0]
                if (start <= now or until > now) and (earliest is None or start < earliest):
                    earliest = start
        return earliest

    def overbooked(self, r: Reservation, from_s: float) -> bool:
        """Whether the edge or device of `r` is overbooked at any time from `from_s` (not before now) to the end of `r`."""
        return any(
            account is not None and not account.timeline.fits(from_s, r.end_s, 0, 0, 0)
            for account in (self._edge(r), self._device(r))
        )

    def start(self, task_id: str) -> None:
        """Mark a scheduled task as running."""
        r = self.reservations[task_id]
        self._unqueue(r)
        r.running = True

    def _queue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            insort(self.edges[r.edge].queue, item)
            if r.first_served:
                insort(self.edges[r.edge].first_served, item)
        if r.device is not None:
            insort(self.devices[r.device].queue, item)

    def _unqueue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            queue = self.edges[r.edge].queue
            del queue[bisect_left(queue, item)]
            if r.first_served:
                queue = self.edges[r.edge].first_served
                del queue[bisect_left(queue, item)]
        if r.device is not None:
            queue = self.devices[r.device].queue
            del queue[bisect_left(queue, item)]

    def audit(self, now: float) -> None:
        """Check (8)-(10), one computing task per device, and the limits of own links at every instant from `now` on.

        The check counts the reservations and compares the result with the timelines. Raises `InvariantError`.
        """
        for account in self.edges.values():
            held = [(r, (r.slots, r.link1_bps, r.link2_bps)) for r in account.reservations.values()]
            capacity = (account.slots, account.link1_capacity_bps, account.link2_capacity_bps)
            _audit(f"edge {account.name}", account.timeline, held, capacity, now)
            _audit_sessions(
                f"edge {account.name}",
                account.sessions,
                [(r.load.edge, r.link1_bps, r.link2_bps) for r, _ in held if r.load is not None],
                (LOAD_UNITS * account.slots, account.link1_capacity_bps, account.link2_capacity_bps),
            )
        for device in self.devices.values():
            held = [(r, (int(r.computes), r.link1_bps, 0)) for r in device.reservations.values()]
            _audit(f"device {device.name}", device.timeline, held, (1, device.link1_capacity_bps, 0), now)
            loads = [(r.load.device, r.link1_bps, 0) for r, _ in held if r.load is not None]
            _audit_sessions(f"device {device.name}", device.sessions, loads, (LOAD_UNITS, device.link1_capacity_bps, 0))
        for task_id, r in self.reservations.items():
            holders: Iterable[bool] = (
                r.edge is None or self.edges[r.edge].reservations.get(task_id) is r,
                r.device is None or self.devices[r.device].reservations.get(task_id) is r,
            )
            if not all(holders):
                raise InvariantError(f"{r} is missing from the account of its edge or device")
            queued = [
                any(item[2] is r for item in account.queue)
                for account in (self.edges.get(r.edge or ""), self.devices.get(r.device or ""))
                if account is not None
            ]
            if r.edge is not None and ((r.start_s, r.seq, r) in self.edges[r.edge].first_served) != r.first_served:
                raise InvariantError(f"{r}: its entry in the edge's first-served list contradicts its {r.moves} moves")
            if any(known == r.running for known in queued):
                raise InvariantError(f"{r}: its entry in a queue contradicts its state")
        if self.held_by != Counter(r.sender for r in self.reservations.values() if r.sender is not None):
            raise InvariantError("the number of reservations of a device differs from those that the ledger lists")
        if self.alone.keys() != {name for name, r in self.reservations.items() if r.edge is None}:
            raise InvariantError("the ledger's list of reservations without an edge is wrong")
        booked = sum(len(account.reservations) for account in self.edges.values())
        if booked != sum(r.edge is not None for r in self.reservations.values()):
            raise InvariantError("an edge has a reservation that the ledger does not list")

    def _edge(self, r: Reservation) -> EdgeAccount | None:
        if r.edge is None:
            return None
        account = self.edges.get(r.edge)
        if account is None:
            raise InvariantError(f"{r} names an edge that is not in the ledger")
        return account

    def _device(self, r: Reservation) -> DeviceAccount | None:
        return None if r.device is None else self.devices[r.device]


Amounts = tuple[int, int, int]
"""Slots, link 1, link 2."""


def _audit(
    name: str, timeline: Timeline, held: Sequence[tuple[Reservation, Amounts]], capacity: Amounts, now: float
) -> None:
    running = [(r, amounts) for r, amounts in held if r.running]  # includes tasks past their predicted end
    if any(amount > limit for amount, limit in zip(_sum(running), capacity, strict=True)):
        raise InvariantError(f"running tasks exceed the capacity of {name}: {running}")
    for at_s in _instants([r for r, _ in held], timeline.times, now):
        live = [(r, amounts) for r, amounts in held if r.start_s <= at_s < r.end_s]
        used = _sum(live)
        for number, amount, limit in zip(("(8)", "(9)", "(10)"), used, capacity, strict=True):
            if amount > limit:
                raise InvariantError(f"{number} is violated on {name} at {at_s}: {amount} > {limit}, {live}")
        free = timeline.at(at_s)
        if free != tuple(limit - amount for amount, limit in zip(used, capacity, strict=True)):
            raise InvariantError(f"{name} at {at_s}: its timeline has {free} free, but its reservations use {used}")


def _audit_sessions(name: str, sums: SessionSums, held: Sequence[Amounts], capacity: Amounts) -> None:
    used = sum(h[0] for h in held), sum(h[1] for h in held), sum(h[2] for h in held)
    if used != (sums.units, sums.link1_bps, sums.link2_bps):
        raise InvariantError(f"the sessions of {name} hold {used}, but their sums differ")
    if any(amount > bookable(limit) for amount, limit in zip(used, capacity, strict=True)):
        raise InvariantError(f"the sessions of {name} hold {used}, more than they may of {capacity}")


def _sum(held: Sequence[tuple[Reservation, Amounts]]) -> Amounts:
    return sum(a[0] for _, a in held), sum(a[1] for _, a in held), sum(a[2] for _, a in held)


def _instants(reservations: Iterable[Reservation], times: Iterable[float], now: float) -> Iterator[float]:
    instants = {now}
    for r in reservations:
        instants.update((r.start_s, r.end_s))
    instants.update(times)
    yield from sorted(at_s for at_s in instants if now <= at_s < FOREVER)
