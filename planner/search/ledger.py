"""What is reserved, on which edge or device, from when to when: constraints (8)-(10) over time.

Bandwidth is kept in integer bits per second, so a release gives back exactly what was taken and nothing drifts.

An edge's `Timeline` is a step function: parallel lists of breakpoints and of what is *free* (slots, link 1, link 2) from each
breakpoint to the next. `bisect` finds an instant, `min(slice)` what is free during a whole interval. Breakpoints at which
nothing changes are dropped, and so is the past; a list has about two entries a reservation, however many edges there are.
What was free in the past is not kept: whoever asks, asks from now on.

A device has such a timeline, too: it computes one task at a time, and where it announced a limit of its own link, the grants
on link 1 of its tasks, whatever edges they use, never exceed it in sum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from bus.errors import InvariantError

FOREVER: Final = float("inf")
LONG_AGO: Final = float("-inf")
UNLIMITED_BPS: Final = 1 << 62
"""What is free on the link of a device that announced no limit of its own."""
MOVES_BORNE: Final = 10
"""A scheduled task that was moved to a later start so often has waited enough: no other task is put before it on its edge."""
SHORTEST_S: Final = 1e-6
"""A reservation is never shorter, so that whatever runs is seen to hold something."""


class Reservation:
    """What one placement holds in [start_s, end_s): perhaps a slot, bandwidth on both links, perhaps its device."""

    __slots__ = (
        "computes",
        "device",
        "edge",
        "end_s",
        "length_s",
        "link1_bps",
        "link2_bps",
        "moves",
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
    ) -> None:
        self.task_id = task_id
        self.seq = seq  # order of admission, settles equal starts
        self.edge = edge  # None: the device alone
        self.sender = device  # whose task it is
        self.computes = computes  # whether the device runs layers, rather than only send its input
        self.device = device  # the device on which the ledger books it; None: it holds nothing there
        self.start_s = start_s  # ledger time
        self.length_s = length_s = delay_s if delay_s > SHORTEST_S else SHORTEST_S  # w
        self.end_s = start_s + length_s  # predicted; a task that overruns has it moved on
        self.slots = slots  # 0 or 1
        self.link1_bps = link1_bps
        self.link2_bps = link2_bps
        self.running = False
        self.moves = 0  # to a later start

    @property
    def first_served(self) -> bool:
        """Whether other tasks are put behind it on its edge."""
        return self.moves >= MOVES_BORNE and not self.running

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
        """Reserve, on an edge. What begins now needs no breakpoint for it."""
        start_s = r.start_s
        self.change(start_s if start_s > now else LONG_AGO, r.end_s, -r.slots, -r.link1_bps, -r.link2_bps)

    def give(self, r: Reservation) -> None:
        """Undo `take`. What runs began in the past, which is never asked for, so no breakpoint is made there."""
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

    __slots__ = (
        "first_served",
        "link1_capacity_bps",
        "link2_capacity_bps",
        "name",
        "queue",
        "reservations",
        "slots",
        "timeline",
    )

    def __init__(self, name: str, slots: int, link1_capacity_bps: int, link2_capacity_bps: int) -> None:
        self.name = name
        self.slots = slots
        self.link1_capacity_bps = link1_capacity_bps
        self.link2_capacity_bps = link2_capacity_bps
        self.reservations: dict[str, Reservation] = {}  # by task
        self.queue: list[Queued] = []  # those not running yet, by (start, sequence)
        self.first_served: list[Queued] = []  # those of the queue that no other task is put before
        self.timeline = Timeline(slots, link1_capacity_bps, link2_capacity_bps)

    def turn_s(self) -> float:
        """No task that is placed now starts before this."""
        return self.first_served[-1][0] if self.first_served else LONG_AGO

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


class DeviceAccount:
    """One device: the tasks that compute on it, one at a time, and where its link is limited, all that send over it."""

    __slots__ = ("limited", "link1_capacity_bps", "name", "queue", "reservations", "timeline")

    def __init__(self, name: str, link1_capacity_bps: int = 0) -> None:
        self.name = name
        self.limited = link1_capacity_bps > 0
        self.link1_capacity_bps = link1_capacity_bps or UNLIMITED_BPS
        self.reservations: dict[str, Reservation] = {}
        self.queue: list[Queued] = []  # those not running yet, by (start, sequence)
        self.timeline = Timeline(1, self.link1_capacity_bps, 0)  # its slot is the device's processor

    def take(self, r: Reservation, now: float = LONG_AGO) -> None:
        """Reserve the processor, the link, or both."""
        start_s = r.start_s
        self.timeline.change(start_s if start_s > now else LONG_AGO, r.end_s, -r.computes, -r.link1_bps, 0)

    def give(self, r: Reservation) -> None:
        """Undo `take`."""
        self.timeline.change(LONG_AGO if r.running else r.start_s, r.end_s, r.computes, r.link1_bps, 0)

    def free(self, start_s: float, end_s: float) -> bool:
        """Whether no task computes there in [start_s, end_s)."""
        times = self.timeline.times
        first = bisect_right(times, start_s) - 1
        return min(self.timeline.slots[first : bisect_left(times, end_s, first + 1)]) > 0

    def first_free(self, start_s: float, length_s: float) -> float:
        """The first instant from `start_s` on, from which no task computes there for so long."""
        times, slots = self.timeline.times, self.timeline.slots
        for i in range(bisect_right(times, start_s) - 1, len(times)):
            if times[i] >= start_s + length_s:
                break
            if slots[i] < 1:
                start_s = times[i + 1] if i + 1 < len(times) else FOREVER
        return start_s

    def freed(self, now: float) -> list[float]:
        """Instants after `now` from which the processor is free, or more of the link, ascending."""
        line = self.timeline
        times, slots, free1 = line.times, line.slots, line.free1
        first = max(1, bisect_right(times, now))
        return [times[i] for i in range(first, len(times)) if slots[i] > slots[i - 1] or free1[i] > free1[i - 1]]


class Ledger:
    """All reservations of a region. It does as it is told; who may tell it is `PlannerCore.apply` alone."""

    def __init__(self) -> None:
        self.edges: dict[str, EdgeAccount] = {}
        self.devices: dict[str, DeviceAccount] = {}  # those on which something is booked
        self.own_links: dict[str, int] = {}  # limits that devices announced of their own link, bit/s
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

    def limit_device(self, name: str, link1_capacity_bps: int) -> list[Reservation]:
        """A device announces what its own link carries, 0: no limit. The reservations that this concerns."""
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
            if not r.running:
                insort(account.queue, (r.start_s, r.seq, r))
                if r.first_served:
                    insort(account.first_served, (r.start_s, r.seq, r))
        self._book_device(r, now)

    def _book_device(self, r: Reservation, now: float) -> None:
        """What a reservation holds of its device: the processor, or a share of a link that is limited."""
        name = r.sender
        if name is None or not (r.computes or (r.link1_bps and name in self.own_links)):
            r.device = None
            return
        r.device = name
        device = self.devices.get(name)
        if device is None:
            device = self.devices[name] = DeviceAccount(name, self.own_links.get(name, 0))
        else:
            device.timeline.forget_before(now)
        device.reservations[r.task_id] = r
        device.take(r, now)
        if not r.running:
            insort(device.queue, (r.start_s, r.seq, r))

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
            if not device.reservations:
                del self.devices[r.device]
            elif r.end_s > now:
                device.give(r)
            else:
                device.timeline.forget_before(now)
        return r

    def move(self, task_id: str, start_s: float) -> None:
        """A scheduled task gets the same resources, for the same length, from another instant on."""
        r = self.reservations[task_id]
        if r.running:
            raise InvariantError(f"{r} runs and cannot be moved")
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.give(r)
        if device is not None:
            device.give(r)
        self._unqueue(r)
        r.moves += account is not None and start_s > r.start_s
        r.start_s, r.end_s = start_s, start_s + r.length_s
        self._queue(r)
        if account is not None:
            account.timeline.take(r)
        if device is not None:
            device.take(r)

    def prolong(self, task_id: str, end_s: float) -> None:
        """A running task keeps what it holds until `end_s`."""
        r = self.reservations[task_id]
        account, device = self._edge(r), self._device(r)
        if account is not None:
            account.timeline.change(r.end_s, end_s, -r.slots, -r.link1_bps, -r.link2_bps)
        if device is not None:
            device.timeline.change(r.end_s, end_s, -r.computes, -r.link1_bps, 0)
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
        return any(
            account is not None and not account.timeline.fits(from_s, r.end_s, 0, 0, 0)
            for account in (self._edge(r), self._device(r))
        )

    def start(self, task_id: str) -> None:
        """What was scheduled runs."""
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
        """Check (8)-(10), one task a device and its own link at every instant from `now` on.

        All is counted from the reservations, and the timelines must agree with them. Raises `InvariantError`.
        """
        for account in self.edges.values():
            held = [(r, (r.slots, r.link1_bps, r.link2_bps)) for r in account.reservations.values()]
            capacity = (account.slots, account.link1_capacity_bps, account.link2_capacity_bps)
            _audit(f"edge {account.name}", account.timeline, held, capacity, now)
        for device in self.devices.values():
            held = [(r, (int(r.computes), r.link1_bps, 0)) for r in device.reservations.values()]
            _audit(f"device {device.name}", device.timeline, held, (1, device.link1_capacity_bps, 0), now)
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
            if r.edge is not None and ((r.start_s, r.seq, r) in self.edges[r.edge].first_served) != r.first_served:
                raise InvariantError(f"{r} is served first, or is not, against its {r.moves} moves")
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

    def _device(self, r: Reservation) -> DeviceAccount | None:
        return None if r.device is None else self.devices[r.device]


Amounts = tuple[int, int, int]
"""Slots, link 1, link 2."""


def _audit(
    name: str, timeline: Timeline, held: Sequence[tuple[Reservation, Amounts]], capacity: Amounts, now: float
) -> None:
    running = [(r, amounts) for r, amounts in held if r.running]  # also those past their predicted end
    if any(amount > limit for amount, limit in zip(_sum(running), capacity, strict=True)):
        raise InvariantError(f"more runs on {name} than it has: {running}")
    for at_s in _instants([r for r, _ in held], timeline.times, now):
        live = [(r, amounts) for r, amounts in held if r.start_s <= at_s < r.end_s]
        used = _sum(live)
        for number, amount, limit in zip(("(8)", "(9)", "(10)"), used, capacity, strict=True):
            if amount > limit:
                raise InvariantError(f"{number} is broken on {name} at {at_s}: {amount} > {limit}, {live}")
        free = timeline.at(at_s)
        if free != tuple(limit - amount for amount, limit in zip(used, capacity, strict=True)):
            raise InvariantError(f"the timeline of {name} says {free} at {at_s}, its reservations {used}")


def _sum(held: Sequence[tuple[Reservation, Amounts]]) -> Amounts:
    return sum(a[0] for _, a in held), sum(a[1] for _, a in held), sum(a[2] for _, a in held)


def _instants(reservations: Iterable[Reservation], times: Iterable[float], now: float) -> Iterator[float]:
    instants = {now}
    for r in reservations:
        instants.update((r.start_s, r.end_s))
    instants.update(times)
    yield from sorted(at_s for at_s in instants if now <= at_s < FOREVER)
