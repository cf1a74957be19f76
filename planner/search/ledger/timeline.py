"""The free slots and bandwidth of an edge or a device as a step function of time.

Parallel lists hold the breakpoints and the *free* amounts (slots, link 1, link 2) from each breakpoint to the next. `bisect`
finds an instant, and `min(slice)` gives the amount that is free during a whole interval. Breakpoints without a change and
breakpoints in the past are dropped, so a list has about two entries per reservation. Queries must not reach into the past.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

from planner.search.ledger.reservation import FOREVER, Reservation

LONG_AGO: Final = float("-inf")


class Timeline:
    """The free amounts of one edge or device."""

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
