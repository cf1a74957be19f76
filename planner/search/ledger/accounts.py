"""The accounts of edges and devices: capacities, reservations, queues of scheduled tasks, and timelines.

A device computes one task at a time. If it announced a limit of its own link, the sum of its tasks' grants on link 1, over
all edges, stays within that limit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from planner.search.ledger.reservation import FOREVER, Reservation
from planner.search.ledger.timeline import LONG_AGO, Timeline

UNLIMITED_BPS: Final = 1 << 62
"""The link capacity of a device that announced no limit of its own link."""

Queued = tuple[float, int, Reservation]
"""Start, sequence and reservation; the sequence is unique, so reservations are never compared."""


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
