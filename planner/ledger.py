"""What is reserved, on which edge or device, from when to when: constraints (8)-(10) over time.

Bandwidth is kept in integer bits per second, so a release gives back exactly what was taken and nothing drifts.

An edge's `Timeline` is a step function: parallel lists of breakpoints and of what is *free* (slots, link 1, link 2) from each
breakpoint to the next. `bisect` finds an instant, `min(slice)` what is free during a whole interval. Breakpoints at which
nothing changes are dropped, and so is the past; a list has about two entries a reservation, however many edges there are.
What was free in the past is not kept: whoever asks, asks from now on.

A device computes one task at a time; it has few reservations, so they are a plain list.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final

from bus.errors import InvariantError

FOREVER: Final = float("inf")
LONG_AGO: Final = float("-inf")
SHORTEST_S: Final = 1e-6
"""A reservation is never shorter, so that whatever runs is seen to hold something."""


class Reservation:
    """What one placement holds in [start_s, end_s): perhaps a slot, bandwidth on both links, perhaps its device."""

    __slots__ = (
        "device",
        "edge",
        "end_s",
        "length_s",
        "link1_bps",
        "link2_bps",
        "running",
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
    ) -> None:
        self.task_id = task_id
        self.seq = seq  # order of admission, settles equal starts
        self.edge = edge  # None: the device alone
        self.device = device  # None: the device only sends its input
        self.start_s = start_s  # ledger time
        self.length_s = length_s = delay_s if delay_s > SHORTEST_S else SHORTEST_S  # w
        self.end_s = start_s + length_s  # predicted; a task that overruns has it moved on
        self.slots = slots  # 0 or 1
        self.link1_bps = link1_bps
        self.link2_bps = link2_bps
        self.running = False

    @property
    def key(self) -> tuple[float, int]:
        """The order in which scheduled tasks are walked."""
        return self.start_s, self.seq

    def __repr__(self) -> str:
        state = "running" if self.running else "scheduled"
        return (
            f"<{self.task_id} {state} [{self.start_s:.6f}, {self.end_s:.6f}) edge={self.edge} device={self.device} "
            f"{self.slots} slot {self.link1_bps}/{self.link2_bps} bps>"
        )


Queued = tuple[float, int, Reservation]
"""start, sequence, and whose; the sequence is unique, so reservations are never compared."""


class Timeline:
    """Free slots and bandwidth of one edge, as step functions of time."""

    __slots__ = ("free1", "free2", "slots", "times")

    def __init__(self, slots: int, link1_bps: int, link2_bps: int) -> None:
        self.times: list[float] = [LONG_AGO]  # breakpoints, ascending
        self.slots: list[int] = [slots]  # free from times[i] until times[i + 1]
        self.free1: list[int] = [link1_bps]
        self.free2: list[int] = [link2_bps]

    def copy(self) -> Timeline:
        """An independent copy, to try things on."""
        other = Timeline.__new__(Timeline)
        other.times, other.slots = self.times.copy(), self.slots.copy()
        other.free1, other.free2 = self.free1.copy(), self.free2.copy()
        return other

    def change(self, start_s: float, end_s: float, slots: int, link1_bps: int, link2_bps: int) -> None:
        """Add to what is free in [start_s, end_s); negative amounts reserve."""
        if start_s >= end_s:
            return
        times, free, free1, free2 = self.times, self.slots, self.free1, self.free2
        # breakpoints at both ends, made where there are none
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
        # and dropped where nothing changes any more, the later one first
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
        """Reserve. What begins now needs no breakpoint for it."""
        start_s = r.start_s
        self.change(start_s if start_s > now else LONG_AGO, r.end_s, -r.slots, -r.link1_bps, -r.link2_bps)

    def give(self, r: Reservation) -> None:
        """Undo `take`. What runs began in the past, which nobody asks about, so no breakpoint is made there."""
        self.change(LONG_AGO if r.running else r.start_s, r.end_s, r.slots, r.link1_bps, r.link2_bps)

    def forget_before(self, now: float) -> None:
        """Drop breakpoints of the past. What is free at `now` and later stays as it is."""
        gone = bisect_right(self.times, now) - 1
        if gone > 0:
            del self.times[:gone], self.slots[:gone], self.free1[:gone], self.free2[:gone]
            self.times[0] = LONG_AGO

    def fits(self, start_s: float, end_s: float, slots: int, link1_bps: int, link2_bps: int) -> bool:
        """Whether so much is free during the whole of [start_s, end_s)."""
        first = bisect_right(self.times, start_s) - 1
        last = bisect_left(self.times, end_s, first + 1)
        return (
            min(self.slots[first:last]) >= slots
            and min(self.free1[first:last]) >= link1_bps
            and min(self.free2[first:last]) >= link2_bps
        )

    def at(self, at_s: float) -> tuple[int, int, int]:
        """What is free at an instant: slots, link 1, link 2."""
        i = bisect_right(self.times, at_s) - 1
        return self.slots[i], self.free1[i], self.free2[i]


class EdgeAccount:
    """One edge: its capacities (8)-(10), what is reserved there, and its timeline."""

    __slots__ = ("link1_capacity_bps", "link2_capacity_bps", "name", "queue", "reservations", "slots", "timeline")

    def __init__(self, name: str, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        self.name = name
        self.slots = slots
        self.link1_capacity_bps = link1_capacity_bps
        self.link2_capacity_bps = link2_capacity_bps
        self.reservations: dict[str, Reservation] = {}  # by task
        self.queue: list[Queued] = []  # those not running yet, by (start, sequence)
        self.timeline = Timeline(slots, link1_capacity_bps, link2_capacity_bps)

    def resize(self, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        """Take on other capacities, at every instant."""
        self.timeline.change(
            LONG_AGO,
            FOREVER,
            slots - self.slots,
            link1_capacity_bps - self.link1_capacity_bps,
            link2_capacity_bps - self.link2_capacity_bps,
        )
        self.slots, self.link1_capacity_bps, self.link2_capacity_bps = slots, link1_capacity_bps, link2_capacity_bps


def _key(r: Reservation) -> tuple[float, int]:
    return r.start_s, r.seq


class DeviceAccount:
    """One device: the tasks that compute on it, one at a time."""

    __slots__ = ("name", "queue", "reservations", "running")

    def __init__(self, name: str) -> None:
        self.name = name
        self.reservations: dict[str, Reservation] = {}
        self.running: list[Reservation] = []  # one, unless something is wrong
        self.queue: list[Queued] = []  # those not running yet, by (start, sequence)

    def free(self, start_s: float, end_s: float) -> bool:
        """Whether nobody computes there in [start_s, end_s)."""
        for r in self.running:
            if r.end_s > start_s and r.start_s < end_s:
                return False
        # those that are queued follow one another, so the last that starts before the end is the last to end
        before = bisect_left(self.queue, (end_s,)) - 1
        return before < 0 or self.queue[before][2].end_s <= start_s


class Ledger:
    """All reservations of a region. It does as it is told; who may tell it is `PlannerCore.apply` alone."""

    def __init__(self) -> None:
        self.edges: dict[str, EdgeAccount] = {}
        self.devices: dict[str, DeviceAccount] = {}
        self.reservations: dict[str, Reservation] = {}

    def open_edge(self, name: str, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        """An edge joins, or changes its capacities."""
        account = self.edges.get(name)
        if account is None:
            self.edges[name] = EdgeAccount(name, slots, link1_capacity_bps, link2_capacity_bps)
        else:
            account.resize(slots, link1_capacity_bps, link2_capacity_bps)

    def close_edge(self, name: str) -> None:
        """An edge is gone. Raises `InvariantError` while anything is reserved there."""
        account = self.edges.pop(name)
        if account.reservations:
            raise InvariantError(f"edge {name} is closed with reservations {sorted(account.reservations)}")

    def reserve(self, r: Reservation, now: float) -> None:
        """Book a reservation. Raises `InvariantError` if its task has one already or its edge is unknown."""
        if r.task_id in self.reservations:
            raise InvariantError(f"{r.task_id} reserves twice: {self.reservations[r.task_id]} and {r}")
        account = self._edge(r)
        self.reservations[r.task_id] = r
        if account is not None:
            account.timeline.forget_before(now)
            account.reservations[r.task_id] = r
            account.timeline.take(r, now)
        if r.device is not None:
            device = self.devices.get(r.device)
            if device is None:
                device = self.devices[r.device] = DeviceAccount(r.device)
            device.reservations[r.task_id] = r
            if r.running:
                device.running.append(r)
        if not r.running:
            self._queue(r)

    def release(self, task_id: str, now: float = LONG_AGO) -> Reservation:
        """Give everything back. Raises `InvariantError` when there is nothing to release: never twice."""
        r = self.reservations.pop(task_id, None)
        if r is None:
            raise InvariantError(f"{task_id} releases what it does not hold")
        if not r.running:
            self._unqueue(r)
        account = self._edge(r)
        if account is not None:
            del account.reservations[task_id]
            if r.end_s > now:
                account.timeline.give(r)
            else:  # it ends when it was predicted to: nothing of it lies ahead
                account.timeline.forget_before(now)
        if r.device is not None:
            device = self.devices[r.device]
            del device.reservations[task_id]
            if r.running:
                device.running.remove(r)
            if not device.reservations:
                del self.devices[r.device]
        return r

    def move(self, task_id: str, start_s: float) -> None:
        """A scheduled task gets the same resources, for the same length, from another instant on."""
        r = self.reservations[task_id]
        if r.running:
            raise InvariantError(f"{r} runs and cannot be moved")
        account = self._edge(r)
        if account is not None:
            account.timeline.give(r)
        self._unqueue(r)
        r.start_s, r.end_s = start_s, start_s + r.length_s
        self._queue(r)
        if account is not None:
            account.timeline.take(r)

    def prolong(self, task_id: str, end_s: float) -> None:
        """A running task keeps what it holds until `end_s`."""
        r = self.reservations[task_id]
        account = self._edge(r)
        if account is not None:
            account.timeline.change(r.end_s, end_s, -r.slots, -r.link1_bps, -r.link2_bps)
        r.end_s = end_s

    def concerned(self, edges: Mapping[str, float], devices: Mapping[str, float], now: float) -> float | None:
        """The earliest start that was promised to anybody whom a change may concern, or None: nobody waits for it.

        `edges` and `devices` say until when something was freed there. What was freed until now concerns those alone whose
        start has come. A start before now says that something ended late.
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
        """Whether, from `from_s` (not before now) to the end of `r`, more is promised than there is on its edge or device."""
        account = self._edge(r)
        if account is not None and not account.timeline.fits(from_s, r.end_s, 0, 0, 0):
            return True
        if r.device is None:
            return False
        others = self.devices[r.device].reservations.values()
        return any(o is not r and o.start_s < r.end_s and o.end_s > from_s for o in others)

    def start(self, task_id: str) -> None:
        """What was scheduled runs."""
        r = self.reservations[task_id]
        self._unqueue(r)
        r.running = True
        if r.device is not None:
            self.devices[r.device].running.append(r)

    def _queue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            insort(self.edges[r.edge].queue, item)
        if r.device is not None:
            insort(self.devices[r.device].queue, item)

    def _unqueue(self, r: Reservation) -> None:
        item = (r.start_s, r.seq, r)
        if r.edge is not None:
            queue = self.edges[r.edge].queue
            del queue[bisect_left(queue, item)]
        if r.device is not None:
            queue = self.devices[r.device].queue
            del queue[bisect_left(queue, item)]

    def audit(self, now: float) -> None:
        """Check (8)-(10) and one task a device at every instant from `now` on, from the reservations themselves.

        Also that the timelines agree with them. Raises `InvariantError`.
        """
        for account in self.edges.values():
            _audit_edge(account, now)
        for device in self.devices.values():
            ordered = sorted(device.reservations.values(), key=_key)
            for before, after in pairwise(ordered):
                if before.end_s > after.start_s and before.end_s > now:
                    raise InvariantError(f"device {device.name} computes two tasks at once: {before} and {after}")
        for task_id, r in self.reservations.items():
            holders: Iterable[bool] = (
                r.edge is None or self.edges[r.edge].reservations.get(task_id) is r,
                r.device is None or self.devices[r.device].reservations.get(task_id) is r,
            )
            if not all(holders):
                raise InvariantError(f"{r} is not booked where it says")
            queued = [
                any(item[2] is r for item in account.queue)
                for account in (self.edges.get(r.edge or ""), self.devices.get(r.device or ""))
                if account is not None
            ]
            if any(known == r.running for known in queued):
                raise InvariantError(f"{r} stands in a queue, or does not, against its state")
        booked = sum(len(account.reservations) for account in self.edges.values())
        if booked != sum(r.edge is not None for r in self.reservations.values()):
            raise InvariantError("an edge holds a reservation of nobody")

    def _edge(self, r: Reservation) -> EdgeAccount | None:
        if r.edge is None:
            return None
        account = self.edges.get(r.edge)
        if account is None:
            raise InvariantError(f"{r} is on an edge that is not there")
        return account


def _audit_edge(account: EdgeAccount, now: float) -> None:
    timeline = account.timeline
    running = [r for r in account.reservations.values() if r.running]  # also those past their predicted end
    if (
        sum(r.slots for r in running) > account.slots
        or sum(r.link1_bps for r in running) > account.link1_capacity_bps
        or sum(r.link2_bps for r in running) > account.link2_capacity_bps
    ):
        raise InvariantError(f"more runs on {account.name} than it has: {running}")
    for at_s in _instants(account.reservations.values(), timeline.times, now):
        live = [r for r in account.reservations.values() if r.start_s <= at_s < r.end_s]
        used = (sum(r.slots for r in live), sum(r.link1_bps for r in live), sum(r.link2_bps for r in live))
        capacity = (account.slots, account.link1_capacity_bps, account.link2_capacity_bps)
        for number, amount, limit in zip(("(8)", "(9)", "(10)"), used, capacity, strict=True):
            if amount > limit:
                raise InvariantError(f"{number} is broken on {account.name} at {at_s}: {amount} > {limit}, {live}")
        i = bisect_right(timeline.times, at_s) - 1
        free = (timeline.slots[i], timeline.free1[i], timeline.free2[i])
        if free != tuple(limit - amount for amount, limit in zip(used, capacity, strict=True)):
            raise InvariantError(f"the timeline of {account.name} says {free} at {at_s}, its reservations {used}")


def _instants(reservations: Iterable[Reservation], times: Iterable[float], now: float) -> Iterator[float]:
    instants = {now}
    for r in reservations:
        instants.update((r.start_s, r.end_s))
    instants.update(times)
    yield from sorted(at_s for at_s in instants if now <= at_s < FOREVER)
